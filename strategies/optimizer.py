"""One optimizer over intervals: the same code under every strategy.

Parity by construction. The optimizer walks slices, not parameters: a slice is the interval of one parameter whose
optimizer state this rank holds. Elementwise rules (AdamW) run on a slice wherever it ends; whole-matrix rules (Muon) do
their elementwise part on the slice and meet the rest of the matrix through strategies/matrices.py. A strategy only
says where its slices lie (`bind`) and where the reduced gradients land. On one rank the exchange is empty and this is
simply the single-process optimizer; under DeepSpeed it is the client optimizer of its flat partitions.

A *holder* is a tensor in `param_groups` that carries the gradient and owns the state: a parameter (single, DDP), a
DTensor (FSDP2), or a flat partition in which slices of many parameters lie end to end (ZeRO).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from strategies import matrices
from strategies.errors import UserError
from strategies.layout import Intervals, Shape, speaks
from strategies.mesh import Place
from strategies.owners import Matrix, assign_owners


class Rule(Protocol):
    """How a gradient changes a weight. `whole_matrix` says which of the two kinds below it is."""

    whole_matrix: bool
    buffers: tuple[str, ...]
    """State per element: it lies like the weight's slice."""
    matrix_buffers: tuple[str, ...]
    """State per row or column (whichever are more) of a whole matrix, kept by its owner alone."""


class ElementwiseRule(Rule, Protocol):
    def step(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]], options: Any
    ) -> None: ...


class WholeMatrixRule(Rule, Protocol):
    def accumulate(self, gradients: list[Tensor], states: list[dict[str, Tensor]], options: Any) -> None: ...
    def transform(self, matrices: Tensor, options: Any, states: Sequence[dict[str, Tensor]]) -> Tensor: ...
    def apply_all(self, weights: list[Tensor], updates: list[Tensor], options: Any) -> None: ...


class ParameterGroup(Protocol):
    """A line of the recipe: these parameters, this rule, these options (lr and so on)."""

    @property
    def name(self) -> str: ...
    @property
    def rule(self) -> Any: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def options(self) -> dict[str, Any]: ...


Recipe = Sequence[ParameterGroup]


@dataclass(frozen=True)
class Slice:
    """One rank's part of one parameter.

    weight: the elements of the parameter that this rank updates; state: the elements whose optimizer state and reduced
    gradient each rank holds (the same but for DDP with owners); offset: where they begin in the holder's local
    elements.
    """

    name: str
    shape: Shape
    state: Intervals
    holder: Tensor
    offset: int = 0
    replicated: bool = False
    """Every rank holds the whole weight, whatever `state` says."""


