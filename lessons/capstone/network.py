"""A network that is slow, and the same for all ranks: what is right by chance in one machine is not under it.

    with slow(own) as network: …
    network.unwaited(("all_reduce",))

In one machine a message of a small model is there at once. Here a collective with async_op=True works on copies: until
its work has been waited for, the tensors that it fills have other numbers in them. And before a collective is called,
it is compared with what the other ranks called in its place: two that differ wait for ever, or mix up their tensors.
"""

import inspect
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lessons.capstone.events import patched
from shardrun.lesson.rank import source_line
from shardrun.lesson.wrong import Wrong
from shardrun.own import Own

FILLED = {
    "all_reduce": "tensor", "broadcast": "tensor", "reduce": "tensor", "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor", "reduce_scatter": "output", "reduce_scatter_tensor": "output",
    "all_to_all": "output_tensor_list", "all_to_all_single": "output",
}  # fmt: skip
"""Collective → its argument with the tensors that it fills."""

GIVEN = {"all_gather": "tensor", "reduce_scatter": "input_list", "reduce_scatter_tensor": "input"}
GIVEN |= {"all_gather_into_tensor": "input_tensor"}
"""Collective → its argument with the tensors that it reads, where those are others."""

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
NOT_YET, NO_SUM_YET = float("nan"), 0.75
"""What is in a tensor before it is filled. Of a sum one that shows whether something was added meanwhile."""

OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
"""Collectives of Python objects, which the check itself uses."""

UNEVEN = ("all_to_all", "all_to_all_single", "gather", "scatter")
"""In which ranks may give different sizes."""


@dataclass
class Network:
    """What is on its way on this rank, and what went wrong with it."""

    name: str
    """Another one each time, the same on all ranks."""
    sent: list["Travelling"] = field(default_factory=list)
    calls: int = 0
    problems: list[str] = field(default_factory=list)

    def unwaited(self, collectives: tuple[str, ...] = tuple(FILLED)) -> str:
        """The first of these that nobody has waited for, in words."""
        for each in self.sent:
            if not each.arrived and each.collective in collectives and each.fills:
                return f"the {each.collective} of {each.bytes:,} bytes ({each.line}) is still on its way"
        return ""


class Travelling:
    """The work of a collective: a copy travels, and is put in its place when it is waited for.

    filled, given: the tensors that it fills, and others that it reads; fills: whether it does so on this rank.
    """

    def __init__(
        self, network: Network, collective: str, line: str, filled: list[Tensor], given: list[Tensor], fills: bool
    ) -> None:
        self.network, self.collective, self.line, self.filled, self.fills = network, collective, line, filled, fills
        self.copies = [tensor.detach().clone() for tensor in filled]
        memory = {tensor.untyped_storage().data_ptr() for tensor in filled}
        self.given = [(t, t.detach().clone()) for t in given if t.untyped_storage().data_ptr() not in memory]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in filled)
        self.meanwhile = NO_SUM_YET if collective in REDUCTIONS else NOT_YET
        self.work: Any = None
        self.arrived = False

    def leave(self) -> None:
        """What is filled is of no use until it has arrived."""
        for tensor in self.filled if self.fills else ():
            if tensor.is_floating_point():
                tensor.detach().fill_(self.meanwhile)

    @torch.no_grad()
    def arrive(self) -> None:
        if self.arrived:
            return
        self.arrived = True
        self.network.sent.remove(self)
        changed = any(_is_there(tensor) and not torch.equal(tensor, copy) for tensor, copy in self.given)
        gone = any(not _is_there(tensor) for tensor, _ in self.given)
        for tensor, copy in zip(self.filled, self.copies, strict=True):
            if not _is_there(tensor):
                gone = True
            elif self.fills:
                changed = changed or (tensor.is_floating_point() and not self._untouched(tensor))
                tensor.detach().copy_(copy)
        what = f"a tensor of the {self.collective} of {self.bytes:,} bytes ({self.line})"
        if gone:
            self.network.problems.append(f"{what} was let go while it was on its way.")
        elif changed:
            self.network.problems.append(
                f"{what} was written to while it was on its way: what comes after it was sent is lost."
            )

    def _untouched(self, tensor: Tensor) -> bool:
        return bool((tensor.isnan() if self.meanwhile != self.meanwhile else tensor == self.meanwhile).all())

    def wait(self, *arguments: Any, **options: Any) -> Any:
        found = self.work.wait(*arguments, **options)
        self.arrive()
        return found

    def is_completed(self) -> bool:
        if self.work.is_completed():
            self.arrive()
        return bool(self.work.is_completed())

    def get_future(self) -> Any:
        self.wait()
        return self.work.get_future()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


