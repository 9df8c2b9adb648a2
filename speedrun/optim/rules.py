"""Update rules as pure functions of slices: what happens to a weight, given its gradient and its state.

A rule knows nothing of ranks. An *elementwise* rule (AdamW) treats every element alone, so it may run on any slice
of a parameter, wherever the slice ends. A *whole-matrix* rule (Muon) has a part that needs the matrix in one piece; it
is split in three so that only this part has to see it: `accumulate` on the slice, `transform` on the whole matrix,
`apply` on the slice again. Who brings the pieces together is the optimizer's business (strategies/optimizer.py).

Everything works in place on float32 tensors and expects to be called under torch.no_grad().
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from speedrun.optim.orthogonalize import newton_schulz, polar_express

Options = dict[str, Any]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); torch's own implementation.

    Options: lr, betas, eps, weight_decay. State per element: two moments, 8 bytes in float32; and a step count.
    """

    whole_matrix = False
    buffers = ("exp_avg", "exp_avg_sq")

    def step(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]], options: Options
    ) -> None:
        """Update `weights` (and the moments and step counts in `states`) in place. All lists run in parallel."""
        beta1, beta2 = options["betas"]
        adamw(
            weights,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=options["lr"],
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=False,
        )


class Muon:
    """Momentum, orthogonalised (Keller Jordan, 2024): every update is a matrix whose singular values are near one.

    Options: lr, momentum, weight_decay, orthogonalization ('newton_schulz' or 'polar_express'),
    orthogonalization_steps, orthogonalization_dtype, kernels (torch where not given). State per element: the momentum,
    4 bytes in float32.
    """

    whole_matrix = True
    buffers = ("momentum_buffer",)

    def accumulate(self, gradients: list[Tensor], states: list[dict[str, Tensor]], options: Options) -> None:
        """Momentum m ← μ·m + (1 − μ)·g, then Nesterov's look-ahead, left in `gradients`: g ← (1 − μ)·g + μ·m."""
        momenta = [state["momentum_buffer"] for state in states]
        mu = options["momentum"]
        torch._foreach_lerp_(momenta, gradients, 1.0 - mu)
        torch._foreach_lerp_(gradients, momenta, mu)

    def transform(self, matrices: Tensor, options: Options) -> Tensor:
        """Orthogonalise whole matrices [n, rows, columns] and scale them by √max(1, rows / columns).

        The factor keeps the root mean square of the update's effect the same for a tall matrix, whose orthogonal
        update has singular values of one but spreads its input over more outputs.
        """
        orthogonalize = {"newton_schulz": newton_schulz, "polar_express": polar_express}[options["orthogonalization"]]
        dtype = getattr(torch, options["orthogonalization_dtype"])
        rows, columns = matrices.shape[-2:]
        update = orthogonalize(matrices, options["orthogonalization_steps"], dtype, options.get("kernels", "torch"))
        return update * max(1.0, rows / columns) ** 0.5

    def apply(self, weight: Tensor, update: Tensor, options: Options) -> None:
        """w ← w·(1 − lr·weight_decay) − lr·update, on slices of any shape."""
        if options["weight_decay"]:
            weight.mul_(1.0 - options["lr"] * options["weight_decay"])
        weight.sub_(update, alpha=options["lr"])
