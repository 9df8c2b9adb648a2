"""The wire meter: every collective that this rank really issues, whoever issues it, in bytes.

    with Meter() as meter:
        strategy.backward(loss)
        strategy.step()
    for line in meter.lines():
        print(line.collective, line.purpose, line.calls, line.payload_bytes, line.ring_bytes)

DDP's reducer calls its process group from C++, FSDP2 from hooks, DeepSpeed through a layer of its own. All of them end
in the same place: torch's dispatcher, as an operator of the namespace `c10d` (`c10d::allreduce_` and so on), which then
looks for the backend, gloo or nccl. The meter puts itself just before that: while it is open, a kernel under the
dispatch key BackendSelect notes the arguments and passes the call on. That key takes part in every call, from C++ too,
in every thread, in and out of autograd and of compiled code; and only collectives have a kernel there, so that nothing
else of a step changes, neither its memory nor its other operators. (A dispatch mode would see the calls as well, but
slows down every operator and makes autograd accumulate gradients out of place.)

Payload is the logical size of a collective, and depends on nothing but what was asked for:

    all_reduce, broadcast, reduce   the tensor
    all_gather                      the whole output
    reduce_scatter                  the whole input
    all_to_all                      what this rank hands over to others (its own piece stays where it is)
    gather, scatter, send           what this rank hands over
    recv, barrier                   nothing

Ring bytes are what a rank then puts on the wire if a ring of N ranks carries it out, on average over the ranks:

    all_reduce                      2 · (N−1)/N of the payload: a reduce-scatter, then an all-gather
    all_gather, reduce_scatter      (N−1)/N: every piece passes all ranks but one
    broadcast, reduce               (N−1)/N: in a pipeline every rank but the last sends everything once
    all others                      the payload

(Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.) What a backend does
inside a collective is its own affair (gloo makes an all-reduce of a reduce-scatter of tensors). In a group of one
rank nothing is sent, and nothing is noted. Out of sight is what does not go through a process group at all: torch's
symmetric-memory kernels, and a backend's methods called directly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import Library

from strategies.ledger.terms import ring_bytes

COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
}
"""Operator of the namespace c10d → what everybody calls it. One that a later torch adds is noted under its own name."""

NO_COLLECTIVES = ("check_for_nan",)
"""Operators of the namespace that send nothing."""


@dataclass(frozen=True)
class Sent:
    """One call of one collective by this rank."""

    collective: str
    payload_bytes: int
    world_size: int
    """Ranks in its group."""
    bookkeeping: bool
    """A barrier, or a reduction or broadcast of a single element or of integers: norms, flags, the loss, agreements."""
    group: str = ""
    """The name of its group."""


@dataclass(frozen=True)
class SentLine:
    """All calls of one collective for one purpose: "payload" or "bookkeeping" (see `Sent`)."""

    collective: str
    purpose: str
    calls: int
    payload_bytes: int
    ring_bytes: float
    axis: str = "all"


class Meter:
    """A context in which every collective of this process is noted, in `sent`, in order. See the module's docstring.

    Of several that are open each sees all calls. Opens and closes in a few milliseconds and costs some microseconds
    per collective.
    """

    _open: ClassVar[list["Meter"]] = []
    _kernels: ClassVar[Any] = None

    def __init__(self, axes: Mapping[str, str] | None = None) -> None:
        """axes: name of a process group → the axis of the mesh that it lies along; any other is of all ranks."""
        self.sent: list[Sent] = []
        self.axes = axes or {}

    def __enter__(self) -> "Meter":
        if not Meter._open:
            Meter._kernels = Library("c10d", "IMPL")
            for name in _operators():
                Meter._kernels.impl(name, self._kernel(name), "BackendSelect", with_keyset=True)
        Meter._open.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        Meter._open.remove(self)
        if not Meter._open:
            Meter._kernels._destroy()

    @staticmethod
    def _kernel(name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.c10d, name).default
        after = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

        def note_and_pass_on(keyset: Any, *arguments: Any, **options: Any) -> Any:
            sent = read_call(name, arguments)
            if sent.world_size > 1:
                for meter in Meter._open:
                    meter.sent.append(sent)
            return operator.redispatch(keyset & after, *arguments, **options)

        return note_and_pass_on

    def lines(self) -> list[SentLine]:
        """By collective, purpose and axis, in the order of their first calls."""
        together: dict[tuple[str, str, str], list[Sent]] = {}
        for sent in self.sent:
            purpose = "bookkeeping" if sent.bookkeeping else "payload"
            axis = self.axes.get(sent.group, "all")
            together.setdefault((sent.collective, purpose, axis), []).append(sent)
        return [
            SentLine(
                collective,
                purpose,
                len(calls),
                sum(sent.payload_bytes for sent in calls),
                sum(ring_bytes(collective, sent.payload_bytes, sent.world_size) for sent in calls),
                axis,
            )
            for (collective, purpose, axis), calls in together.items()
        ]


def _operators() -> list[str]:
    """The collectives that this torch has, by their names in the namespace c10d."""
    names = [name.removeprefix("c10d::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("c10d::")]
    return sorted(name for name in names if "." not in name and name not in NO_COLLECTIVES)


def read_call(name: str, arguments: tuple[Any, ...]) -> Sent:
    """What a call hands over, from its arguments as declared in torch/csrc/distributed/c10d/Ops.cpp."""
    group = next(ProcessGroup.unbox(a) for a in arguments if isinstance(a, torch.ScriptObject) and _is_group(a))
    collective = COLLECTIVES.get(name, f"c10d::{name}")
    first = _tensors(arguments[0])  # what is reduced, broadcast or sent in place; else the output
    second = _tensors(arguments[1]) if len(arguments) > 1 else []  # else the input
    root = next((a for a in arguments if isinstance(a, int) and not isinstance(a, bool)), None)
    if collective in ("all_reduce", "broadcast", "reduce", "send", "all_gather"):
        payload = _bytes(first)
    elif collective == "reduce_scatter":
        payload = _bytes(second)
    elif name == "alltoall_base_":
        payload = _bytes(second) - _own_piece(second[0], arguments[4], group)
    elif name == "alltoall_":
        payload = _bytes(second) - _bytes(second[group.rank() : group.rank() + 1])
    elif collective == "gather":
        payload = 0 if root == group.rank() else _bytes(second)
    elif collective == "scatter":
        payload = _bytes(second) - _bytes(second[group.rank() : group.rank() + 1]) if root == group.rank() else 0
    elif collective in ("recv", "barrier"):
        payload = 0
    else:
        payload = _bytes(first) + _bytes(second)
    bookkeeping = collective == "barrier" or (
        collective in ("all_reduce", "broadcast", "reduce")
        and (sum(t.numel() for t in first) <= 1 or all(t.dtype in (torch.int32, torch.int64) for t in first))
    )
    return Sent(collective, payload, group.size(), bookkeeping, group.group_name)


def _is_group(argument: torch.ScriptObject) -> bool:
    return str(argument._type()).endswith("ProcessGroup")


def _tensors(argument: Any) -> list[Tensor]:
    """The tensors in an argument: one, a list, or a list of lists."""
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)] if isinstance(argument, (list, tuple)) else []


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _own_piece(tensor: Tensor, split: list[int], group: ProcessGroup) -> int:
    """Bytes of an all-to-all's input that this rank keeps. split: rows per rank, empty for equal parts."""
    whole = _bytes([tensor])
    if not split:
        return whole // group.size()
    rows = sum(split)
    return whole * split[group.rank()] // rows if rows else 0