@contextmanager
def slow(own: Own) -> Iterator[Network]:
    """While open, every collective that is called through torch.distributed travels so. Collective."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, 0)
    network = Network(name[0])

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*arguments: Any, **options: Any) -> Any:
            given = signature.bind(*arguments, **options)
            given.apply_defaults()
            named, collective = given.arguments, function.__name__
            line = _their_line(own)
            if named.get("group") is None:
                _same_on_all(network, collective, named, line)
            if not named.get("async_op") or collective not in FILLED:
                return function(*arguments, **options)
            filled, read = named[FILLED[collective]], named[GIVEN[collective]] if collective in GIVEN else []
            travelling = Travelling(network, collective, line, _tensors(filled), _tensors(read), _fills(named))
            named[FILLED[collective]] = _like(filled, travelling.copies)
            if collective in GIVEN:  # it may be a part of what is filled
                named[GIVEN[collective]] = _like(read, [tensor.detach().clone() for tensor in _tensors(read)])
            travelling.work = function(*given.args, **given.kwargs)
            network.sent.append(travelling)
            travelling.leave()
            return travelling

        return call

    with patched(own, wrap, also=OBJECTS):
        yield network


def _is_there(tensor: Tensor) -> bool:
    return not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def _tensors(given: Any) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def _like(given: Any, tensors: list[Tensor]) -> Any:
    return tensors[0] if isinstance(given, Tensor) else tensors


def _fills(named: dict[str, Any]) -> bool:
    """Whether it fills anything on this rank: a broadcast where it begins does not, a reduction only where it ends."""
    rank = dist.get_rank()
    return bool(named.get("src") != rank and named.get("dst", rank) == rank)


def _their_line(own: Own) -> str:
    """The line of the learner's file that calls: "my_ddp.py, line 3: `…`"; empty where none does."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == str(own.path):
            return f"{own.path.name}, line {frame.f_lineno}: `{source_line(str(own.path), frame.f_lineno)}`"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _same_on_all(network: Network, collective: str, named: dict[str, Any], line: str) -> None:
    """Compare a call with the others' in its place, of those ranks that have come to it. Raises Wrong."""
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    network.calls += 1
    call = f"{network.name}, call {network.calls}"
    first = next((value for value in named.values() if isinstance(value, Tensor)), None)
    size = "" if first is None or collective in UNEVEN else f" of {first.numel():,} elements"
    ends = "".join(f", {key} {named[key]}" for key in ("src", "dst") if isinstance(named.get(key), int))
    mine = f"{collective}{size}{ends}"
    store.set(f"{call} of {rank}", f"{mine}\n{line}")
    for other in range(dist.get_world_size()):
        if other == rank or not store.check([f"{call} of {other}"]):
            continue
        theirs, _, their_line = store.get(f"{call} of {other}").decode().partition("\n")
        if theirs != mine:
            both = sorted([(rank, mine, line), (other, theirs, their_line)])
            said = ", and ".join(f"rank {r} calls {what} ({where or 'the trainer'})" for r, what, where in both)
            raise Wrong(
                f"{said}. All ranks must call the same collectives in the same order; so they would wait for ever."
            )
