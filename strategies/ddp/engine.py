"""DDP: every rank holds the whole model and a part of the batch; gradients are averaged during backward.

torch's DistributedDataParallel does it: gradients go into buckets, and a bucket is all-reduced as soon as it is full,
while the backward pass goes on. During accumulation `no_sync` holds the all-reduce back until the last micro-batch.

Muon under DDP. Every rank would orthogonalise the same matrices; instead each block matrix has an owner. Its gradient
stays out of DDP's buckets and is reduce-scattered to the owner at the step, the owner alone keeps its momentum and
transforms it, and the update is all-gathered. On a ring an all-reduce *is* a reduce-scatter and an all-gather, so the
wire carries the same bytes as before, the work per rank falls to 1/N, and so does the memory of the momentum.

Holds: all parameters and all gradients in float32 (bf16 and fp16 too: autocast casts for the moment of use), AdamW's
moments for everything that AdamW updates, Muon's momentum for the matrices it owns. AdamW's gradients are views of the
buckets, which stay between steps. With accumulation they are there twice from the first micro-batch to the last: under
`no_sync` autograd makes gradients of its own beside the buckets, and the last backward pass moves them in. Muon's have
no buckets, and so are there once. (In its first two steps DDP's C++ alone knows of the buckets; `held` names them
after.)
Sends per step: an all-reduce of AdamW's gradients, a reduce-scatter and an all-gather of Muon's matrices, and a number
for the global norm of what Muon's owners hold.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies.base import Settings, TorchEngine, autocast, clip_and_step, global_norm
from strategies.layout import everywhere, on_rank
from strategies.matrices import reduce_to_owners
from strategies.optimizer import IntervalOptimizer, Recipe, Slice
from strategies.owners import Matrix, assign_owners


class DDP(TorchEngine):
    """See the module's docstring and strategies.base.Strategy."""

    name = "ddp"

    def prepare(self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int) -> None:
        place = self.settings.place
        model.to(place.device)
        self.clip, self.accumulation = clip, accumulation
        self.parameters = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        owned = [name for group in recipe if group.rule.whole_matrix for name in group.parameters]
        owners = assign_owners({name: shapes[name] for name in owned}, place.world_size)
        state = {
            name: on_rank(shape, owners[name], place.world_size)
            if name in owners
            else everywhere(shape, place.world_size)
            for name, shape in shapes.items()
        }
        self.matrices = [Matrix(name, shapes[name], state[name], owners[name]) for name in owned]
        self.buckets: list[weakref.ref[Tensor]] = []

        self.model: Any = self._wrapped(model, owned)
        self.optimizer = IntervalOptimizer(model, recipe)
        self.optimizer.bind(
            (Slice(name, shapes[name], state[name], p, replicated=True) for name, p in self.parameters.items()), place
        )

    def _wrapped(self, model: nn.Module, owned: list[str]) -> nn.Module:
        """What averages the gradients of all parameters but those of Muon's matrices, `owned`."""
        device = self.settings.place.device
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, owned)
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # gradients live in the buckets: no second copy of them
        )

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with autocast(self.settings), nullcontext() if last else self.model.no_sync():
            yield

    def step(self, update: bool | Tensor = True) -> float | Tensor:
        mine = self._reduce_matrices()
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self.unscale(list(gradients.values()))
        if self.optimizer.observe:
            self.optimizer.observe("reduce", self.optimizer.gradients(self.optimizer.all_slices()))
        if self.matrices:
            # A matrix's gradient lies with its owner, all others lie on every rank, and there the first one speaks.
            first = self.settings.place.rank == 0
            spoken_for = [gradient for name, gradient in gradients.items() if name in mine or first]
            norm = global_norm(spoken_for, self.settings.place)
        else:  # every rank holds every reduced gradient: nothing to add up
            norm = nn.utils.get_total_norm(list(gradients.values()))
        # DDP keeps its buckets when the gradients in them are cleared. C++ holds them, without a name in Python.
        self.buckets = [weakref.ref(gradient) for name, gradient in gradients.items() if name not in mine]
        return clip_and_step(self.optimizer, list(gradients.values()), norm, self.clip, update, self.loss_scale)

    @torch.no_grad()
    def _reduce_matrices(self) -> set[str]:
        """Reduce-scatter the matrices' gradients to their owners; all others let go of theirs. Returns those owned."""
        gradients: dict[str, Tensor] = {}
        for matrix in self.matrices:
            gradient = self.parameters[matrix.name].grad
            if gradient is None:
                raise RuntimeError(f"{matrix.name} has no gradient: it took no part in the forward pass.")
            gradients[matrix.name] = gradient
        reduced = reduce_to_owners(self.matrices, gradients, self.settings.place)
        for matrix in self.matrices:
            mine = reduced.get(matrix.name)
            self.parameters[matrix.name].grad = None if mine is None else mine.view(matrix.shape)
        return set(reduced)

    def held(self) -> dict[str, list[Tensor]]:
        return {
            "parameters": list(self.parameters.values()),
            "gradients": [
                *(p.grad for p in self.parameters.values() if p.grad is not None),
                *(bucket for view in self.buckets if (bucket := view()) is not None),
            ],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }


def engine(name: str, settings: Settings) -> DDP:
    """For strategies.catalogue."""
    return DDP(settings)
