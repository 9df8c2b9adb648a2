"""A strategy of one's own with an observer around it: what it tells other ranks apart, keeps, and forgets to give back.

Nothing here knows the mistake; it says where something is not as it should be, and when.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lessons.capstone.network import REDUCTIONS, Network
from lessons.worlds import of_all
from shardrun.own import Own
from shardrun.own.engine import OwnStrategy
from strategies.base import Settings
from strategies.ledger.memory import measure
from strategies.mesh import Place
from strategies.optimizer import Recipe
from strategies.start import Initial, begin

PHASES = ("start", "weights", "forward", "wait", "reduce", "norm", "clip", "update", "publish")
"""In the order of a step: those of shardrun/certify, and what it does not look at."""


@dataclass(frozen=True)
class Note:
    """Something is wrong: when (step, index in PHASES), and a sentence."""

    step: int
    phase: str
    words: str

    @property
    def when(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)


class Watched(OwnStrategy):
    """Ranks above 0 begin with other weights, which must not count; all that every rank holds is compared."""

    def __init__(self, own: Own, settings: Settings, network: Network) -> None:
        super().__init__(own, settings)
        self.network = network

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        begin(model, initial, self.settings.place.device)
        self.notes: list[Note] = []
        self.norms: list[list[float]] = []
        """Per step: every rank's norm."""
        self.shares: list[list[float]] = []
        """Per step: the norm of what every rank alone has of the gradient."""
        self.first_gradients: dict[str, Tensor] = {}
        """Whole, of the first step."""
        self.right_so_far = ""
        self.now, rank = 0, self.settings.place.rank
        first = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.add_(rank)
        super().prepare(model, recipe, clip, accumulation)
        if words := self._own_start(first):
            self.notes.append(Note(0, "start", words))
        self.right_so_far = "All ranks begin with rank 0's weights: that is right."

    def _own_start(self, first: dict[str, Tensor]) -> str:
        """What begins with other weights than `first`, rank 0's."""
        rank = self.settings.place.rank
        mine = {name: p.detach() for name, p in self.model.named_parameters() if _is_there(p)}
        found = [("model", name, weight.flatten(), first[name].flatten()) for name, weight in mine.items()]
        for piece in self.optimizer.all_slices():
            here = piece.state[rank]
            due = first[piece.name].flatten()[here.start : here.stop]
            found.insert(0, ("parts()", piece.name, self.optimizer.weight(piece), due))
        for whose, name, weight, due in found:
            if torch.equal(weight, due):
                continue
            if rank and torch.equal(weight, due + rank):
                words = f"rank {rank} begins with weights of its own in {name}: rank 0's are the ones that count."
                return f"{words} Send them to all (dist.broadcast)."
            has = "the model has" if whose == "model" else "parts() gives"
            return f"on rank {rank} {has} other weights of {name} at the start than rank 0 began with."
        return ""

    def backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss) and (words := self.network.unwaited()):
            words = f"rank {self.settings.place.rank}'s forward pass computes while {words}: wait for it before."
            self.notes.append(Note(self.now, "weights", words))
        super().backward(loss)
        if self.last and (words := self.network.unwaited(REDUCTIONS)):
            self.notes.append(Note(self.now, "wait", f"wait() has ended, and {words}: call its work's wait()."))
        self.notes += [Note(self.now, "wait", words) for words in self.network.problems]
        self.network.problems.clear()

    def _observe(self, phase: str) -> None:
        if phase == "reduce":
            self._same_everywhere(phase)
            parts = [part.gradient for part in self.own.parts() if part.gradient is not None]
            share = torch.stack([part.square().sum() for part in parts]).sum().sqrt() if parts else torch.zeros(())
            self.shares.append(of_all(float(share)))
            if not self.now:
                pieces = {piece.name: piece for piece in self.optimizer.all_slices()}
                found = self.optimizer.gradients(pieces.values())
                self.first_gradients = {n: self.optimizer.gather(pieces[n], part) for n, part in found.items()}
                self.right_so_far = "The mean gradients of the first step are right."
        super()._observe(phase)

    def _same_everywhere(self, phase: str) -> None:
        """What every rank holds must be the same on all of them. Collective."""
        pieces = [piece for piece in self.optimizer.all_slices() if len(set(piece.state)) == 1]
        if not pieces:
            return
        gradients = self.optimizer.gradients(pieces)
        mine = [gradients[piece.name] for piece in pieces]
        flat = torch.cat(mine)
        dist.broadcast(flat, 0)
        for piece, ours, theirs in zip(pieces, mine, flat.split([each.numel() for each in mine]), strict=True):
            if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9, equal_nan=True):
                words = f"rank {self.settings.place.rank} has another gradient of {piece.name} than rank 0."
                self.notes.append(Note(self.now, phase, words))
                return

    @torch.no_grad()
    def step(self, update: bool = True) -> float:
        before = {id(p): p.detach().clone() for p in self.model.parameters() if _is_there(p)}
        norm = super().step(update)
        self.norms.append(of_all(norm))
        if max(self.norms[-1]) > 1.00001 * min(self.norms[-1]):
            said = ", ".join(f"{each:.6g} on rank {rank}" for rank, each in enumerate(self.norms[-1]))
            self.notes.append(Note(self.now, "norm", f"norm() is {said}: the ranks would clip by different factors."))
        whole = self.optimizer.full_weights()
        for name, p in self.model.named_parameters():
            if _is_there(p) and (words := self._stale(name, p.detach(), whole[name], before.get(id(p)))):
                self.notes.append(Note(self.now, "publish", words))
                break
        self.now += 1
        return norm

    def _stale(self, name: str, here: Tensor, right: Tensor, before: Tensor | None) -> str:
        """What the model computes with, where it is not what was updated."""
        off = (here - right).flatten().abs() > 1e-6
        if not off.any():
            return ""
        old = before is not None and torch.equal(here.flatten()[off], before.flatten()[off])
        what = "still what it was before the step" if old else "not what was updated"
        rank = self.settings.place.rank
        return f"rank {rank}'s model computes with {name}, of which {extent(off)} are {what}. It needs them all."


