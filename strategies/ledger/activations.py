"""Activations, measured: what autograd holds between forward and backward, and what is alive at forward's peak.

Two observers run beside one real forward pass:

- Saved-tensor hooks see every tensor that autograd keeps for backward, at the moment it is kept. They know *for whom*
  it is kept: the module that runs and the function it called.
- A dispatch mode sees the result of every kernel and, by a weak reference to its storage, the moment it is freed. That
  gives the peak, and it finds what is kept past autograd's back: selective checkpointing puts outputs into a cache of
  its own.

What counts is storages, each once and whole, however many tensors are views of it or functions keep it; the first to
keep it gets the row. Parameters and what was there before the forward pass (tokens, targets) are no activations. What a
single kernel allocates and frees inside itself is not seen.
"""

import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strategies.ledger.tracer import UNSEEN

WEIGHT_CASTS = "weight casts"
"""The part under which copies of parameters in another dtype stand (autocast makes them and keeps them)."""


@dataclass(frozen=True)
class SavedTensor:
    """One storage."""

    module: str
    """Path of the module that first kept it or, if autograd did not, of the one that made it; "" is the model itself.
    """
    operator: str
    """The function that first kept it (`linear`, `rms_norm`, `checkpoint`, ...) or, if none did, that made it."""
    kernel: str
    """The kernel that made it (`mm`, `_to_copy`, ...)."""
    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True)
