"""A run's books: what every rank was predicted to hold and to send in a step, what it did, and the remainder.

Measured in one step of the run, the third or the next one that does not follow a validation: the optimizer's state
exists by then, and engines have settled (in their second step DDP agrees on its buckets and ZeRO-3 on the order of
modules, which it forgets in a validation). Predicted from the configuration alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.config import Config
from speedrun.shapes import parameter_groups, parameter_shapes
from strategies.base import CATEGORIES, Strategy
from strategies.ledger.memory import measure
from strategies.ledger.predict import Held, Run, predict_memory, predict_states
from strategies.ledger.traffic import predict_traffic
from strategies.ledger.wire import Meter
from strategies.select import Launch


class Books:
    """The books of one rank. Open around a step:

    with books.step():
        … forward and backward …
        books.note("after backward")
        strategy.step()
    books.note("after step")
    """

    def __init__(self, config: Config, launch: Launch, accumulation: int, strategy: Strategy):
        shapes, groups = parameter_shapes(config.model), parameter_groups(config)
        self.run = Run(
            launch.strategy, shapes, groups, launch.world_size, launch.precision, accumulation, launch.engine
        )
        self.rank, self.strategy = launch.rank, strategy
        self.held: dict[str, Held] = {}
        self.states: dict[str, int] = {}
        self.allocator: dict[str, dict[str, int]] = {}
        self.meter = Meter()

    def step(self) -> Meter:
        """A context that notes every collective of the step."""
        return self.meter

    def note(self, moment: str) -> None:
        """Measure what this rank holds now."""
        self.held[moment] = measure(self.strategy.held())
        self.states = state_by_group(self.strategy)
        device = self.strategy.optimizer.place.device
        if device.type == "cuda":
            allocated = torch.cuda.memory_allocated(device)
            self.allocator[moment] = {
                "allocated": allocated,
                "reserved": torch.cuda.memory_reserved(device),
                "peak allocated": torch.cuda.max_memory_allocated(device),
                # Activations, temporaries, rounding to 512 bytes: whatever no category of the books holds.
                "allocated, in no category": allocated - sum(self.held[moment].values()),
            }

    def gather(self) -> list[dict[str, Any]]:
        """Every rank's books, on every rank. Collective."""
        ours = {
            "rank": self.rank,
            "memory": self._memory(),
            "optimizer states by group": {
                name: entry(predict_states(self.run)[self.rank].get(name, 0), found)
                for name, found in self.states.items()
            },
            "allocator": self.allocator,
            "traffic": self._traffic(),
        }
        ranks: list[Any] = [ours] * self.run.world_size
        if self.run.world_size > 1:
            dist.all_gather_object(ranks, ours)
        return ranks

    def _memory(self) -> dict[str, dict[str, dict[str, int]]]:
        """Moment → category → predicted, measured and remainder, in bytes."""
        predicted = predict_memory(self.run)[self.rank]
        return {
            moment: {
                category: entry(predicted[moment].get(category, 0), held.get(category, 0)) for category in CATEGORIES
            }
            for moment, held in self.held.items()
        }

    def _traffic(self) -> list[dict[str, Any]]:
        """Per collective, payload and bookkeeping apart: calls, and predicted, measured and remainder in bytes."""
        lines: dict[tuple[str, str], dict[str, Any]] = {}

        def line(collective: str, purpose: str) -> dict[str, Any]:
            empty = {"calls": 0, "predicted": 0, "measured": 0, "ring_bytes": 0.0}
            return lines.setdefault((collective, purpose), empty)

        for expected in predict_traffic(self.run, self.rank):
            purpose = "bookkeeping" if expected.purpose == "bookkeeping" else "payload"
            line(expected.collective, purpose)["predicted"] += expected.payload_bytes
        for found in self.meter.lines():
            row = line(found.collective, found.purpose)
            row |= {"calls": found.calls, "measured": found.payload_bytes, "ring_bytes": found.ring_bytes}
        return [
            {"collective": collective, "purpose": purpose, **row, "remainder": row["measured"] - row["predicted"]}
            for (collective, purpose), row in lines.items()
        ]


def counted_step(steps: int, eval_every: int) -> int:
    """The step whose books are kept; the last one where none is as the module's docstring wants it."""
    return next((step for step in range(2, steps) if not eval_every or step % eval_every), steps - 1)


def state_by_group(strategy: Strategy) -> dict[str, int]:
    """Bytes of optimizer state per line of the policy table: Muon's momentum, AdamW's moments of each kind."""
    optimizer = strategy.optimizer
    groups = {name: group["name"] for group in optimizer.param_groups for name in group["names"]}
    held: dict[str, dict[int, Tensor]] = {name: {} for name in groups.values()}
    for piece in optimizer.all_slices():
        for tensor in optimizer.state.get(piece.holder, {}).values():
            held[groups[piece.name]][id(tensor)] = tensor
    return {name: sum(t.numel() * t.element_size() for t in tensors.values()) for name, tensors in held.items()}


def entry(predicted: int, measured: int) -> dict[str, int]:
    """A line of the books."""
    return {"predicted": predicted, "measured": measured, "remainder": measured - predicted}
