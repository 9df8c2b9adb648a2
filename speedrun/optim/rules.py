"""Update rules as pure functions of slices: what happens to a weight, given its gradient and its state.

A rule knows nothing of ranks. An *elementwise* rule (AdamW) treats every element alone, so it may run on any slice
of a parameter, wherever the slice ends. A *whole-matrix* rule (Muon) has a part that needs the matrix in one piece; it
is split in three so that only this part has to see it: `accumulate` on the slice, `transform` on the whole matrix,
`apply` on the slice again. Who brings the pieces together is the optimizer's business (strategies/optimizer.py).

Everything works in place on float32 tensors and expects to be called under torch.no_grad().

The option `left_out`, where it is there, is a float32 scalar on the device: 1 where the step must change nothing,
whatever the gradients hold, and else 0; `kept` is 1 less it. Nobody waits for them: a step that is left out runs like
any other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from speedrun.optim.orthogonalize import newton_schulz, polar_express
from speedrun.optim.precision import choose_dtype

Options = dict[str, Any]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); torch's own implementation.

    Options: lr, betas, eps, weight_decay, and optionally cautious (see `decay`) and update. State per element: two
    moments, 8 bytes in float32; and a step count.

    AdamW(accumulates=True) also keeps a sum of gradients, 4 bytes per element. A step with `update` false only adds to
    it; the next one with `update` true takes the whole sum as its gradient. (The record of 30 September 2025 lets the
    gradients of its Adam parameters add up over two steps while Muon takes every one. It leaves the sum in the
    gradients themselves; engines that clear those after every step need it here.)
    """

    whole_matrix = False
    matrix_buffers: tuple[str, ...] = ()

    def __init__(self, accumulates: bool = False):
        self.accumulates = accumulates
        self.buffers: tuple[str, ...] = ("exp_avg", "exp_avg_sq", *(["gradient_sum"] if accumulates else []))

    def step(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]], options: Options
    ) -> None:
        """Update `weights` (and the moments and step counts in `states`) in place. All lists run in parallel."""
        beta1, beta2 = options["betas"]
        left_out: Tensor | None = options.get("left_out")
        weight_decay = options["weight_decay"]
        cautious = bool(weight_decay and options.get("cautious"))
        if left_out is not None and (self.accumulates or cautious):  # else torch's kernel does not look at them
            keep_or(gradients, None, left_out)
        if self.accumulates:
            sums = [state["gradient_sum"] for state in states]
            if not options.get("update", True):
                torch._foreach_add_(sums, gradients)
                return
            torch._foreach_add_(gradients, sums)
            if left_out is None:
                torch._foreach_zero_(sums)
            else:
                torch._foreach_mul_(sums, left_out)
        if cautious:
            for some in portions(weights):
                # The update has the sign of the new first moment, whose denominator is positive.
                moments = torch._foreach_lerp(
                    [states[i]["exp_avg"] for i in some], [gradients[i] for i in some], 1.0 - beta1
                )
                decay([weights[i] for i in some], moments, options)
            weight_decay = 0.0
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
            weight_decay=weight_decay,
            eps=options["eps"],
            maximize=False,
            found_inf=left_out,
        )


class Muon:
    """Momentum, orthogonalised (Keller Jordan, 2024): every update is a matrix whose singular values are near one.

    Options: lr, momentum, weight_decay, orthogonalization ('newton_schulz' or 'polar_express'),
    orthogonalization_steps, orthogonalization_dtype, and optionally kernels (torch where not given) and cautious (see
    `decay`). State per element: the momentum, 4 bytes in float32.
    """

    whole_matrix = True
    buffers = ("momentum_buffer",)
    matrix_buffers: tuple[str, ...] = ()
    """State of a matrix as a whole: one float32 per row or column, whichever are more, on the matrix's owner alone."""

    def accumulate(self, gradients: list[Tensor], states: list[dict[str, Tensor]], options: Options) -> None:
        """Momentum m ← μ·m + (1 − μ)·g, then Nesterov's look-ahead, left in `gradients`: g ← (1 − μ)·g + μ·m."""
        momenta = [state["momentum_buffer"] for state in states]
        mu = options["momentum"]
        if (left_out := options.get("left_out")) is not None:
            keep_or(gradients, momenta, left_out)  # of two equal numbers every mean is the same
        torch._foreach_lerp_(momenta, gradients, 1.0 - mu)
        torch._foreach_lerp_(gradients, momenta, mu)

    def transform(self, matrices: Tensor, options: Options, states: Sequence[dict[str, Tensor]] = ()) -> Tensor:
        """Orthogonalise whole matrices [n, rows, columns] and scale them by √max(1, rows / columns).

        states: `matrix_buffers` of each matrix, of which Muon has none.

        The factor keeps the root mean square of the update's effect the same for a tall matrix, whose orthogonal
        update has singular values of one but spreads its input over more outputs.
        """
        orthogonalize = {"newton_schulz": newton_schulz, "polar_express": polar_express}[options["orthogonalization"]]
        dtype = getattr(torch, choose_dtype(options["orthogonalization_dtype"], matrices.device)[0])
        rows, columns = matrices.shape[-2:]
        orthogonal = orthogonalize(matrices, options["orthogonalization_steps"], dtype, options.get("kernels", "torch"))
        return self.normalize(orthogonal, options, states) * max(1.0, rows / columns) ** 0.5

    def normalize(self, matrices: Tensor, options: Options, states: Sequence[dict[str, Tensor]]) -> Tensor:
        """What NorMuon adds: nothing here."""
        return matrices

    def apply(self, weight: Tensor, update: Tensor, options: Options) -> None:
        """w ← w·(1 − lr·weight_decay) − lr·update, on slices of any shape, in place."""
        self.apply_all([weight], [update], options)

    def apply_all(self, weights: list[Tensor], updates: list[Tensor], options: Options) -> None:
        """`apply` for many slices at once: a few kernels on a GPU, however many they are. Lists run in parallel."""
        if options["weight_decay"]:
            decay(weights, updates, options)
        if options.get("left_out") is not None:
            torch._foreach_mul_(updates, options["kept"])
        # Beyond float32 torch would raise; so the weights overflow, and the run says that they did.
        torch._foreach_sub_(weights, updates, alpha=min(options["lr"], torch.finfo(torch.float32).max))


