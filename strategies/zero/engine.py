"""ZeRO-1, -2 and -3 by DeepSpeed: optimizer states, then gradients, then parameters are partitioned.

    ZeRO-1   optimizer states and float32 master weights are cut into N partitions; parameters and gradients stay whole
    ZeRO-2   gradients too: a rank keeps only the part of the reduced gradient that its partition needs
    ZeRO-3   parameters too: they are gathered for the moment of their use

DeepSpeed's engine does all of this; our optimizer is its client optimizer. DeepSpeed hands it flat float32 partitions
whose `.grad` is already reduced, accumulated and clipped, and copies the updated partition back into the model. The
optimizer is bound to the partitions after `deepspeed.initialize`: slices of many parameters lie end to end in one
partition, and a matrix that a boundary cuts in two meets its other half on the owner.

A model on the meta device gets memory here: in ZeRO-1 and -2, which keep whole parameters, all of it on every rank; in
ZeRO-3 one parameter at a time, of which this rank's cut stays (strategies/zero/cut.py).

In bf16 and fp16 DeepSpeed rounds the model first and takes its master weights from that. Ours begin at the initial
float32 values, as FSDP's do: masters on bf16's grid would round the first, small updates of a warm-up away in the
copies that the model computes with.

Holds (bf16 and fp16; float32 in brackets): parameters 2 [4] bytes, all of them in ZeRO-1/2 and 1/N in ZeRO-3 (where
stage3_param_persistence_threshold is set, smaller ones also whole); float32 master weights, 1/N (in float32 too:
DeepSpeed keeps a second copy); gradients 2 [4] bytes; optimizer state 1/N. Sends per step: ZeRO-1 an all-reduce of
gradients at the last micro-batch, ZeRO-2 one at every micro-batch, both an all-gather of parameters; ZeRO-3
all-gathers in forward and backward and a reduce-scatter, at every micro-batch.

Offload (strategies/zero/offload.py). `offload_optimizer: {device: cpu}`: masters, their float32 gradients and optimizer
state lie in host memory, and our optimizer runs there; Muon's matrices still meet on the device. Over PCIe go, per
step and rank, 1/N of the gradients (in ZeRO-2 and -3 at every micro-batch, from the second on there and back) and 1/N
of the updated parameters. `offload_param: {device: cpu}`, ZeRO-3 alone: this rank's cuts lie there too and go to the
device for every gather. What DeepSpeed keeps beside that: in ZeRO-1 and -2 a buffer for the largest gradient on either
side, and one on the host for its slice of parameters in the model's dtype.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strategies.base import COMPUTE_DTYPES, Settings
from strategies.config_values import ConfigError
from strategies.errors import UserError
from strategies.layout import Shape, equal_cuts, flat_partition, flat_partition_size, flat_starts
from strategies.loss_scale import LossScale
from strategies.optimizer import IntervalOptimizer, Recipe, Slice
from strategies.start import Initial, begin, fill_held, on_meta, required
from strategies.zero.completed import deepspeed_config
from strategies.zero.cut import cut
from strategies.zero.defaults import alignment, is_bf16_optimizer
from strategies.zero.loss_scale import take_over
from strategies.zero.offload import check_offload, offloads_optimizer, offloads_parameters


class ZeRO:
    """What the three stages have in common. See the module's docstring and strategies.base.Strategy."""

    axes: Mapping[str, str] = {}

    def __init__(self, settings: Settings):
        self.settings = settings
        self.loss_scale: LossScale | None = None
        self.offloads = offloads_optimizer(settings.engine)
        self.name = f"zero{settings.engine['zero_optimization']['stage']}"

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        check_offload(self.settings.engine, self.settings.precision)
        deepspeed = import_deepspeed(self.settings.place.device)
        self.accumulation = accumulation
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        config = deepspeed_config(self.settings, sum(p.numel() for p in model.parameters()), clip, accumulation)
        values = required(initial) if on_meta(model) else None
        before: dict[str, Tensor] = {}
        if self.settings.precision != "fp32" and not values:
            # Not copies: the tensors that the parameters hold until DeepSpeed puts rounded ones in their place.
            before = {name: p.detach() for name, p in model.named_parameters()}
        if values:
            with self._refusals():
                self._begin(deepspeed, model, values, config)
        names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = IntervalOptimizer(model, recipe)
        with self._refusals():
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=config, dist_init_required=False
            )
        self._check_engine()
        self.loss_scale = take_over(self.zero) if self.settings.precision == "fp16" else None
        self.model = self.engine
        # DeepSpeed partitions in the order of the parameter groups, and the optimizer's groups now hold its partitions.
        slices = self._slices(names, shapes)
        self.optimizer.bind(slices, self.settings.place)
        # DeepSpeed's rounded copies are those of the initial values already: nothing has to be published.
        if values and self.settings.precision != "fp32":
            fill_held(self.optimizer, values)
        for piece in slices if before else ():
            start, stop = piece.state[self.settings.place.rank]
            self.optimizer.weight(piece).copy_(before.pop(piece.name).view(-1)[start:stop])

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """What DeepSpeed says against its settings is a ConfigError that names the file."""
        try:
            yield
        except (ValueError, TypeError, AssertionError, NotImplementedError, _config_error()) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{self.settings.config}: DeepSpeed stops at its settings: {why.rstrip('.')}.") from error

    def _begin(self, deepspeed: Any, model: nn.Module, values: Initial, config: dict[str, Any]) -> None:
        """Give a model on the meta device memory and values, in the dtype that it computes in."""
        begin(model, values, self.settings.place.device, COMPUTE_DTYPES[self.settings.precision])

    def _check_engine(self) -> None:
        """Raises RuntimeError where the engine is not what was announced: one that is something else trains all the
        same, and looks like success.
        """
        zero = self.engine._config.zero_config
        found = {
            "stage": int(self.engine.zero_optimization_stage()),
            "bf16": bool(self.engine.bfloat16_enabled()),
            "fp16": bool(self.engine.fp16_enabled()),
            "torch_autocast": bool(self.engine._config.torch_autocast_enabled),
            "offload_optimizer": bool(zero.offload_optimizer and zero.offload_optimizer.device != "none"),
            "offload_param": bool(zero.offload_param and zero.offload_param.device != "none"),
        }
        announced = {
            "stage": self.settings.engine["zero_optimization"]["stage"],
            "bf16": self.settings.precision == "bf16",
            "fp16": self.settings.precision == "fp16",
            "torch_autocast": False,
            "offload_optimizer": self.offloads,
            "offload_param": offloads_parameters(self.settings.engine),
        }
        if found != announced:
            raise RuntimeError(f"DeepSpeed runs with {found}, and {announced} was asked for")

    def _slices(self, names: dict[int, str], shapes: dict[str, Shape]) -> list[Slice]:
        """Where the parameters lie in this rank's float32 partitions. names: by the identity of the parameter."""
        raise NotImplementedError

    def set_accumulation(self, accumulation: int) -> None:
        self.accumulation = self.zero.gradient_accumulation_steps = accumulation
        self.engine.set_train_batch_size(accumulation * self.settings.place.world_size)  # of micro-batches of "1"
        if self.offloads and self.name != "zero3":
            self.zero.accumulated_grads_in_cpu.clear()  # sums of micro-batches, which a step of one has no use for
        self.engine.micro_steps = 0  # an update is due where these divide by the accumulation, counted from the start

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.engine.train()
        yield
        if not last:
            self.engine.step()  # counts the micro-batch; DeepSpeed updates at the last one, in `step` below

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)  # divides by the accumulation and scales by itself: not twice

    def step(self, update: bool | Tensor = True) -> float:
        if self.optimizer.observe:
            self.optimizer.observe("reduce", self._reduced_gradients())
        if not update:
            # DeepSpeed's own way of leaving a step out, which it takes by the all-reduced norm: every stage's optimizer
            # lets go of its gradients and changes nothing where that norm is not finite.
            for found in self._found():
                found.fill_(math.inf)
        self.engine.step()
        if update and self.loss_scale:
            self.loss_scale.update(overflow=self.zero.overflow)
        return float(self.engine.get_global_grad_norm())

    def _found(self) -> Iterable[Tensor]:
        """What DeepSpeed takes the global norm from: where it offloads, norms that it has computed on the way there."""
        return self.zero.norm_for_param_grads.values() if self.offloads else self._flat_gradients()

    def _flat_gradients(self) -> list[Tensor]:
        """Where this rank's part of the reduced gradient lies."""
        return [g for group in self.zero.averaged_gradients.values() for g in group or []]

    def _flat_gradient(self, group: int) -> Tensor:
        """This rank's part of the reduced gradient of a group (ZeRO-3: of a sub-group), end to end."""
        return torch.cat([g.detach().reshape(-1) for g in self.zero.averaged_gradients[group]])

    def _reduced_gradients(self) -> dict[str, Tensor]:
        """This rank's part of the reduced, unclipped gradient by parameter: what DeepSpeed is about to clip."""
        rank, device = self.settings.place.rank, self.settings.place.device
        scale = self.loss_scale.value if self.loss_scale else 1.0
        reduced: dict[str, Tensor] = {}
        if self.offloads and device.type == "cuda":
            torch.cuda.synchronize(device)  # gradients may still be on their way to the host
        for index, pieces in enumerate(self.optimizer.slices.values()):
            flat = pieces[0].holder.grad if self.offloads else self._flat_gradient(index)
            assert flat is not None
            for piece in pieces:
                part = flat[piece.offset : piece.offset + piece.state[rank].numel]
                reduced[piece.name] = part.float() / scale
        return reduced

    def publish_weights(self) -> None:
        self.zero.update_lp_params()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        self.engine.eval()
        with torch.no_grad():
            yield
        self.engine.train()

    def _optimizers_held(self) -> dict[str, list[Tensor]]:
        """What lies in host memory where the optimizer does: its gradients stay allocated only there."""
        masters = [pieces[0].holder for pieces in self.optimizer.slices.values()]
        return {
            "master parameters": masters,
            "gradients": [master.grad for master in masters if master.grad is not None],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }

    def offloaded(self) -> dict[str, list[Tensor]]:
        return self._optimizers_held() if self.offloads else {}

    def held(self) -> dict[str, list[Tensor]]:
        parameters, ours = list(self.engine.module.parameters()), self._optimizers_held()
        ours["gradients"] += [p.grad for p in parameters if p.grad is not None]
        return {"parameters": [p.data for p in parameters], **ours}