class Kept(OwnStrategy):
    """What a rank keeps after a step, early and late in a run: tensors, hooks, and what `held` does not name."""

    EARLY, LATE = 10, 50

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        begin(model, initial, self.settings.place.device)
        self.steps, self.census = 0, dict[int, Census]()
        self.most: dict[str, int] = {}
        """Category → bytes held at most when a gradient comes in a backward pass."""
        gc.freeze()  # only what is made from now on is looked at

        def look(_: Any) -> None:
            for category, bytes in measure(self.held()).items() if self.steps in (2, 3) else ():
                self.most[category] = max(self.most.get(category, 0), bytes)

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(look)
        super().prepare(model, recipe, clip, accumulation)

    def step(self, update: bool = True) -> float:
        norm = super().step(update)
        self.steps += 1
        if self.steps in (self.EARLY, self.LATE):
            gc.collect()
            self.census[self.steps] = self._count()
        return norm

    def _count(self) -> "Census":
        named = {_key(tensor) for tensors in self.held().values() for tensor in tensors}
        found = dict(storages())
        unnamed = {key: tensor for key, tensor in found.items() if key not in named and tensor.numel() > 64}
        hooks = sum(
            len(getattr(each, hooks) or ())
            for each in (*self.model.modules(), *self.model.parameters())
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_post_accumulate_grad_hooks", "_backward_hooks")
            if hasattr(each, hooks)
        )
        return Census(
            sum(key[1] for key in found),
            len(found),
            hooks,
            sum(key[1] for key in unnamed),
            [list(tensor.shape) for tensor in unnamed.values()][:3],
        )


@dataclass
class Census:
    """Float32 tensors that are alive, by their memory; what of it `held` does not name."""

    bytes: int = 0
    tensors: int = 0
    hooks: int = 0
    unnamed: int = 0
    shapes: list[list[int]] = field(default_factory=list)


def storages() -> Iterator[tuple[tuple[int, int], Tensor]]:
    """(address, bytes) of every piece of memory with floats in it that is alive, and a tensor of it; frozen ones are
    left out (gc.freeze)."""
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter) and each.dtype == torch.float32:
            key = _key(each)
            if key[1]:
                yield key, each


def _key(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _is_there(p: Tensor) -> bool:
    """Whether the parameter is whole in memory now."""
    return p.numel() > 0 and p.untyped_storage().nbytes() > 0


def all_notes(strategy: Watched) -> list[Note]:
    """Of all ranks, the earliest first. Collective."""
    return sorted((note for notes in of_all(strategy.notes) for note in notes), key=lambda note: note.when)


def extent(off: Tensor) -> str:
    """Which elements, flat and boolean, in words."""
    where = off.nonzero().flatten()
    first, last = int(where[0]), int(where[-1]) + 1
    if len(where) == off.numel():
        return f"all {off.numel()} elements"
    if last - first == len(where):
        return f"elements {first} to {last} of {off.numel()}"
    return f"{len(where)} of {off.numel()} elements, from {first} to {last}"


def here() -> Place:
    """This rank, on the CPU."""
    return Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


@contextmanager
def under(kind: type[OwnStrategy]) -> Iterator[list[Any]]:
    """While open, the trainer gets strategies of this class; those that it got are in the list."""
    made: list[Any] = []

    def engine(own: Own, settings: Settings) -> OwnStrategy:
        made.append(kind(own, settings))
        return made[-1]

    with mock.patch("shardrun.own.engine.OwnStrategy", engine):
        yield made
