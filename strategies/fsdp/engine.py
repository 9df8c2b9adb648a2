"""FSDP2: every parameter is sharded by rows; a block's parameters are gathered just before they are used.

torch's `fully_shard` on every block and on the root. Forward: all-gather a block's parameters, compute, let them go
(reshard_after_forward: true) or keep them for backward (false), or keep a share of them that is whole within a group of
so many neighbours (a number). Backward: all-gather again where needed, compute gradients, reduce-scatter them, so that
every rank keeps the rows it owns. During accumulation the reduce-scatter is held back, for which each rank keeps
unsharded gradients between micro-batches.

Holds: 1/N of parameters, gradients and optimizer state, in float32; rows that do not divide make the first ranks'
shards larger. In bf16 and fp16 the gathered parameters are that, and gradients are reduced in float32: accelerate's own
policy would reduce and accumulate in 16 bits, which in bf16 costs six times the error for half the bytes.
A model on the meta device is cut there. Then this rank's rows alone get memory, and their initial values. Nothing is
sent for it, and the whole model is never in a rank's memory, nor in the host's.

Sends per step: all-gather of all parameters in forward and, when resharded, again in backward, for every micro-batch;
one reduce-scatter of gradients; for Muon at most 2/N of the block matrices by all-to-all.

With `fsdp_offload_params` (CPUOffloadPolicy) all three lie in host memory. A rank's rows of a block are copied to the
device just before the block is gathered, its rows of the reduced gradients back right after they are there, and the
optimizer works on the CPU; Muon's matrices still meet on the device. Over PCIe go 4/N bytes per parameter for every
gather, 4/N of gradients once a step, and Muon's pieces there and back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from strategies.base import COMPUTE_DTYPES, Settings, TorchEngine, clip_and_step, global_norm
from strategies.errors import UserError
from strategies.layout import row_blocks
from strategies.mesh import Mesh, Place
from strategies.optimizer import IntervalOptimizer, Recipe, Slice, local
from strategies.start import Initial, fill_held, on_meta, required


class FSDP(TorchEngine):
    """See the module's docstring and strategies.base.Strategy."""

    name = "fsdp"

    def _mesh(self) -> DeviceMesh:
        """The ranks, as fully_shard wants them."""
        place = self.settings.place
        return init_device_mesh(place.device.type, (place.world_size,))

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        mesh = self._mesh()
        place, engine = self.settings.place, self.settings.engine
        self.offloads = bool(engine.get("offload", False))
        empty = on_meta(model)
        # Offloaded, fully_shard moves it, a block at a time, and what is sharded goes back.
        if not self.offloads and not empty:
            model.to(place.device)
        self.clip, self.accumulation = clip, accumulation
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.optimizer = IntervalOptimizer(model, recipe)
        policy = MixedPrecisionPolicy()
        if self.settings.precision != "fp32":
            policy = MixedPrecisionPolicy(COMPUTE_DTYPES[self.settings.precision], reduce_dtype=torch.float32)
        # Copies to and from pinned memory run beside the computation. Without a GPU there is nothing to pin for.
        pinned = place.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.offloads else OffloadPolicy()
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
        classes = {type(module).__name__ for module in model.modules()}
        if missing := [name for name in engine["wrap"] if name not in classes]:
            raise UserError(
                f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing)}, but the model has no such "
                "module; write Block."
            )
        # The root is wrapped in any case, below.
        wrapped = [module for module in model.modules() if type(module).__name__ in engine["wrap"]]
        wrapped = [module for module in wrapped if module is not model]
        for module in reversed(wrapped):  # from the inside: what a wrapped module inside holds is not the outer one's
            fully_shard(module, reshard_after_forward=engine["reshard_after_forward"], **options)
        # The root holds what no block holds (embedding, head). Backward begins where forward ended, so letting its
        # parameters go in between would gather the same ones twice in a row.
        fully_shard(model, reshard_after_forward=False, **options)
        self.model: nn.Module = model
        self.axes = {**self.axes, **{name: "reshard" for name in self._groups_after_forward()}}
        # fully_shard has put DTensors in the place of the parameters: the optimizer must hold those.
        if empty:  # what was cut on the meta device: this rank's rows alone get memory
            self.model.to_empty(device="cpu" if self.offloads else place.device)
        sharded = dict(self.model.named_parameters())
        self.shards = list(sharded.values())  # the model itself shows gathered ones now and then
        for group, recipe_group in zip(self.optimizer.param_groups, recipe, strict=True):
            group["params"] = [sharded[name] for name in recipe_group.parameters]
        self.optimizer.bind(
            (Slice(name, shape, row_blocks(shape, place.world_size), sharded[name]) for name, shape in shapes.items()),
            place,
        )
        if empty:
            fill_held(self.optimizer, required(initial))

    def _groups_after_forward(self) -> set[str]:
        """Names of the process groups over which units lie between the passes, where those are smaller ones."""
        states = [module._get_fsdp_state() for module in self.model.modules() if isinstance(module, FSDPModule)]
        units: list[Any] = [state._fsdp_param_group for state in states if state._fsdp_param_group]
        smaller = [unit.post_forward_mesh_info for unit in units if unit._use_post_forward_mesh]
        return {mesh.shard_process_group.group_name for mesh in smaller}

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield

    def step(self, update: bool | Tensor = True) -> float | Tensor:
        gradients = [local(p.grad) for p in self.shards if p.grad is not None]
        self.unscale(gradients)
        if self.optimizer.observe:
            self.optimizer.observe("reduce", self.optimizer.gradients(self.optimizer.all_slices()))
        norm = global_norm(gradients, self.settings.place)
        return clip_and_step(self.optimizer, gradients, norm, self.clip, update, self.loss_scale)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        with torch.no_grad():
            yield
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # no backward pass follows that would let go of the root's parameters

    def _shards_held(self) -> dict[str, list[Tensor]]:
        return {
            "parameters": [local(p) for p in self.shards],
            "gradients": [local(p.grad) for p in self.shards if p.grad is not None],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }

    def offloaded(self) -> dict[str, list[Tensor]]:
        return self._shards_held() if self.offloads else {}

    def held(self) -> dict[str, list[Tensor]]:
        held = self._shards_held()
        for module in self.model.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            for gathered in group.fsdp_params if group else []:
                # Gathered parameters have a storage of zero bytes while they are let go. Unsharded gradients exist
                # between the micro-batches of a step; in 16 bits as a float32 copy, the sum so far.
                held["parameters"] += gathered.all_gather_outputs
                between = getattr(gathered, "_sharded_post_forward_param_data", None)
                held["parameters"] += [between] if between is not None else []
                unsharded = getattr(gathered, "_unsharded_param", None)
                for gradient in (unsharded is not None and unsharded.grad, gathered.unsharded_accumulated_grad):
                    if isinstance(gradient, Tensor):
                        held["gradients"].append(gradient)
        return held