class Flat(ZeRO):
    """ZeRO-1 and -2: one flat buffer per group, of which this rank updates one slice."""

    def _slices(self, names: dict[int, str], shapes: dict[str, Shape]) -> list[Slice]:
        place, align = self.settings.place, self._align()
        slices = []
        for group, master in zip(*self._groups_and_masters(), strict=True):
            members = {names[id(p)]: shapes[names[id(p)]] for p in group}
            starts = flat_starts([p.numel() for p in group], align)
            first = place.rank * flat_partition_size([p.numel() for p in group], place.world_size, align)
            for (name, cuts), start in zip(
                flat_partition(members, place.world_size, align).items(), starts, strict=False
            ):
                offset = max(start - first, 0) if cuts[place.rank].numel else 0
                slices.append(Slice(name, shapes[name], cuts, master, offset))
        return slices

    def _align(self) -> int:
        """Elements at a multiple of which every parameter begins in its flat buffer."""
        return alignment(self.settings.precision, self.settings.engine)

    def _groups_and_masters(self) -> tuple[list[list[nn.Parameter]], list[Tensor]]:
        return self.zero.round_robin_bit16_groups, self.zero.single_partition_of_fp32_groups

    def offloaded(self) -> dict[str, list[Tensor]]:
        result = super().offloaded()
        if self.offloads:
            zero = self.zero
            # Sums of micro-batches, one whole gradient for every parameter that the slice touches. They stay.
            result["gradients"] += zero.accumulated_grads_in_cpu.values()
            staged = zero.param_buffer_of_bit16_for_cpu_offload_groups
            result["communication buffers"] = [zero.temp_grad_buffer_for_cpu_offload, *staged]
        return result

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
        if self.offloads:
            on_host = self.offloaded()
            result["gradients"] += on_host["gradients"]
            buffers = [zero.temp_grad_buffer_for_gpu_offload, *on_host["communication buffers"]]
            result["communication buffers"] += buffers
        return result


