"""One step of the trainer counted on a GPU that is not there: launches, bytes and waits. See benchmarks/launches.py."""

import contextlib
import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.launches_device import backend, hopper, paused, uncounted
from speedrun.config import Config
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from speedrun.optim.schedule import forward_options
from speedrun.run.command_line import parse
from speedrun.stages import resolve_stages
from speedrun.train import set_schedules
from strategies import catalogue
from strategies.base import Settings
from strategies.ledger.wire import COLLECTIVES
from strategies.mesh import Place

SHARE = 8
"""The batch is divided by so many, as one of eight GPUs has it, whether the strategy has eight ranks or one."""

FREE = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "detach_", "alias",
    "lift_fresh", "_unsafe_view", "resize_", "set_", "record_stream", "is_same_size",
}  # fmt: skip
"""Operators without a kernel, beside views."""

SEVERAL = {"embedding_dense_backward": 6, "sort": 3, "argsort": 3, "index_put_": 6, "cummax": 2}
"""Operators of more than one kernel → how many (about: they sort). Every other one counts once."""

LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors that one launch of a foreach kernel takes at most, by how many lists it walks (MultiTensorApply.cuh)."""
CHUNK, CHUNKS = 65_536, 320
"""Elements of a piece of work, and pieces of one launch."""


@dataclasses.dataclass
class Counts:
    """Of one part of a step."""

    launches: int = 0
    moved: int = 0
    """Bytes that kernels read and write, every operand once."""
    waits: Counter[str] = dataclasses.field(default_factory=Counter)
    """What waits for the device, by operator."""
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    """Bytes by collective."""
    operators: Counter[str] = dataclasses.field(default_factory=Counter)
    """Launches by operator; generated code under one name."""


class Counting(TorchDispatchMode):
    """Counts what is asked of the device. Compiled code is told by its backend, and is not looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else torch.compile would leave everything uncompiled

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def compiled(self, launches: int, moved: int) -> None:
        """A call of generated code."""
        self.add("generated code", launches, moved)

    def add(self, name: str, launches: int, moved: int) -> None:
        self.counts.launches += launches
        self.counts.operators[name] += launches
        self.counts.moved += moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname if hasattr(func, "_opname") else str(func)
        there = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "cuda"]
        if paused() or getattr(func, "namespace", "") == "prim":
            return func(*args, **kwargs)
        if name == "_local_scalar_dense" and there:
            self.counts.waits["item"] += 1
            return 1.0 if args[0].is_floating_point() else 0
        if name == "nonzero" and there:
            self.counts.waits[name] += 1
            return torch.empty((2, args[0].ndim), dtype=torch.int64, device="cuda")
        if name in ("_to_copy", "to") and not there and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            self.add("copy to the device", 1, 2 * _bytes(list(args[:1])))
            with uncounted():  # a number that is known would be copied for real
                return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cuda")
        if func.namespace == "speedrun" and name == "cross_entropy_and_gradients":
            return self._inside_of_the_loss(*args)
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if func.namespace == "c10d":
            self._send(name, args)
        elif there and made and all(t.device.type == "cpu" for t in made) and not kwargs.get("non_blocking"):
            self.counts.waits[f"{name} to the host"] += 1
        elif (there or any(t.device.type == "cuda" for t in made)) and name not in FREE and not func.is_view:
            self.add(name, self._launches(name, args), _bytes(list({id(t): t for t in (*there, *made)}.values())))
        return result

    def _launches(self, name: str, args: Any) -> int:
        if name.startswith("_foreach_") or name.startswith("_fused_"):
            lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
            walked = [a for a in lists if a[0].dim()] or lists
            depth = len(walked) + (not name.endswith("_")) * (name != "_foreach_norm")
            return foreach_launches([t.numel() for t in walked[0]], depth) + (name == "_foreach_norm")
        return SEVERAL.get(name, 1)

    def _send(self, name: str, args: Any) -> None:
        collective = COLLECTIVES.get(name, name)
        whole = args[1] if collective == "reduce_scatter" else args[0]
        tensors = [t for t in tree_leaves(whole) if isinstance(t, Tensor)]
        self.counts.sent[collective] += _bytes(tensors)
        self.add(name, 1, 0)

    def _inside_of_the_loss(self, *args: Any) -> Any:
        """The fused loss is a loop in Python over blocks of rows, with one kernel of ours in it."""
        from speedrun.kernels import cross_entropy as module

        def losses(logits: Tensor, *_: Any, gradient: bool, **__: Any) -> Tensor:
            self.add("cross_entropy_kernel", 1, 3 * _bytes([logits]))
            with uncounted():
                return torch.empty(len(logits), device=logits.device)

        with mock.patch.object(module, "_losses", losses), self:
            return module.loss_and_gradients._init_fn(*args)