class HSDP(FSDP):
    """FSDP2 within replicas: groups of neighbouring ranks, each of which holds everything once.

    A mesh of two axes says so to fully_shard. Gathers and reduce-scatters stay within a replica ("shard"); what a rank
    then holds of the gradients is all-reduced over the ranks that hold the same rows ("replicate"). So every replica
    has the same gradients, and Muon's exchange and the global norm stay within it too. Where the links between machines
    are slower than those within, only the all-reduce crosses them: 2/S of the parameters for S ranks that shard.
    """

    name = "hsdp"

    def _mesh(self) -> DeviceMesh:
        of_all, replicas = self.settings.place, int(self.settings.engine["replicas"])
        shards = of_all.world_size // replicas
        ranks = Mesh((("replicate", replicas), ("shard", shards)))
        mesh = init_device_mesh(of_all.device.type, (replicas, shards), mesh_dim_names=ranks.axes)
        self.axes = {mesh[axis].get_group().group_name: axis for axis in ranks.axes}
        here = ranks.coordinate(of_all.rank)
        group = mesh["shard"].get_group()
        place = Place(here["shard"], shards, of_all.device, group, here["replicate"], replicas)
        self.settings = replace(self.settings, place=place)
        return mesh


def engine(name: str, settings: Settings) -> FSDP:
    """For strategies.catalogue."""
    return HSDP(settings) if name == "hsdp" else FSDP(settings)
