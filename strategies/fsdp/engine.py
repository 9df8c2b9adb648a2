"""FSDP2: every parameter is sharded by rows; a block's parameters are gathered just before they are used.

torch's `fully_shard` on every block and on the root. Forward: all-gather a block's parameters, compute, let them go
(reshard_after_forward: true) or keep them for backward (false). Backward: all-gather again where needed, compute
gradients, reduce-scatter them, so that every rank keeps the rows it owns. During accumulation the reduce-scatter is
held back, for which each rank keeps unsharded gradients between micro-batches.

Holds: 1/N of parameters, gradients and optimizer state, in float32; rows that do not divide make the first ranks'
shards larger. In bf16 the gathered parameters are bf16 and gradients are reduced in float32: accelerate's own policy
would reduce and accumulate in bf16, which costs six times the error for half the bytes.
Sends per step: all-gather of all parameters in forward and, when resharded, again in backward, for every micro-batch;
one reduce-scatter of gradients; for Muon at most 2/N of the block matrices by all-to-all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from strategies.base import Settings, TorchEngine, clip_and_step, global_norm
from strategies.layout import row_blocks
from strategies.mesh import Mesh, Place
from strategies.optimizer import IntervalOptimizer, Recipe, Slice, local


class FSDP(TorchEngine):
    """See the module's docstring and strategies.base.Strategy."""

    name = "fsdp"

    def _mesh(self) -> DeviceMesh:
        """The ranks, as fully_shard wants them."""
        place = self.settings.place
        return init_device_mesh(place.device.type, (place.world_size,))

    def prepare(self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int) -> None:
        mesh = self._mesh()
        place, engine = self.settings.place, self.settings.engine
        model.to(place.device)
        self.clip, self.accumulation = clip, accumulation
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.optimizer = IntervalOptimizer(model, recipe)
        if self.settings.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        else:
            policy = MixedPrecisionPolicy()
        wrapped = [module for module in model.modules() if type(module).__name__ in engine["wrap"]]
        if engine["wrap"] and not wrapped:
            raise ValueError(
                f"fsdp_transformer_layer_cls_to_wrap names {', '.join(engine['wrap'])}, but the model has no such "
                "module; write Block."
            )
        for module in reversed(wrapped):  # from the inside: what a wrapped module inside holds is not the outer one's
            fully_shard(module, mesh=mesh, reshard_after_forward=engine["reshard_after_forward"], mp_policy=policy)
        # The root holds what no block holds (embedding, head). Backward begins where forward ended, so letting its
        # parameters go in between would gather the same ones twice in a row.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        self.model: nn.Module = model
        # fully_shard has put DTensors in the place of the parameters: the optimizer must hold those.
        sharded = dict(self.model.named_parameters())
        self.shards = list(sharded.values())  # the model itself shows gathered ones now and then
        for group, recipe_group in zip(self.optimizer.param_groups, recipe, strict=True):
            group["params"] = [sharded[name] for name in recipe_group.parameters]
        self.optimizer.bind(
            (Slice(name, shape, row_blocks(shape, place.world_size), sharded[name]) for name, shape in shapes.items()),
            place,
        )

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield

    def step(self, update: bool = True) -> float:
        if self.optimizer.observe:
            self.optimizer.observe("reduce", self.optimizer.gradients(self.optimizer.all_slices()))
        gradients = [local(p.grad) for p in self.shards if p.grad is not None]
        norm = global_norm(gradients, self.settings.place)
        return clip_and_step(self.optimizer, gradients, norm, self.clip, update)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        with torch.no_grad():
            yield
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # no backward pass follows that would let go of the root's parameters

    def held(self) -> dict[str, list[Tensor]]:
        held = {
            "parameters": [local(p) for p in self.shards],
            "gradients": [local(p.grad) for p in self.shards if p.grad is not None],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }
        for module in self.model.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            for gathered in group.fsdp_params if group else []:
                # Gathered parameters have a storage of zero bytes while they are let go. Unsharded gradients exist
                # between the micro-batches of a step; in bf16 as a float32 copy, the sum so far.
                held["parameters"] += gathered.all_gather_outputs
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