def foreach_launches(numels: list[int], depth: int) -> int:
    """Launches of a foreach kernel over tensors of so many elements, `depth` lists of them: as MultiTensorApply.cuh
    fills them."""
    most, launches, tensors, chunks = LISTS[min(max(depth, 1), 5)], 0, 0, 0
    for index, numel in enumerate(numels):
        if not numel:
            continue
        tensors += 1
        pieces = -(-numel // CHUNK)
        for piece in range(pieces):
            chunks += 1
            full = tensors == most and piece == pieces - 1
            if full or chunks == CHUNKS or (index == len(numels) - 1 and piece == pieces - 1):
                launches += 1
                chunks = 0
                tensors = 0 if piece == pieces - 1 else 1
    return launches + (chunks > 0)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def count(preset: list[str], strategy: str, ranks: int, compiled: bool) -> dict[str, Any]:
    """A steady step of the preset's first stage, averaged over as many steps as AdamW takes to update.

    Returns {"passes": …, "optimizer": …} of plain numbers, and the seconds that it took.
    """
    started = time.perf_counter()
    _, config = parse(preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hopper(), _group(strategy, ranks):
            parts = _steps(config, strategy, ranks, compiled)
    return {**parts, "seconds": time.perf_counter() - started}


@contextlib.contextmanager
def _group(strategy: str, ranks: int) -> Iterator[None]:
    if ranks == 1:
        yield
        return
    import torch.distributed._tools.fake_collectives  # noqa: F401  of fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with (
            catalogue.fake(strategy),
            # DDP times itself with events of the device.
            mock.patch.object(dist.Logger, "set_runtime_stats_and_log", lambda logger: None),
            mock.patch.object(dist.Reducer, "prepare_for_forward", lambda reducer: None),
        ):
            yield
    finally:
        dist.destroy_process_group()


def _steps(config: Config, name: str, ranks: int, compiled: bool) -> dict[str, Any]:
    counting = Counting()
    stage = resolve_stages(config, config.steps)[0]
    device = torch.device("cuda", 0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels="triton"))
    with device:
        model = GPT(config.model, document_start=50256)
    if compiled:
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
        compiler = backend(counting.compiled)  # one for all: blocks that are alike share their code
        for block in model.blocks:
            block.compile(backend=compiler)
    model.set_windows(stage.windows)
    shapes = {parameter: tuple(p.shape) for parameter, p in model.named_parameters()}
    engine: dict[str, Any] = {"wrap": ["Block"], "reshard_after_forward": True} if name == "fsdp" else {}
    strategy = catalogue.engine(name, Settings(Place(0, ranks, device), "bf16", engine))
    optimizer = dataclasses.replace(config.optimizer, orthogonalization_dtype="bfloat16")
    strategy.prepare(model, parameter_groups(shapes, optimizer, "triton"), config.optimizer.clip, 1)
    rows = stage.global_batch // SHARE
    micro = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= (stage.micro_batch or rows))
    strategy.set_accumulation(rows // micro)
    totals = {"passes": Counts(), "optimizer": Counts()}
    every = config.optimizer.adamw_every
    for step in range(every, 3 * every):
        if step == 2 * every:
            totals = {part: Counts() for part in totals}
        set_schedules(strategy, config, step, config.steps, stage)
        options = forward_options(config, step, config.steps)
        with counting:
            counting.counts = totals["passes"]
            for index in range(rows // micro):
                with uncounted():
                    inputs, targets = (
                        torch.zeros((micro, stage.sequence_length), dtype=torch.int64, device=device) for _ in range(2)
                    )
                with strategy.micro_batch(last=index == rows // micro - 1):
                    loss = strategy.model(inputs, targets, **options)
                    strategy.backward(loss)
            counting.counts = totals["optimizer"]
            strategy.step()
    return {
        part: {
            "launches": counts.launches / every,
            "moved": counts.moved / every,
            "waits": {key: value / every for key, value in counts.waits.items()},
            "sent": {key: value / every for key, value in counts.sent.items()},
            "operators": {key: value / every for key, value in counts.operators.most_common(12)},
        }
        for part, counts in totals.items()
    }
