"""What the demos of lessons 4 to 8 share: the same steps in one process, sharded by hand, and under a strategy.

Each training returns what it ended with, what a rank held before the last update, and what it sent in the last step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lessons.beside import load_beside as load_beside
from lessons.kit import CONFIG, build, cut, doing, held, open_text, steps, table
from shardrun.colours import COLOURS
from shardrun.own import Portion
from shardrun.tables import mib
from speedrun.data import Data
from speedrun.optim.policy import parameter_groups
from strategies.base import Strategy, clip_gradients
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.memory import measure
from strategies.ledger.terms import MODEL_STATES, Scenario
from strategies.ledger.wire import Meter, SentLine
from strategies.mesh import Place

STEPS, ACCUMULATION = steps(10), 2


class ByHand(Protocol):
    """What the hand-written strategies of lessons 4 to 7 have in common: that of their capstones (04_ddp/my_ddp.py)."""

    model: nn.Module

    def backward(self, loss: Tensor, last: bool) -> None: ...
    def wait(self) -> None: ...
    def parts(self) -> list[Portion]: ...
    def norm(self) -> Tensor: ...
    def update(self) -> None: ...
    def clear(self) -> None: ...
    def held(self) -> dict[str, list[Tensor]]: ...


@runtime_checkable
class ByHandAlone(Protocol):
    """That of lesson 8, which clips for itself."""

    model: nn.Module

    def backward(self, loss: Tensor, last: bool) -> None: ...
    def step(self) -> None: ...
    def held(self) -> dict[str, list[Tensor]]: ...
    def full_weights(self) -> dict[str, Tensor]: ...


@dataclass
class Trained:
    """weights: whole, by name, on the CPU; held: bytes by category before the last update; sent: in the last step."""

    weights: dict[str, Tensor]
    held: dict[str, int]
    sent: list[SentLine]

    def payload(self, *collectives: str) -> int:
        """Bytes of the last step by these collectives, without bookkeeping."""
        return sum(s.payload_bytes for s in self.sent if s.purpose == "payload" and s.collective in collectives)

    def away_from(self, other: "Trained") -> float:
        """The largest difference in a weight."""
        return max((self.weights[name] - other.weights[name]).abs().max().item() for name in self.weights)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The model's parameters in AdamW's groups, each with its own options and its rule."""
    named = dict(model.named_parameters())
    recipe = parameter_groups({name: tuple(p.shape) for name, p in named.items()}, CONFIG.optimizer)
    return [
        {**group.options, "rule": group.rule, "params": [named[name] for name in group.parameters]} for group in recipe
    ]


def micro_batches(
    data: Data, place: Place, step: int, accumulation: int = ACCUMULATION
) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """This rank's rows of a step's global batch in micro-batches: (whether it is the last one, tokens, targets)."""
    pieces = cut(data, place.world_size, accumulation).micro_batches(place.rank)
    for first, last in pieces:
        inputs, targets = data.batch(step, first, last)
        yield (first, last) == pieces[-1], inputs.to(place.device), targets.to(place.device)


