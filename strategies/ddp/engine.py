"""DDP: every rank holds the whole model and a part of the batch; gradients are averaged during backward.

torch's DistributedDataParallel does it: gradients go into buckets, and a bucket is all-reduced as soon as it is full,
while the backward pass goes on. During accumulation `no_sync` holds the all-reduce back until the last micro-batch.

Muon under DDP. Every rank would orthogonalise the same matrices; instead each block matrix has an owner. Its gradient
stays out of DDP's buckets and is reduce-scattered to the owner at the step, the owner alone keeps its momentum and
transforms it, and the update is all-gathered. On a ring an all-reduce *is* a reduce-scatter and an all-gather, so the
wire carries the same bytes as before, the work per rank falls to 1/N, and so does the memory of the momentum.

AdamW where its recipe says `sharded` (the records' presets): a large parameter is cut into equal parts, one for each
rank. Its gradient stays out of the buckets too and is reduce-scattered, every rank updates its part, with moments for
that alone, and the parts are all-gathered into the parameter.

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
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies.base import Settings, TorchEngine, autocast, clip_and_step, global_norm
from strategies.layout import equal_cuts, everywhere, on_rank
from strategies.matrices import reduce_to_owners
from strategies.optimizer import IntervalOptimizer, Recipe, Slice
from strategies.owners import Matrix, assign_owners, is_cut
from strategies.start import Initial, begin


class DDP(TorchEngine):
    """See the module's docstring and strategies.base.Strategy."""

    name = "ddp"

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        place = self.settings.place
        begin(model, initial, place.device)
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
        cut = {
            name
            for group in recipe
            if group.options.get("sharded") and not group.rule.whole_matrix
            for name in group.parameters
            if is_cut(shapes[name], place.world_size)
        }
        state |= {name: equal_cuts(shapes[name], place.world_size) for name in cut}
        self.parts = {name: _part(self.parameters[name], *state[name][place.rank]) for name in sorted(cut)}
        """Of the parameters that are cut this rank's elements, as views of them."""
        self.matrices = [Matrix(name, shapes[name], state[name], owners[name]) for name in owned]
        self.buckets: list[weakref.ref[Tensor]] = []

        self.model: Any = self._wrapped(model, [*owned, *self.parts])
        self.optimizer = IntervalOptimizer(model, recipe)
        holders = {**self.parameters, **self.parts}
        for group, of_recipe in zip(self.optimizer.param_groups, recipe, strict=True):
            group["params"] = [holders[name] for name in of_recipe.parameters]
        self.optimizer.bind(
            (Slice(name, shapes[name], state[name], p, replicated=name not in cut) for name, p in holders.items()),
            place,
        )

    def _wrapped(self, model: nn.Module, apart: list[str]) -> nn.Module:
        """What averages the gradients of all parameters but `apart`: Muon's matrices, and what is cut. Where that is
        all there is, the model itself: DistributedDataParallel wants something to do."""
        if len(apart) == len(self.parameters):
            return model
        device = self.settings.place.device
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, apart)
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # gradients live in the buckets: no second copy of them
        )

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        alone = last or not isinstance(self.model, DistributedDataParallel)
        with autocast(self.settings), nullcontext() if alone else self.model.no_sync():
            yield

    def step(self, update: bool | Tensor = True) -> float | Tensor:
        mine = self._reduce_matrices() | self._reduce_parts()
        holders = {**self.parameters, **self.parts}
        gradients = {name: p.grad for name, p in holders.items() if p.grad is not None}
        self.unscale(list(gradients.values()))
        if self.optimizer.observe:
            self.optimizer.observe("reduce", self.optimizer.gradients(self.optimizer.all_slices()))
        if self.matrices or self.parts:
            # A matrix's gradient lies with its owner, a part with its rank, all others on every rank: the first speaks.
            first = self.settings.place.rank == 0
            spoken_for = [gradient for name, gradient in gradients.items() if name in mine or first]
            norm = global_norm(spoken_for, self.settings.place)
        else:  # every rank holds every reduced gradient: nothing to add up
            norm = nn.utils.get_total_norm(list(gradients.values()))
        # DDP keeps its buckets when the gradients in them are cleared. C++ holds them, without a name in Python.
        self.buckets = [weakref.ref(gradient) for name, gradient in gradients.items() if name not in mine]
        norm_or_number = clip_and_step(
            self.optimizer, list(gradients.values()), norm, self.clip, update, self.loss_scale
        )
        self.publish_weights()
        return norm_or_number

    @torch.no_grad()
    def _reduce_parts(self) -> set[str]:
        """Reduce-scatter the gradients of what is cut. Returns their names."""
        ranks = self.settings.place.world_size
        for name, part in self.parts.items():
            whole = self.parameters[name]
            if whole.grad is None:
                raise RuntimeError(f"{name} has no gradient: it took no part in the forward pass.")
            part.grad = torch.empty_like(part)
            dist.reduce_scatter_tensor(part.grad, whole.grad.view(-1), group=self.settings.place.group)
            part.grad.div_(ranks)
            whole.grad = None
        return set(self.parts)

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Bring the parts of all ranks together, in the parameters that they are parts of."""
        for name, part in self.parts.items():
            whole = self.parameters[name].detach().view(-1)
            dist.all_gather_into_tensor(whole, part.detach(), group=self.settings.place.group)

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
                *(p.grad for p in (*self.parameters.values(), *self.parts.values()) if p.grad is not None),
                *(bucket for view in self.buckets if (bucket := view()) is not None),
            ],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }


def _part(parameter: Tensor, start: int, stop: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().view(-1)[start:stop])


def engine(name: str, settings: Settings) -> DDP:
    """For strategies.catalogue."""
    return DDP(settings)
