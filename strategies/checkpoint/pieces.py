"""Which tensors a training run is made of, and which elements of each this rank has.

    weight/NAME        the float32 weight of a parameter: ZeRO's master where it keeps one
    BUFFER/NAME        each of its optimizer states: Muon's momentum_buffer, AdamW's exp_avg and exp_avg_sq, …; of the
                       parameter's shape, or one number per row or column of a matrix (NorMuon's second_moment)
    step/NAME          AdamW's step count, a single number

All of it comes from the optimizer's slices (strategies/optimizer.py), so a new rule or buffer needs nothing here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.layout import Interval, Intervals, Shape, equal_cuts, everywhere, on_rank
from strategies.mesh import Place
from strategies.optimizer import IntervalOptimizer


@dataclass(frozen=True)
class HeldPart:
    """A rank's part of a tensor: `local` are the elements `held[rank]`, flat, as a view of what the optimizer uses."""

    name: str
    shape: Shape
    held: Intervals
    local: Tensor

    def share(self, place: Place) -> tuple[Interval, Tensor]:
        """The elements that this rank saves: of what n ranks hold exactly alike, the k-th saves the k-th of n cuts."""
        here = self.held[place.rank]
        alike = [rank for rank, other in enumerate(self.held) if other == here]
        turn = place.replica * len(alike) + alike.index(place.rank)
        start, stop = equal_cuts((here.numel,), place.replicas * len(alike))[turn]
        return Interval(here.start + start, here.start + stop), self.local[start:stop]


def parts(optimizer: IntervalOptimizer) -> Iterator[HeldPart]:
    """What this rank holds of every tensor of the run, the ones of which it holds nothing left out.

    Raises RuntimeError where there is no optimizer state yet.
    """
    rank, world_size = optimizer.place.rank, optimizer.place.world_size
    for piece in optimizer.all_slices():
        shape, held = piece.shape, piece.state
        weight = everywhere(shape, world_size) if piece.replicated else held
        if weight[rank].numel:
            yield HeldPart(f"weight/{piece.name}", shape, weight, optimizer.weight(piece))
        if not held[rank].numel:
            continue
        if not optimizer.state.get(piece.holder):
            raise RuntimeError(f"{piece.name} has no optimizer state yet: a checkpoint needs a step, or `initialize`.")
        rule = optimizer.rules[piece.name]
        for buffer in rule.buffers:
            yield HeldPart(f"{buffer}/{piece.name}", shape, held, optimizer.state_of(piece, buffer))
        if not rule.whole_matrix:
            having = tuple(Interval(0, int(other.numel > 0)) for other in held)
            yield HeldPart(f"step/{piece.name}", (), having, optimizer.state[piece.holder]["step"].view(1))
        if rule.matrix_buffers and optimizer.owners[piece.name] == rank:
            whole = (max(shape),)
            owned = on_rank(whole, rank, world_size)
            for buffer, state in optimizer.matrix_state(piece).items():
                yield HeldPart(f"{buffer}/{piece.name}", whole, owned, state)


def expected(optimizer: IntervalOptimizer) -> dict[str, Shape]:
    """Every tensor of the run by name, whoever holds it, with its shape."""
    shapes: dict[str, Shape] = {}
    for piece in optimizer.all_slices():
        rule = optimizer.rules[piece.name]
        shapes |= {f"{kind}/{piece.name}": piece.shape for kind in ("weight", *rule.buffers)}
        shapes |= {f"{buffer}/{piece.name}": (max(piece.shape),) for buffer in rule.matrix_buffers}
        if not rule.whole_matrix:
            shapes[f"step/{piece.name}"] = ()
    return shapes


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators in this process, uint8, by name."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `generators` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
