"""ZeRO-1, -2 and -3 by DeepSpeed: optimizer states, then gradients, then parameters are partitioned.

    ZeRO-1   optimizer states and float32 master weights are cut into N partitions; parameters and gradients stay whole
    ZeRO-2   gradients too: a rank keeps only the part of the reduced gradient that its partition needs
    ZeRO-3   parameters too: they are gathered for the moment of their use

DeepSpeed's engine does all of this; our optimizer is its client optimizer. DeepSpeed hands it flat float32 partitions
whose `.grad` is already reduced, accumulated and clipped, and copies the updated partition back into the model. The
optimizer is bound to the partitions after `deepspeed.initialize`: slices of many parameters lie end to end in one
partition, and a matrix that a boundary cuts in two meets its other half on the owner.

In bf16 DeepSpeed rounds the model first and takes its master weights from that. Ours begin at the initial float32
values, as FSDP's do: masters on bf16's grid would round the first, small updates of a warm-up away in the copies that
the model computes with.

Holds (bf16; float32 in brackets): parameters 2 [4] bytes, all of them in ZeRO-1/2 and 1/N in ZeRO-3 (where
stage3_param_persistence_threshold is set, smaller ones also whole); float32 master weights, 1/N (in float32 too:
DeepSpeed keeps a second copy); gradients 2 [4] bytes; optimizer state 1/N. Sends per step: ZeRO-1 an all-reduce of
gradients at the last micro-batch, ZeRO-2 one at every micro-batch, both an all-gather of parameters; ZeRO-3
all-gathers in forward and backward and a reduce-scatter, at every micro-batch.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strategies.base import Settings
from strategies.layout import Shape, equal_cuts, flat_partition
from strategies.optimizer import IntervalOptimizer, Recipe, Slice
from strategies.zero.defaults import accumulates_float32, replaced_defaults


class ZeRO:
    """What the three stages have in common. See the module's docstring and strategies.base.Strategy."""

    axes: Mapping[str, str] = {}

    def __init__(self, settings: Settings):
        self.settings = settings
        self.name = f"zero{settings.engine['zero_optimization']['stage']}"

    def prepare(self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int) -> None:
        deepspeed = import_deepspeed(self.settings.place.device)
        self.accumulation = accumulation
        names = {id(p): name for name, p in model.named_parameters()}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        initial: dict[str, Tensor] = {}
        if self.settings.precision == "bf16":
            # Not copies: the tensors that the parameters hold until DeepSpeed puts rounded ones in their place.
            initial = {name: p.detach() for name, p in model.named_parameters()}
        self.optimizer = IntervalOptimizer(model, recipe)
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=deepspeed_config(self.settings, sum(p.numel() for p in model.parameters()), clip, accumulation),
            dist_init_required=False,
        )
        self.model = self.engine
        # DeepSpeed partitions in the order of the parameter groups, and the optimizer's groups now hold its partitions.
        slices = self._slices(names, shapes)
        self.optimizer.bind(slices, self.settings.place)
        if initial:
            # DeepSpeed's rounded copies are those of the initial values already: nothing has to be published.
            for piece in slices:
                start, stop = piece.state[self.settings.place.rank]
                self.optimizer.weight(piece).copy_(initial.pop(piece.name).view(-1)[start:stop])

    def _slices(self, names: dict[int, str], shapes: dict[str, Shape]) -> list[Slice]:
        """Where the parameters lie in this rank's float32 partitions. names: by the identity of the parameter."""
        raise NotImplementedError

    def set_accumulation(self, accumulation: int) -> None:
        self.accumulation = self.zero.gradient_accumulation_steps = accumulation
        self.engine.set_train_batch_size(accumulation * self.settings.place.world_size)  # of micro-batches of "1"
        self.engine.micro_steps = 0  # an update is due where these divide by the accumulation, counted from the start

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.engine.train()
        yield
        if not last:
            self.engine.step()  # counts the micro-batch; DeepSpeed updates at the last one, in `step` below

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)  # divides by the accumulation itself: doing it here too would scale twice

    def step(self, update: bool = True) -> float:
        if self.optimizer.observe:
            self.optimizer.observe("reduce", self._reduced_gradients())
        if not update:
            # DeepSpeed's own way of leaving a step out, which it takes by the all-reduced norm: every stage's optimizer
            # lets go of its gradients and changes nothing where that norm is not finite.
            for flat in self._flat_gradients():
                flat.fill_(math.inf)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _flat_gradients(self) -> list[Tensor]:
        """Where this rank's part of the reduced gradient lies."""
        return [g for group in self.zero.averaged_gradients.values() for g in group or []]

    def _flat_gradient(self, group: int) -> Tensor:
        """This rank's part of the reduced gradient of a group (ZeRO-3: of a sub-group), end to end."""
        return torch.cat([g.detach().reshape(-1) for g in self.zero.averaged_gradients[group]])

    def _reduced_gradients(self) -> dict[str, Tensor]:
        """This rank's part of the reduced, unclipped gradient by parameter: what DeepSpeed is about to clip."""
        rank = self.settings.place.rank
        reduced: dict[str, Tensor] = {}
        for index, pieces in enumerate(self.optimizer.slices.values()):
            flat = self._flat_gradient(index)
            for piece in pieces:
                part = flat[piece.offset : piece.offset + piece.state[rank].numel]
                reduced[piece.name] = part.float().clone()
        return reduced

    def publish_weights(self) -> None:
        self.zero.update_lp_params()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        self.engine.eval()
        with torch.no_grad():
            yield
        self.engine.train()

    def held(self) -> dict[str, list[Tensor]]:
        parameters = list(self.engine.module.parameters())
        return {
            "parameters": [p.data for p in parameters],
            "master parameters": [piece[0].holder for piece in self.optimizer.slices.values()],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }


class Flat(ZeRO):
    """ZeRO-1 and -2: one flat buffer per group, of which this rank updates one slice."""

    def _slices(self, names: dict[int, str], shapes: dict[str, Shape]) -> list[Slice]:
        place = self.settings.place
        slices = []
        for group, master in zip(*self._groups_and_masters(), strict=True):
            members = {names[id(p)]: shapes[names[id(p)]] for p in group}
            offset = 0
            for name, intervals in flat_partition(members, place.world_size).items():
                slices.append(Slice(name, shapes[name], intervals, master, offset))
                offset += intervals[place.rank].numel
        return slices

    def _groups_and_masters(self) -> tuple[list[list[nn.Parameter]], list[Tensor]]:
        return self.zero.round_robin_bit16_groups, self.zero.single_partition_of_fp32_groups

    def held(self) -> dict[str, list[Tensor]]:
        zero, result = self.zero, super().held()
        # Reduced already; in ZeRO-2 between micro-batches still as the tensors that the partition is cut from.
        for groups in (zero.averaged_gradients, zero.all_grad_tensors):
            result["gradients"] += [g for group in groups.values() for g in group or []]
        accumulated = [p.grad_accum for p in self.engine.module.parameters()]
        result["gradients"] += [gradient for gradient in accumulated if gradient is not None]
        result["communication buffers"] = [
            buffer for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer if buffer is not None
        ]
        return result


class FlatFloat32(Flat):
    """ZeRO-1 in bf16 with gradients added up in float32: another class of DeepSpeed's, BF16_Optimizer."""

    def _groups_and_masters(self) -> tuple[list[list[nn.Parameter]], list[Tensor]]:
        return self.zero.bf16_groups, self.zero.fp32_groups_flat_partition

    def _flat_gradients(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_gradient_flat_partition)

    def _flat_gradient(self, group: int) -> Tensor:
        return self._flat_gradients()[group]

    def held(self) -> dict[str, list[Tensor]]:
        result = ZeRO.held(self)
        result["gradients"] += self.zero.fp32_groups_gradients_flat
        return result


class Partitioned(ZeRO):
    """ZeRO-3: every parameter cut equally, the cuts of a sub-group end to end, each padded to the same length."""

    def _slices(self, names: dict[int, str], shapes: dict[str, Shape]) -> list[Slice]:
        place = self.settings.place
        slices = []
        for group, master in zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for p in group:
                name = names[id(p)]
                slices.append(Slice(name, shapes[name], equal_cuts(shapes[name], place.world_size), master, offset))
                offset += p.partition_numel()
        return slices

    def publish_weights(self) -> None:
        self.engine.empty_partition_cache()
        for index in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := self.zero.persistent_parameters:
            persistent[0].all_gather(persistent)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        hook = self.engine.module.register_forward_hook(self._forget_order)
        with super().evaluation():
            yield
        hook.remove()
        self.engine.empty_partition_cache()  # no backward pass follows that would want what is gathered

    def _forget_order(self, *_: Any) -> None:
        """ZeRO-3 records in which order modules use parameters, and plans by it what to gather and what to keep.

        An order recorded in an evaluation, before any training, misleads it: it gathers everything twice from then on.
        """
        coordinator = self.zero.parameter_offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()

    def held(self) -> dict[str, list[Tensor]]:
        zero, result, parameters = self.zero, super().held(), list(self.engine.module.parameters())
        result["parameters"] = [p.ds_tensor for p in parameters] + [p.data for p in parameters if p.numel()]
        result["gradients"].append(zero.grad_partitions_flat_buffer)
        result["communication buffers"] = [b.buffer for b in zero.ipg_buckets.values() if b.buffer is not None]
        return result


def engine(name: str, settings: Settings) -> ZeRO:
    """For strategies.catalogue. The settings' stage says which."""
    stage = int(settings.engine["zero_optimization"]["stage"])
    if stage == 3:
        return Partitioned(settings)
    float32 = stage == 1 and accumulates_float32(settings.precision, settings.engine)
    return FlatFloat32(settings) if float32 else Flat(settings)


def deepspeed_config(settings: Settings, parameters: int, clip: float, accumulation: int) -> dict[str, Any]:
    """The engine's configuration: what the accelerate config says, completed where it leaves things open.

    parameters: elements of the model, on which some defaults depend (strategies/zero/defaults.py).
    """
    config = {key: value for key, value in settings.engine.items() if value != "auto"}
    zero = {key: value for key, value in config.get("zero_optimization", {}).items() if value != "auto"}
    for key, value in replaced_defaults(parameters).items():
        if int(zero["stage"]) == 3 or not key.startswith("stage3_"):
            zero.setdefault(key, value)
    config["zero_optimization"] = zero
    config.pop("train_batch_size", None)
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # only ever multiplied for DeepSpeed's own throughput figures
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {**config.get("bf16", {}), "enabled": settings.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return config


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, quietly and for this device. Raises ValueError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"ZeRO needs DeepSpeed, which is not installed here ({error}); it has Linux wheels: pip install deepspeed, "
            "or use accelerate_configs/fsdp.yaml, which shards the same things with torch alone."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # A compiled shared-memory collective that needs ninja and g++ at the first start; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
