"""A log of everything a rank allocates, releases, computes and sends, in the order in which it happens.

The tracer is a dispatch mode: every operator passes through it, and a storage that it has not seen before is an
allocation. Its release is seen by a weak reference that fires when the last owner, Python or C++, lets go; storages
that are resized in place (FSDP2 lets gathered parameters go that way) are a release and an allocation. Collectives are
operators of the namespace `c10d`. Nothing is drawn or analysed here: the log is a list of plain records from which
peaks, reserved memory and timelines can be replayed.

It changes one thing that it watches: while any dispatch mode is on, autograd adds up gradients that meet at a fork of
the graph out of place, where it would otherwise reuse the first of them. The log is written as if it had reused it.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager, is_fake
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from strategies.ledger.wire import read_call

Storage = torch.UntypedStorage

UNSEEN = "shardrun::made_unseen"
"""An operator by which a model says that tensors are there which no dispatch mode has seen being made."""

Inside = Callable[[str, Sequence[Any]], Sequence[int]]
"""(operator, its arguments) → bytes of every tensor that it holds inside."""

NO_WORK = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::detach", "aten::alias")
"""Operators that only make a tensor."""

_aten = torch.ops.aten
CUTS = (
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.select.int,
    _aten.as_strided.default,
)


@dataclass(slots=True)
class Event:
    """A line of the log; its place in the list is the time."""

    kind: Literal["alloc", "free", "compute", "collective"]
    id: int
    """An allocation and its release share it."""
    bytes: int
    """Of the allocation; read and written by a computation (each tensor once); a collective's payload."""
    tag: str
    """Who did it: a module and an operator; or the collective's name."""
    phase: str
    """What the training loop was doing: prepare, forward, backward, recompute (forward again, in backward), step."""
    step: int
    stream: str
    """compute, or the name of the engine's own stream (of FSDP2's)."""
    category: str = ""
    """What an allocation is held for, as far as it is known; payload or bookkeeping (wire.py) for a collective."""
    flops: int = 0
    """Floating-point operations of a matrix product or of attention; a multiplication and an addition are two."""
    host: bool = False
    """An allocation in host memory, which is no part of what the device holds."""