class FlatFloat32(Flat):
    """ZeRO-1 in bf16 with gradients added up in float32: another class of DeepSpeed's, BF16_Optimizer."""

    def _align(self) -> int:
        return 1  # it has its own flat buffers, without parameter_alignment

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

    def _begin(self, deepspeed: Any, model: nn.Module, values: Initial, config: dict[str, Any]) -> None:
        place, dtype = self.settings.place, COMPUTE_DTYPES[self.settings.precision]
        cut(deepspeed, model, values, place, dtype, config)

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

    def offloaded(self) -> dict[str, list[Tensor]]:
        result = super().offloaded()
        if self.offloads:
            result["gradients"].append(self.zero.grad_partitions_flat_buffer)
        if offloads_parameters(self.settings.engine):
            result["parameters"] = [p.ds_tensor for p in self.engine.module.parameters()]
        return result

    def held(self) -> dict[str, list[Tensor]]:
        zero, result, parameters = self.zero, super().held(), list(self.engine.module.parameters())
        result["parameters"] = [p.ds_tensor for p in parameters] + [p.data for p in parameters if p.numel()]
        result["parameters"] += [p.ds_secondary_tensor for p in parameters if p.ds_secondary_tensor is not None]
        result["gradients"].append(zero.grad_partitions_flat_buffer)
        result["communication buffers"] = [b.buffer for b in zero.ipg_buckets.values() if b.buffer is not None]
        return result


def engine(name: str, settings: Settings) -> ZeRO:
    """For strategies.catalogue. The settings' stage says which."""
    stage = int(settings.engine["zero_optimization"]["stage"])
    if stage == 3:
        return Partitioned(settings)
    return FlatFloat32(settings) if is_bf16_optimizer(stage, settings.precision, settings.engine) else Flat(settings)


def _config_error() -> type[Exception]:
    from deepspeed.runtime.config import DeepSpeedConfigError

    return DeepSpeedConfigError  # type: ignore[no-any-return]


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, quietly and for this device. Raises ValueError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"ZeRO needs DeepSpeed, which is not installed here ({error}); it has Linux wheels: pip install deepspeed, "
            "or use accelerate_configs/fsdp.yaml, which shards the same things with torch alone."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # A compiled shared-memory collective that needs ninja and g++ at the first start; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