class NorMuon(Muon):
    """Muon whose neurons all move alike (Li et al., arXiv 2510.05491): an Adam-like second moment per row.

    Orthogonal updates have singular values near one, but the lengths of their rows still differ a lot. NorMuon keeps a
    running mean of the mean square of every row (of every column where the matrix is wider than tall: the mean goes
    along the shorter side), divides by its root, and gives the matrix its Frobenius norm back.

    Options: as Muon, and beta2. State: Muon's, and `second_moment`, one float32 per row or column, on the owner.
    """

    matrix_buffers = ("second_moment",)

    def normalize(self, matrices: Tensor, options: Options, states: Sequence[dict[str, Tensor]]) -> Tensor:
        """v ← β₂·v + (1 − β₂)·mean(O²); O ← O / √max(v, 1e-10), then scaled to the norm it had. Updates `states`."""
        rows, columns = matrices.shape[-2:]
        mean_square = matrices.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)  # [n, rows, 1]
        moments = [state["second_moment"] for state in states]
        if (left_out := options.get("left_out")) is not None:
            mean_square = torch.where(left_out > 0, torch.stack(moments).view_as(mean_square), mean_square)
        torch._foreach_lerp_(moments, list(mean_square.flatten(1)), 1.0 - options["beta2"])
        normalized = matrices * torch.stack(moments).view_as(mean_square).clamp(min=1e-10).rsqrt()
        before, after = (torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True) for m in (matrices, normalized))
        return normalized * (before / after.clamp(min=1e-10))


def decay(weights: Sequence[Tensor], updates: Sequence[Tensor], options: Options) -> None:
    """w ← w·(1 − lr·weight_decay), in place; with `cautious` only where update and weight have the same sign.

    Elsewhere the update leads away from zero, and decay would work against it (Chen et al., arXiv 2510.12402).
    """
    factor = options["lr"] * options["weight_decay"]
    left_out: Tensor | None = options.get("left_out")
    if not options.get("cautious"):
        rest: Any = 1.0 - factor
        if left_out is not None:
            rest = torch.where(left_out > 0, 1.0, left_out.new_full((), rest))
        torch._foreach_mul_(list(weights), rest)
        return
    for some in portions(weights):
        here = [weights[i] for i in some]
        decayed = torch._foreach_mul(here, [updates[i] for i in some])
        torch._foreach_sign_(decayed)
        torch._foreach_add_(decayed, 1.0)
        torch._foreach_clamp_max_(decayed, 1.0)  # 0 where the signs differ, else 1
        if left_out is not None:
            torch._foreach_mul_(decayed, options["kept"])
        torch._foreach_addcmul_(here, decayed, here, value=-factor)


def keep_or(tensors: Sequence[Tensor], others: Sequence[Tensor] | None, left_out: Tensor) -> None:
    """Where left_out is 1, put `others` (None: zeros) into `tensors`, in place; elsewhere they stay, to the bit.

    Float32 in, seen as integers: times 0 and 1 these do what is wanted with inf and NaN too, and for a whole list at a
    time, which torch.where cannot.
    """
    leave = left_out.to(torch.int32)
    bits = [tensor.view(torch.int32) for tensor in tensors]
    torch._foreach_mul_(bits, 1 - leave)
    if others is not None:
        torch._foreach_add_(bits, torch._foreach_mul([other.view(torch.int32) for other in others], leave))


PORTION = 2**25
"""Elements of tensors that are worked on together at most, where that takes memory: 128 MiB in float32."""


def portions(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of tensors in their list, in turn, so many at a time that they have PORTION elements or are one."""
    some: list[int] = []
    for place, tensor in enumerate(tensors):
        if some and sum(tensors[i].numel() for i in some) + tensor.numel() > PORTION:
            yield some
            some = []
        some.append(place)
    if some:
        yield some