class ActivationBook:
    """What one forward pass left behind, and what was alive at its peak."""

    rows: tuple[SavedTensor, ...]
    """Held between forward and backward, in the order in which they were allocated."""
    peak_rows: tuple[SavedTensor, ...]
    """Alive when most bytes were: what is held by then, and temporaries. Only what the forward pass allocated."""

    @property
    def total(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def peak(self) -> int:
        return sum(row.bytes for row in self.peak_rows)

    def by_part(self, peak: bool = False) -> dict[str, int]:
        """Bytes by part, the largest first."""
        return _grouped(self.peak_rows if peak else self.rows, lambda row: row.part)

    def by_module(self, peak: bool = False) -> dict[str, int]:
        """Bytes by module path, the largest first."""
        return _grouped(self.peak_rows if peak else self.rows, lambda row: row.module)

    def largest(self, count: int = 5, peak: bool = False) -> list[tuple[str, int]]:
        """The contributors with most bytes: part and bytes, layers added up."""
        return list(self.by_part(peak).items())[:count]


def measure_activations(
    model: nn.Module, run_forward: Callable[[], Any], part_of: Callable[[str, str, str], str] | None = None
) -> ActivationBook:
    """Run a forward pass once and account for the memory that it leaves behind.

    run_forward: calls `model` (plain, wrapped or sharded; not compiled) and returns its loss, which itself is counted
    at the peak only. It is called once and may keep the loss for a backward pass. Where there is autocast, call this
    inside its context, as a training step does: its copies of the weights live until the context ends. part_of:
    (module path, operator, kernel) → part of the model, for grouping; by default the path without its layer number.
    See `Row` for the three.

    Gathered parameters of FSDP and ZeRO-3 count as parameters where autograd keeps them. At the peak, what an engine
    itself allocates during forward is counted too: for a forecast of activations alone, measure the plain model. Runs
    on any device and on fake tensors.
    """
    recorder = _Recorder(model)
    with _module_hooks(recorder), _Functions(recorder), _Kernels(recorder):
        with torch.autograd.graph.saved_tensors_hooks(recorder.save, Tensor.detach):
            result = run_forward()
    return recorder.book({_key(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}, part_of or _path)


@dataclass
class _Storage:
    """A row in the making."""

    module: str
    operator: str
    kernel: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    reference: weakref.ref[Any]
    weight_cast: bool = False
    saved: bool = False
    parameter: bool = False

    @property
    def size_now(self) -> int:
        storage = self.reference()
        return storage.nbytes() if storage is not None else 0


class _Recorder:
    """A log of allocations and releases, and who allocated and kept each storage."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.modules: list[nn.Module] = [model]  # those that run, the innermost last
        self.functions: list[str] = []  # likewise
        self.model = model
        # Held on to, so that no activation gets the address of one that an engine lets go of meanwhile.
        self.given = [parameter.untyped_storage() for parameter in model.parameters()]
        self.parameters = {storage._cdata for storage in self.given}
        self.storages: list[_Storage] = []
        self.live: dict[int, int] = {}  # storage → index
        self.log: list[tuple[bool, int]] = []  # (allocated, else released; index of the storage)

    @property
    def module(self) -> str:
        return self.names.get(self.modules[-1], "")

    def allocate(self, tensor: Tensor, kernel: str, sources: tuple[Any, ...]) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self.live or any(isinstance(source, Tensor) and _key(source) == key for source in sources):
            return  # a view, or an operation in place
        index = len(self.storages)

        def release(_: Any) -> None:
            del self.live[key]
            self.log.append((False, index))

        cast = kernel == "_to_copy" and isinstance(sources[0], Tensor) and self._is_parameter(sources[0])
        self.storages.append(
            _Storage(
                self.module,
                self.functions[-1] if self.functions else kernel,
                kernel,
                tuple(tensor.shape),
                tensor.dtype,
                storage.nbytes(),
                weakref.ref(storage, release),
                cast,
            )
        )
        self.live[key] = index
        self.log.append((True, index))

    def save(self, tensor: Tensor) -> Tensor:
        """The pack hook. A detached tensor goes back: the tensor itself could hold the graph that holds it.

        For a parameter the parameter itself, as autograd would: ZeRO-3 lets its gathered storage go, which a detached
        tensor would keep, and puts another one in its place for the backward pass.
        """
        index = self.live.get(_key(tensor))
        if index is not None and not self.storages[index].saved:
            row = self.storages[index]
            row.saved = True
            row.parameter = self._is_parameter(tensor)
            row.module = self.module
            row.operator = self.functions[-1] if self.functions else _autograd_function(sys._getframe(1))
        for parameter in self.modules[-1].parameters(recurse=False):
            if (
                _key(parameter) == _key(tensor)
                and parameter.shape == tensor.shape
                and parameter.stride() == tensor.stride()
            ):
                return parameter
        return tensor.detach()

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Also one that an engine has gathered for the module that runs now."""
        key = _key(tensor)
        return key in self.parameters or any(_key(p) == key for p in self.modules[-1].parameters(recurse=False))

    def book(self, results: set[int], part_of: Callable[[str, str, str], str]) -> ActivationBook:
        log = list(self.log)
        total = peak = end = 0
        for i, (allocated, index) in enumerate(log):
            total += self._bytes(index) if allocated else -self._bytes(index)
            if total > peak:
                peak, end = total, i + 1
        held = _alive(log) - {self.live[key] for key in results if key in self.live}
        for parameter in self.model.parameters():  # as they are now: an engine may have left some gathered
            held.discard(self.live.get(_key(parameter), -1))
        held = {index for index in held if self.storages[index].size_now}  # FSDP empties storages and keeps them
        return ActivationBook(self._rows(held, part_of), self._rows(_alive(log[:end]), part_of))

    def _bytes(self, index: int) -> int:
        return 0 if self.storages[index].parameter else self.storages[index].bytes

    def _rows(self, indices: set[int], part_of: Callable[[str, str, str], str]) -> tuple[SavedTensor, ...]:
        rows = []
        for index in sorted(indices):
            s = self.storages[index]
            if self._bytes(index):
                part = WEIGHT_CASTS if s.weight_cast else part_of(s.module, s.operator, s.kernel)
                rows.append(SavedTensor(s.module, s.operator, s.kernel, part, s.shape, s.dtype, s.bytes))
        return tuple(rows)


class _Kernels(TorchDispatchMode):
    """Reports every new storage to the recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name == UNSEEN:
            for tensor in args[0]:
                self.recorder.allocate(tensor, "compiled code", ())
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.recorder.allocate(leaf, function.overloadpacket.__name__, args)
        return result


class _Functions(TorchFunctionMode):
    """Keeps the recorder told which of torch's functions the model has called."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = resolve_name(function) or getattr(function, "__name__", str(function))
        self.recorder.functions.append(name.rpartition(".")[2].strip("_"))
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.recorder.functions.pop()


@contextmanager
def _module_hooks(recorder: _Recorder) -> Iterator[None]:
    enter = register_module_forward_pre_hook(lambda module, args: recorder.modules.append(module))

    def left(module: nn.Module, args: Any, output: Any) -> None:
        recorder.modules.pop()

    leave = register_module_forward_hook(left, always_call=True)
    try:
        yield
    finally:
        enter.remove()
        leave.remove()


def _alive(log: list[tuple[bool, int]]) -> set[int]:
    alive: set[int] = set()
    for allocated, index in log:
        if allocated:
            alive.add(index)
        else:
            alive.remove(index)
    return alive


def _key(tensor: Tensor) -> int:
    """Identifies a storage while it lives."""
    return tensor.untyped_storage()._cdata


def _autograd_function(frame: FrameType) -> str:
    """Who keeps a tensor where no function of torch was called: `checkpoint`, or a torch.autograd.Function by name.

    frame: the innermost one of Python, in torch.utils.checkpoint (older versions: a Function of its) or in `apply`.
    """
    name = getattr(frame.f_locals.get("cls"), "__name__", "function")
    return "checkpoint" if frame.f_code.co_filename == checkpoint.__file__ or name == "_NoopSaveInputs" else name


def _path(module: str, operator: str, kernel: str) -> str:
    return re.sub(r"\.\d+\b", "", module) or operator


def _grouped(rows: tuple[SavedTensor, ...], group: Callable[[SavedTensor], str]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for row in rows:
        sums[group(row)] = sums.get(group(row), 0) + row.bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