class IntervalOptimizer(torch.optim.Optimizer):
    """torch's optimizer interface over a recipe. Before `bind` it does nothing, which DeepSpeed's start relies on."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        """model: plain (not yet sharded); recipe: every trainable parameter in exactly one group.

        Raises ValueError where a parameter is in no group, in two, or unknown.
        """
        parameters = dict(model.named_parameters())
        named = [name for group in recipe for name in group.parameters]
        if sorted(named) != sorted(parameters):
            wrong = sorted(set(parameters) ^ set(named)) or [name for name in named if named.count(name) > 1]
            raise UserError(f"The optimizer's recipe must name every parameter once; look at {wrong[0]!r}.")
        self.slices: dict[int, list[Slice]] = {}
        self.rules = {name: group.rule for group in recipe for name in group.parameters}
        self.observe: Callable[[str, dict[str, Tensor]], None] | None = None
        self.left_out: Tensor | None = None
        """During `step_where`: 1 where the step must change nothing, else 0."""
        groups = [
            {
                "params": [parameters[name] for name in group.parameters],
                "name": group.name,
                "names": group.parameters,
                "rule": group.rule,
                "peak_lr": group.options["lr"],
                **group.options,
            }
            for group in recipe
        ]
        super().__init__(groups, defaults={})

    def bind(self, slices: Iterable[Slice], place: Place) -> None:
        """Say where everything lies, once the strategy has sharded the model.

        Every rank passes the slices of all parameters, also those of which it holds nothing. `param_groups` must hold
        the holders by now. Raises AssertionError (ours, not a user's) where an interval runs out of its holder.
        """
        self.place = place
        self.slices = {}
        for piece in slices:
            here = piece.state[place.rank]
            assert piece.offset + here.numel <= local(piece.holder).numel(), f"{piece.name} runs out of its holder"
            self.slices.setdefault(id(piece.holder), []).append(piece)
        self.owners = assign_owners(
            {s.name: s.shape for s in self.all_slices() if len(s.shape) == 2},
            place.world_size,
            {s.name: s.state for s in self.all_slices() if len(s.shape) == 2},
        )

    def all_slices(self) -> list[Slice]:
        return [piece for pieces in self.slices.values() for piece in pieces]

    def weight(self, piece: Slice) -> Tensor:
        """This rank's elements of the parameter's weight, flat, as a view."""
        if piece.replicated:
            return local(piece.holder)
        return self._cut(local(piece.holder), piece)

    def gradient(self, piece: Slice) -> Tensor:
        """This rank's elements of the reduced gradient, flat, as a view. Raises RuntimeError where there is none."""
        if piece.holder.grad is None:
            raise RuntimeError(f"{piece.name} has no gradient: it took no part in the forward pass.")
        return self._cut(local(piece.holder.grad), piece)

    def gradients(self, pieces: Iterable[Slice]) -> dict[str, Tensor]:
        """Copies of this rank's elements of these gradients, by name; empty where it holds none."""
        nothing = torch.empty(0, device=self.place.device)
        return {
            piece.name: self.gradient(piece).clone() if piece.state[self.place.rank].numel else nothing
            for piece in pieces
        }

    def state_of(self, piece: Slice, buffer: str) -> Tensor:
        """This rank's elements of one of the parameter's optimizer states, flat, as a view."""
        return self._cut(self.state[piece.holder][buffer], piece)

    def _owned(self, holder: Tensor) -> list[Slice]:
        """The matrices of a holder that this rank transforms, and of which it therefore holds a part."""
        return [piece for piece in self.slices[id(holder)] if self.owners.get(piece.name) == self.place.rank]

    def matrix_state(self, piece: Slice) -> dict[str, Tensor]:
        """The state that this rank, the matrix's owner, keeps of it as a whole, as views; zero before the first step.

        The vectors of a holder's matrices lie end to end in one tensor: state stays a few tensors per holder, which
        torch and DeepSpeed save and load without knowing of matrices.
        """
        owned = self._owned(piece.holder)
        place = [other.name for other in owned].index(piece.name)
        return {
            buffer: self.state[piece.holder][buffer].split([max(other.shape) for other in owned])[place]
            for buffer in self.rules[piece.name].matrix_buffers
        }

    def _cut(self, flat: Tensor, piece: Slice) -> Tensor:
        return flat[piece.offset : piece.offset + piece.state[self.place.rank].numel]

    @torch.no_grad()
    def step_where(self, counts: Tensor) -> None:
        """A step that changes nothing, to the bit, where `counts` (a boolean scalar on the device) is False: decided on
        the device, for which nobody waits. Rules find the option `left_out`: a float32 scalar, 1 where they must not
        change anything, whatever gradients hold, and 0 elsewhere; and `kept`, 1 less it.
        """
        self.left_out = counts.logical_not().float()
        try:
            self.step()
        finally:
            self.left_out = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update what `param_groups` holds now (DeepSpeed shows one group, or part of one, at a time)."""
        if not self.slices:
            return
        for group in self.param_groups:
            holders = [holder for holder in group["params"] if id(holder) in self.slices]
            if self.observe:
                self.observe("clip", self.gradients(s for h in holders for s in self.slices[id(h)]))
            for holder in holders:
                self._initialize(holder, group["rule"])
            options = group
            if self.left_out is not None and holders:
                left_out = self.left_out.to(local(holders[0]).device)
                options = {**group, "left_out": left_out, "kept": 1.0 - left_out}
            if group["rule"].whole_matrix:
                self._step_matrices(holders, options)
            else:
                self._step_elements(holders, options)

    def _initialize(self, holder: Tensor, rule: Rule) -> None:
        """State is zeros of the shape of what is held, so that DeepSpeed's own checkpoints recognise it too."""
        if self.state.get(holder) or not any(s.state[self.place.rank].numel for s in self.slices[id(holder)]):
            return
        self.state[holder] = {buffer: torch.zeros_like(local(holder)) for buffer in rule.buffers}
        if numel := sum(max(piece.shape) for piece in self._owned(holder)):
            self.state[holder] |= {
                buffer: torch.zeros(numel, device=local(holder).device) for buffer in rule.matrix_buffers
            }
        if not rule.whole_matrix:
            self.state[holder]["step"] = torch.zeros((), device=local(holder).device)

    def _step_elements(self, holders: list[Tensor], group: dict[str, Any]) -> None:
        held = [holder for holder in holders if self.state.get(holder)]
        for holder in held:
            self.gradient(self.slices[id(holder)][0])  # raises where there is none
        rule: ElementwiseRule = group["rule"]
        if held:
            gradients = [local(holder.grad) for holder in held if holder.grad is not None]
            rule.step([local(h) for h in held], gradients, [self.state[h] for h in held], group)

    def _step_matrices(self, holders: list[Tensor], group: dict[str, Any]) -> None:
        rule: WholeMatrixRule = group["rule"]
        pieces = {piece.name: piece for holder in holders for piece in self.slices[id(holder)]}
        mine = [piece for piece in pieces.values() if piece.state[self.place.rank].numel]
        held = {piece.name: self.gradient(piece) for piece in mine}
        states = [{buffer: self.state_of(piece, buffer) for buffer in rule.buffers} for piece in mine]
        if mine:
            rule.accumulate(list(held.values()), states, group)
        nothing = torch.empty(0, device=self.place.device)
        whole = [Matrix(piece.name, piece.shape, piece.state, self.owners[piece.name]) for piece in pieces.values()]
        replicated = any(piece.replicated for piece in pieces.values())
        exchange = matrices.transform_replicated if replicated else matrices.transform_sharded

        def transform(stack: Tensor, which: list[Matrix]) -> Tensor:
            states = [self.matrix_state(pieces[m.name]) for m in which] if rule.matrix_buffers else []
            # Of states in host memory the rule gets copies, which are written back.
            here = [{buffer: tensor.to(stack.device) for buffer, tensor in state.items()} for state in states]
            result = rule.transform(stack, group, here)
            for state, new in zip(states, here, strict=True):
                for buffer in state:
                    if new[buffer] is not state[buffer]:
                        state[buffer].copy_(new[buffer])
            return result

        def apply(names: list[str], updates: list[Tensor]) -> None:
            weights = [self.weight(pieces[name]) for name in names]
            if weights:
                rule.apply_all(weights, [u.to(w.device) for w, u in zip(weights, updates, strict=True)], group)

        exchange(whole, {name: held.get(name, nothing) for name in pieces}, transform, apply, self.place)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all state, as if no step had been taken: zeros are what every rule begins with.

        In place. DeepSpeed links the tensors that it finds after an engine's first step to the parameters, and keeps
        those for good: if the next step made new ones, the old ones would stay alive beside them.
        """
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()

    def initialize(self) -> None:
        """Allocate all state now, zero, as the first step would."""
        for pieces in self.slices.values():
            self._initialize(pieces[0].holder, self.rules[pieces[0].name])

    def gather(self, piece: Slice, part: Tensor) -> Tensor:
        """Something that lies like the parameter's optimizer state, whole and on every rank. Collective."""
        return gather(part, piece.shape, piece.state, self.place)

    def full_weights(self) -> dict[str, Tensor]:
        """Every parameter whole, in float32, on every rank. Collective."""
        return {
            piece.name: self.weight(piece).clone().view(piece.shape)
            if piece.replicated
            else self.gather(piece, self.weight(piece))
            for piece in self.all_slices()
        }

    def full_state(self) -> dict[str, dict[str, Tensor]]:
        """Every optimizer state whole, by parameter and buffer, on every rank; zeros before the first step.
        Of the parameter's shape, but for `matrix_buffers`: [rows] or [columns], whichever are more. Collective.
        """
        result: dict[str, dict[str, Tensor]] = {}
        for piece in self.all_slices():
            nothing = torch.zeros(piece.state[self.place.rank].numel, device=self.place.device)
            result[piece.name] = {
                buffer: self.gather(piece, self.state_of(piece, buffer) if self.state.get(piece.holder) else nothing)
                for buffer in self.rules[piece.name].buffers
            }
            for buffer in self.rules[piece.name].matrix_buffers:
                vector = torch.zeros(max(piece.shape), device=self.place.device)
                if self.owners[piece.name] == self.place.rank and self.state.get(piece.holder):
                    vector.copy_(self.matrix_state(piece)[buffer])
                if self.place.world_size > 1:
                    dist.all_reduce(vector, group=self.place.group)  # zeros but on the owner
                result[piece.name][buffer] = vector
        return result


def local(tensor: Tensor) -> Tensor:
    """This rank's elements of a tensor, flat, as a view."""
    with torch.no_grad():
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return here.detach().view(-1)


def gather(local: Tensor, shape: Shape, intervals: Intervals, place: Place) -> Tensor:
    """The whole tensor on every rank, out of the part that each one holds. Collective unless all ranks hold all.

    local: this rank's elements, flat, on its device or in host memory. Returns a new tensor of `shape`, on the device.
    Parts are equal copies, or do not overlap.
    """
    numel, here = math.prod(shape), intervals[place.rank]
    if here.numel == numel and all(other == here for other in intervals):
        return local.to(place.device, copy=True).view(shape)
    whole = torch.zeros(numel, dtype=local.dtype, device=place.device)
    if speaks(intervals, place.rank):
        whole[here.start : here.stop] = local
    dist.all_reduce(whole, group=place.group)  # every element is non-zero on one rank at most, so the sum is exact
    return whole.view(shape)