def train_alone(device: torch.device, steps: int = STEPS, accumulation: int = ACCUMULATION) -> Trained:
    """One process, all rows, torch's AdamW over whole parameters: the reference."""
    doing(f"{steps} steps in one process")
    data, model = open_text(), build().to(device)
    optimizer = torch.optim.AdamW(groups_of(model))
    memory: dict[str, int] = {}
    for step in range(steps):
        for _, inputs, targets in micro_batches(data, Place(0, 1, device), step, accumulation):
            (model(inputs, targets) / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.optimizer.clip)
        memory = measure(
            {
                "parameters": list(model.parameters()),
                "master parameters": [],
                "gradients": [p.grad for p in model.parameters() if p.grad is not None],
                "optimizer states": [t for state in optimizer.state.values() for t in state.values()],
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    return Trained({name: p.detach().cpu().clone() for name, p in model.named_parameters()}, memory, [])


def train_by_hand(shards: ByHand | ByHandAlone, place: Place, steps: int = STEPS) -> Trained:
    """The same over all ranks, under a hand-written strategy."""
    doing(f"{steps} steps by hand")
    data, memory, sent = open_text(), dict[str, int](), list[SentLine]()
    for step in range(steps):
        with Meter() as meter:
            for last, inputs, targets in micro_batches(data, place, step):
                shards.backward(shards.model(inputs, targets) / ACCUMULATION, last)
            if isinstance(shards, ByHandAlone):
                memory = measure(shards.held())
                shards.step()
            else:
                memory = finish_step(shards)
        sent = meter.lines()
    weights = shards.full_weights() if isinstance(shards, ByHandAlone) else whole_weights(shards)
    return Trained(weights, memory, sent)


@torch.no_grad()
def finish_step(shards: ByHand) -> dict[str, int]:
    """What the trainer does after the passes of a step; returns what was held before the update."""
    shards.wait()
    memory = measure(shards.held())
    gradients = [part.gradient for part in shards.parts() if part.gradient is not None]
    clip_gradients(gradients, shards.norm(), CONFIG.optimizer.clip)
    shards.update()
    shards.clear()
    return memory


@torch.no_grad()
def whole_weights(shards: ByHand) -> dict[str, Tensor]:
    """Name → a copy of the whole parameter on the CPU. Collective."""
    parts = {part.parameter: part for part in shards.parts()}
    weights = {}
    for name, p in shards.model.named_parameters():
        whole = torch.zeros(2, p.numel(), device=p.device)  # the elements, and how many ranks have them
        if part := parts.get(p):
            here = slice(part.start, part.start + part.weight.numel())
            whole[0, here], whole[1, here] = part.weight, 1.0
        dist.all_reduce(whole)
        weights[name] = (whole[0] / whole[1]).view(p.shape).cpu()
    return weights


def train_strategy(strategy: Strategy, steps: int = STEPS) -> Trained:
    """The same under one of the trainer's strategies, prepared with `ACCUMULATION`: what speedrun/train.py does."""
    doing(f"{steps} steps under the library")
    data, memory, sent = open_text(), dict[str, int](), list[SentLine]()
    for step in range(steps):
        with Meter() as meter:
            for last, inputs, targets in micro_batches(data, strategy.optimizer.place, step):
                with strategy.micro_batch(last=last):
                    strategy.backward(strategy.model(inputs, targets))
            memory = held(strategy)
            strategy.step()
        sent = meter.lines()
    weights = {name: weight.cpu() for name, weight in strategy.optimizer.full_weights().items()}
    return Trained(weights, memory, sent)


def booked(run: Scenario, purpose: str, rank: int = 0) -> int:
    """Payload bytes of a step for a purpose ("gradients", "parameters") as the books predict them."""
    return sum(entry.payload_bytes for entry in predict_traffic(run, rank) if entry.purpose == purpose)


def on_the_wire(run: Scenario, rank: int = 0) -> float:
    """Ring bytes of a step as the books predict them, without bookkeeping."""
    return sum(entry.ring_bytes for entry in predict_traffic(run, rank) if entry.purpose != "bookkeeping")


def states_table(rows: dict[str, dict[str, int]]) -> str:
    """Model states in MiB, a line for each run, and their sum."""
    lines = []
    for name, memory in rows.items():
        sizes = [memory[category] for category in MODEL_STATES]
        lines.append([name, *(mib(size) for size in sizes), mib(sum(sizes))])
    return table(["", *MODEL_STATES, "all"], lines)


def books_by_ranks(columns: dict[str, Scenario]) -> tuple[str, dict[str, dict[str, int]]]:
    """The books of rank 0 for several runs: a table with what a step puts on the wire, and what is held, by name."""
    rows, lines = {}, []
    for name, run in columns.items():
        rows[name] = memory = predict_memory(run)[0]["after backward"]
        sizes = [memory[category] for category in MODEL_STATES]
        lines.append([name, *(mib(size) for size in sizes), mib(sum(sizes)), mib(on_the_wire(run))])
    return table(["ranks", *MODEL_STATES, "all", "sent a step"], lines), rows


def draw_states(axes: Any, rows: dict[str, dict[str, int]], title: str) -> None:
    """Stacked bars of model states in MiB."""
    bottom = [0.0] * len(rows)
    for category in MODEL_STATES:
        values = [memory[category] / 2**20 for memory in rows.values()]
        axes.bar(list(rows), values, 0.6, bottom=bottom, label=category, color=COLOURS[category])
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.set_title(title, loc="left")
    axes.set_ylim(0, 1.3 * max(bottom))
    axes.legend(frameon=False, ncols=2, fontsize=8)


def traffic_table(lines: Sequence[Sequence[str]]) -> str:
    return table(["", "off one process", "gradients", "parameters", "on a ring"], lines)


def traffic_line(name: str, away: float | None, gradients: int, parameters: int, ring: float) -> list[str]:
    """A line of `traffic_table`: payload bytes and ring bytes of a step."""
    return [name, "" if away is None else f"{away:.1e}", f"{gradients:,}", f"{parameters:,}", f"{ring:,.0f}"]


def ring_of(trained: Trained) -> float:
    """Ring bytes of the last step, without bookkeeping."""
    return sum(line.ring_bytes for line in trained.sent if line.purpose == "payload")
