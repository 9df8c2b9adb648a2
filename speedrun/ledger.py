"""A run's books: what every rank was predicted to hold and to send in a step, what it did, and the remainder.

Measured in one step of the run, the second: the optimizer's state exists by then, and engines have settled (DDP has
laid out its buckets, ZeRO-3 has recorded the order of modules). Predicted from the configuration alone.
"""

from typing import Any

import torch.distributed as dist

from speedrun.config import Config
from speedrun.shapes import parameter_groups, parameter_shapes
from strategies.base import CATEGORIES, Strategy
from strategies.ledger.memory import measure
from strategies.ledger.predict import Held, Run, predict_memory
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
        self.meter = Meter()

    def step(self) -> Meter:
        """A context that notes every collective of the step."""
        return self.meter

    def note(self, moment: str) -> None:
        """Measure what this rank holds now."""
        self.held[moment] = measure(self.strategy.held())

    def gather(self) -> list[dict[str, Any]]:
        """Every rank's books, on every rank. Collective."""
        ours = {"rank": self.rank, "memory": self._memory(), "traffic": self._traffic()}
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


def entry(predicted: int, measured: int) -> dict[str, int]:
    """A line of the books."""
    return {"predicted": predicted, "measured": measured, "remainder": measured - predicted}