class Tracer(TorchDispatchMode):
    """Enter it above a FakeTensorMode and say with `enter` what the training loop does next.

    names: modules by id, for tags. gpu: whether it watches a GPU, so that what lies on a CPU is in host memory. inside:
    what an operator allocates, holds at once beside its results and releases
    before it returns, in bytes each, from its name and arguments.
    """

    def __init__(self, names: dict[int, str], inside: Inside | None = None, gpu: bool = False) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.phase, self.step = "prepare", 0
        self.buffers: Callable[[], Iterable[Tensor]] = tuple
        """Asked at the first collective of a backward pass: an engine's buffers, which may not outlive the pass."""
        self._asked = True
        self._names, self._inside, self._gpu = names, inside, gpu
        self._open: dict[int, Event] = {}  # storage → the allocation it holds now
        self._watched: dict[int, weakref.ref[Storage]] = {}
        self._ids = 0
        self._modules: list[str] = []
        self._spans: list[tuple[int, int, str]] = []  # first and last autograd sequence number of a module's forward
        self._reused: tuple[int, int, int] | None = None  # sum, first operand, length of the log
        self._exits = ExitStack()

    # Where we are: module hooks in forward, autograd's own numbering of operators in backward.

    def __enter__(self) -> "Tracer":
        resize = Storage.resize_

        def traced_resize(storage: Storage, size: int) -> Any:
            result = resize(storage, size)
            self._update(storage, "resize")
            return result

        Storage.resize_ = traced_resize  # type: ignore[method-assign, assignment]
        self._exits.callback(setattr, Storage, "resize_", resize)
        before = torch_module.register_module_forward_pre_hook(self._enter_module)
        after = torch_module.register_module_forward_hook(self._leave_module, always_call=True)
        self._exits.callback(before.remove)
        self._exits.callback(after.remove)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._watched.clear()  # what outlives the tracer is released unseen
        self._exits.close()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if (name := self._names.get(id(module))) is not None:
            self._modules.append(name)
            self._spans.append((torch.autograd._get_sequence_nr(), -1, name))

    def _leave_module(self, module: nn.Module, args: Any, result: Any) -> None:
        if (name := self._names.get(id(module))) is not None and self._modules:
            self._modules.pop()
            index = next(i for i in reversed(range(len(self._spans))) if self._spans[i][1:] == (-1, name))
            self._spans[index] = (self._spans[index][0], torch.autograd._get_sequence_nr(), name)

    def enter(self, step: int, phase: str) -> None:
        """From now on the log says this step and phase."""
        self.step, self.phase = step, phase
        self._asked = phase != "backward"
        if phase == "forward":
            self._spans.clear()  # the graph that their numbers refer to is gone

    def _where(self) -> str:
        if self._modules:
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            inside = [(first, name) for first, last, name in self._spans if first <= number < last]
            if inside:
                return max(inside)[1]  # the innermost module is the one entered last
        return ""

    # What happens.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch first, which comes back here with local tensors
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and is_fake(args[0]):
            # A number out of a tensor without data: norms are one, flags and counts (of overflows) zero.
            return 1.0 if args[0].is_floating_point() else 0
        if name == "prim::device":
            return args[0].device
        if name == UNSEEN:
            for tensor in args[0]:
                self._update(tensor.untyped_storage(), "compiled code")
            return None
        if name.startswith("c10d::"):
            return self._collective(name.removeprefix("c10d::"), func, args, kwargs)
        if func in CUTS and isinstance(args[0], FakeTensor):
            return _cut(func, args, kwargs)
        result = func(*args, **kwargs)
        operator = name.rpartition("::")[2]
        outputs = [leaf for leaf in tree_leaves(result) if _has_storage(leaf)]
        for tensor in outputs:
            self._update(tensor.untyped_storage(), operator)
        self._unseen(operator, args)
        if outputs and not func.is_view and name not in NO_WORK:
            self._computed(operator, func, args, kwargs, result, outputs)
        if name.startswith("fsdp::"):
            self._mark_copies(name, args, kwargs)
        if name == "aten::add" and self._is_gradient_sum(args, result):
            self._reused = (result.untyped_storage()._cdata, args[0].untyped_storage()._cdata, len(self.events))
        return result

    def admit(self, held: dict[str, list[Tensor]]) -> None:
        """What was there before: as if it were allocated now, each storage for the first category that names it."""
        for category, tensors in held.items():
            for tensor in tensors:
                if _has_storage(tensor):
                    self._update(tensor.untyped_storage(), "before")
            self.mark(tensors, category, overwrite=False)

    def mark(self, tensors: Iterable[Tensor], category: str, overwrite: bool = True) -> None:
        """Say what the allocations behind these tensors are held for."""
        for tensor in tensors:
            if _has_storage(tensor):
                event = self._open.get(tensor.untyped_storage()._cdata)
                if event is not None and (overwrite or not event.category):
                    event.category = category

    def mark_host(self, tensors: Iterable[Tensor]) -> None:
        """Say that these lie in host memory, or would where the device had a memory of its own."""
        for tensor in tensors:
            if _has_storage(tensor) and (event := self._open.get(tensor.untyped_storage()._cdata)) is not None:
                event.host = True

    def _log(self, kind: Any, id: int, bytes: int, tag: str, category: str = "") -> Event:
        again = self.phase == "backward" and self._modules
        phase = "recompute" if again else self.phase
        event = Event(kind, id, bytes, tag, phase, self.step, _stream(), category)
        self.events.append(event)
        return event

    def _update(self, storage: Storage, operator: str) -> None:
        """The storage is new, or has another size than before."""
        key, bytes = storage._cdata, storage.nbytes()
        known = self._open.get(key)
        if known is not None and known.bytes == bytes:
            return
        if known is not None:
            self._free(key)
        if bytes:
            self._ids += 1
            event = self._log("alloc", self._ids, bytes, f"{self._where()} {operator}".strip())
            event.host = self._gpu and storage.device.type == "cpu"
            self._open[key] = event
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, partial(self._gone, key))

    def _gone(self, key: int, reference: "weakref.ref[Storage]") -> None:
        if self._watched.get(key) is reference:
            del self._watched[key]
            self._free(key)

    def _free(self, key: int) -> None:
        event = self._open.pop(key, None)
        if event is None:
            return
        if self._reused and self._reused[1:] == (key, len(self.events)):
            # `old + new` and then old is gone: without us autograd would have added in place. One block, no event.
            del self.events[-2]
            self._open[self._reused[0]] = event
        else:
            self._log("free", event.id, event.bytes, event.tag)
        self._reused = None

    def _is_gradient_sum(self, args: Sequence[Any], result: Tensor) -> bool:
        """An addition of autograd's own, whose first operand it could write into."""
        if torch.is_grad_enabled() or self._modules or torch._C._current_autograd_node() is None or len(args) < 2:
            return False
        old, new = args[0], args[1]
        return (
            isinstance(new, Tensor)
            and old.dtype == new.dtype
            and old.untyped_storage().nbytes() == result.untyped_storage().nbytes()
            and torch.ops.aten.is_non_overlapping_and_dense(old)
            and self.events[-2] is self._open.get(result.untyped_storage()._cdata)  # and [-1] is the computation
        )

    def _collective(self, operator: str, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)]
        for tensor in tensors:
            self._update(tensor.untyped_storage(), operator)
        self.mark(tensors, "communication buffers", overwrite=False)
        if not self._asked:
            self._asked = True
            self.mark(self.buffers(), "communication buffers", overwrite=False)
        sent = read_call(operator, args)
        kind = "bookkeeping" if sent.bookkeeping else "payload"
        if sent.world_size > 1:
            self._log("collective", 0, sent.payload_bytes, sent.collective, kind)
        self._unseen(operator, args, "communication buffers")
        return func(*args, **kwargs)

    def _unseen(self, operator: str, args: Sequence[Any], category: str = "") -> None:
        """What is allocated and released before the call returns, where no dispatch mode sees it."""
        held = []
        for bytes in self._inside(operator, args) if self._inside else ():
            self._ids += 1
            held.append(self._log("alloc", self._ids, bytes, f"{self._where()} inside {operator}".strip(), category))
        for event in held:
            self._log("free", event.id, event.bytes, event.tag)

    def _computed(
        self, operator: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, outputs: list[Tensor]
    ) -> None:
        touched = {t.untyped_storage()._cdata: _bytes(t) for t in outputs}
        touched |= {t.untyped_storage()._cdata: _bytes(t) for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        event = self._log("compute", 0, sum(touched.values()), f"{self._where()} {operator}".strip())
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            event.flops = int(count(*args, **kwargs, out_val=result))

    def _mark_copies(self, name: str, args: Any, kwargs: Any) -> None:
        """FSDP2 copies into and out of the buffers that it sends; gradients go in, gathered parameters come out."""
        if name == "fsdp::chunk_cat":
            self.mark(tree_leaves(args[0]), "gradients", overwrite=False)
        self.mark(tree_leaves((args, kwargs)), "communication buffers", overwrite=False)


def _cut(func: Any, args: Any, kwargs: Any) -> Any:
    """A view of a fake tensor, made as FakeTensorMode would in the end. It spends a millisecond to find that out, and
    engines cut buffers into as many pieces as there are ranks.
    """
    whole = args[0]
    with in_kernel_invocation_manager(whole.fake_mode):
        piece = func(*args, **kwargs)
    if isinstance(piece, Tensor):
        return FakeTensor(whole.fake_mode, piece, whole.fake_device)
    return [FakeTensor(whole.fake_mode, p, whole.fake_device) for p in piece]


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _stream() -> str:
    """The name of the stream on which FSDP2 is working. On CPU streams are names only, but it does switch them."""
    current = torch.cpu.current_stream()
    return "compute" if current is torch.cpu._default_cpu_stream else current.__dict__.get("name", "communication")
