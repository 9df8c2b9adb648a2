"""`shardrun plan --fit`: the largest micro-batch that fits, of every strategy and checkpointing, and what is best.

With a preset the batch of a step is given, so that a micro-batch is a divisor of a rank's rows and decides how often
gradients are accumulated. Of a shape the micro-batch is free, and so is the batch. With --simulate the engines
themselves are asked, on tensors without data, one step above and one below, and the largest that they hold is taken.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from shardrun.answers import json_answer
from shardrun.plan import money, show
from shardrun.plan.estimates import Estimate, Planned, estimate, fullest, inputs, kernels_for, planned, shaped
from shardrun.plan.money import WholeRun
from shardrun.prices import Price
from shardrun.tables import gib, paragraph, table, wrapped
from speedrun.books.kernels import Kernels
from speedrun.config import Config
from speedrun.run.asked import options_said
from strategies import catalogue
from strategies.errors import UserError
from strategies.ledger.hardware import Gpu

Way = Literal["none", "block", "selective"]
WAYS: tuple[Way, ...] = ("none", "selective", "block")
"""Of gradient checkpointing, those first that compute less again."""

LARGEST = 4096
"""Rows of a micro-batch at most."""


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch of a strategy on a number of ranks. `estimate` is None where not even one row fits."""

    strategy: str
    checkpointing: Way
    world_size: int
    estimate: Estimate | None
    training: WholeRun | None
    checked: str = ""
    """What a simulation said."""

    @property
    def tokens_per_s(self) -> float:
        assert self.estimate
        return self.estimate.tokens_per_s

    @property
    def preference(self) -> tuple[int, int]:
        """Of equals the one comes first that computes least again, and then the one that leaves most room."""
        assert self.estimate
        return WAYS.index(self.checkpointing), self.estimate.total

    @property
    def spent(self) -> float:
        """Money of the whole training; without a price its seconds on all GPUs."""
        assert self.training
        return self.training.money[0] if self.training.money else self.training.seconds[0] * self.world_size


class Search:
    """Over micro-batches, of one model on one number of ranks."""

    def __init__(self, config: Config, gpu: Gpu, arguments: argparse.Namespace, kernels: Kernels, world: int) -> None:
        self.config, self.gpu, self.arguments, self.kernels, self.world = config, gpu, arguments, kernels, world
        self.free = shaped(arguments) and not options_said(arguments.fields) & {"data.global_batch"}

    @property
    def tokens(self) -> int:
        """Of the whole training as it would be without a search on the ranks asked for, so that all fits can be
        compared: with a larger micro-batch a shape takes fewer steps.
        """
        stages = planned(self.config, self.arguments, self.arguments.world, self.kernels)
        return sum((each.stage.last - each.stage.first) * each.stage.tokens_per_step for each in stages)

    def stages(self, rows: int) -> list[Planned]:
        """The run with this micro-batch."""
        accumulation = (self.arguments.accumulation or 1) if self.free else None
        asked = argparse.Namespace(micro_batch=rows, accumulation=accumulation)
        return planned(self.config, asked, self.world, self.kernels)

    def candidates(self) -> list[int]:
        """Micro-batches that the trainer takes, in order: of a given batch the divisors of a rank's rows."""
        if self.free:
            return list(range(1, LARGEST + 1))
        shares = {stage.batches.rows for stage in self.stages(1)}
        return [rows for rows in range(1, max(shares) + 1) if any(share % rows == 0 for share in shares)]

    def of(self, strategy: str, rows: int) -> Estimate:
        return estimate(self.stages(rows), strategy, self.world, self.arguments.precision, self.gpu)

    def fits(self, strategy: str, rows: int) -> bool:
        memory = fullest(self.stages(rows), strategy, self.world, self.arguments.precision)[2]
        return sum(memory.values()) <= self.gpu.memory

    def largest(self, strategy: str) -> int:
        """The largest candidate that fits; 0 where none does. Of a given batch all are tried: one micro-batch alone
        keeps no gradients between two, and may fit where a smaller one does not.
        """
        sizes = self.candidates()
        if not self.free:
            return max((rows for rows in sizes if self.fits(strategy, rows)), default=0)
        low, high = 0, 1  # low fits, high may not
        while high <= LARGEST and self.fits(strategy, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(strategy, middle) else (low, middle)
        return min(low, LARGEST)

    def step(self, rows: int, by: int) -> int:
        """The next candidate above or below; 0 where there is none."""
        sizes = self.candidates()
        at = (sizes.index(rows) if rows else -1) + by
        return sizes[at] if 0 <= at < len(sizes) else 0


def run(config: Config, gpu: Gpu, arguments: argparse.Namespace, price: Price | None) -> int:
    found = list(fits(config, gpu, arguments, price))
    fewer = list(on_fewer_ranks(config, gpu, arguments, price, found))
    said = advice(found, fewer, arguments.world)
    if arguments.json:
        ways = list(dict.fromkeys(fit.checkpointing for fit in found))
        told = {**inputs(config, gpu, arguments), **money.as_input(price), "checkpointing": ways}
        notes = [money.price_in_words(price)]
        print(json_answer("plan", told, said, notes, fits=[row(fit) for fit in [*found, *fewer]]))
        return 0
    for line in said:
        paragraph(line)
    print()
    paragraph(f"{arguments.world} × {gpu.name}, {gib(gpu.memory)} GiB each, {arguments.precision}")
    headings = ["strategy", "checkpointing", "micro", "×", "total", "tokens/s", "hours", "from", "to"]
    currency = [price.currency] if price else []
    rows = [cells(fit, bool(currency)) for fit in found]
    table("The largest micro-batch that fits (rows; GiB of the fullest GPU)", [*headings, *currency], rows)
    wrapped("Price:", money.price_in_words(price))
    for fit in found:
        if fit.checked:
            wrapped(f"{fit.strategy}, {fit.checkpointing}:", fit.checked)
    if arguments.why and (least := next((fit.estimate for fit in found if fit.estimate), None)):
        show.why([least])
    return 0


def fits(config: Config, gpu: Gpu, arguments: argparse.Namespace, price: Price | None) -> Iterator[Fit]:
    """Of every strategy and checkpointing; of those that are asked for, where any is."""
    ways: tuple[Way, ...] = (arguments.checkpointing,) if arguments.checkpointing else WAYS
    there_are = catalogue.spread(arguments.world) or ("single",)
    names = arguments.strategies.split(",") if arguments.strategies else there_are
    for name in names:
        if name not in there_are:
            raise UserError(
                f"there is no strategy {name!r} to fit; on {arguments.world} ranks: {', '.join(there_are)}."
            )
    for name in names:
        for way in ways:
            yield one(config, gpu, arguments, price, name, way, arguments.world)


def one(
    config: Config, gpu: Gpu, arguments: argparse.Namespace, price: Price | None, name: str, way: Way, world: int
) -> Fit:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, checkpointing=way))
    search = Search(config, gpu, arguments, kernels_for(config, gpu, arguments), world)
    rows, checked = search.largest(name), ""
    if arguments.simulate:
        rows, checked = simulated(search, name, rows)
    if not rows:
        return Fit(name, way, world, None, None, checked)
    found = search.of(name, rows)
    tokens = None if config.tokens else search.tokens
    return Fit(name, way, world, found, money.training(search.stages(rows), found, gpu, price, tokens), checked)


def simulated(search: Search, name: str, rows: int) -> tuple[int, str]:
    """The largest micro-batch that a simulation holds, from what plan found on; and what it said."""
    while rows and not holds(search, name, rows):
        rows = search.step(rows, -1)
    while (above := search.step(rows, +1)) and holds(search, name, above):
        rows = above
    refused = f"{above} row{'s do' if above > 1 else ' does'} not fit" if above else "there is no larger one"
    return rows, f"simulated: {rows} row{'s' * (rows > 1)} fit, {refused}." if rows else f"simulated: {refused}."


def holds(search: Search, name: str, rows: int) -> bool:
    """Whether a simulated rank, with what lies outside the allocator, fits the GPU."""
    from shardrun.plan.simulation import simulate_one

    e = search.of(name, rows)
    found = simulate_one(e.planned, name, 0, search.world, search.arguments.precision)
    if found.replay is None:
        raise UserError(f"{name} cannot be simulated here: {found.refused}")
    outside = e.memory.get("context", 0) + e.memory.get("NCCL", 0)
    return found.allocated["peak"].allocated + outside <= search.gpu.memory


def on_fewer_ranks(
    config: Config, gpu: Gpu, arguments: argparse.Namespace, price: Price | None, found: list[Fit]
) -> Iterator[Fit]:
    """With the fastest's checkpointing on 1, 2, 4 … ranks below those asked for, where it may be cheaper; without a
    simulation.
    """
    plain = argparse.Namespace(**{**vars(arguments), "simulate": False})
    ways = [fastest(found).checkpointing] if any(fit.estimate for fit in found) else []
    world = 1
    while world < arguments.world:
        for name in catalogue.spread(world) if world > 1 else ("single",):
            for way in ways:
                try:
                    fit = one(config, gpu, plain, price, name, way, world)
                except UserError:  # the batch does not divide over so many ranks
                    continue
                if fit.estimate:
                    yield fit
        world *= 2


def fastest(found: list[Fit]) -> Fit:
    """Of those that fit."""
    return min((fit for fit in found if fit.estimate), key=lambda fit: (-round(fit.tokens_per_s), fit.preference))


def advice(found: list[Fit], fewer: list[Fit], world: int) -> list[str]:
    """The fastest on the ranks asked for, and the cheapest on these or fewer."""
    fitting = [fit for fit in found if fit.estimate]
    if not fitting:
        return [
            f"Nothing fits on {world} rank{'s' * (world > 1)}, not even a micro-batch of one row.",
            "Try more ranks, a larger --gpu or a smaller model.",
        ]
    cheapest = min([*fitting, *fewer], key=lambda fit: (round(fit.spent, 2), -fit.world_size, fit.preference))
    return [f"Fastest: {in_words(fastest(found))}.", f"Cheapest: {in_words(cheapest)}."]


def in_words(fit: Fit) -> str:
    assert fit.estimate and fit.training
    batches = fit.estimate.planned.batches
    paid = f", {fit.training.money[0]:,.2f} {fit.training.price.currency}" if fit.training.price else ""
    return (
        f"{fit.strategy} with checkpointing {fit.checkpointing} on {fit.world_size} "
        f"rank{'s' * (fit.world_size > 1)}, {batches.micro_batch} row{'s' * (batches.micro_batch > 1)} × "
        f"{batches.accumulation}, {fit.estimate.tokens_per_s:,.0f} tokens/s, {money.hours(fit.training.seconds[0])} "
        f"hours{paid}"
    )


def cells(fit: Fit, priced: bool) -> list[str]:
    if fit.estimate is None or fit.training is None:
        return [fit.strategy, fit.checkpointing, "none", *[""] * (7 if priced else 6)]
    e, batches = fit.estimate, fit.estimate.planned.batches
    hours = [money.hours(seconds) for seconds in fit.training.seconds]
    paid = [f"{fit.training.money[0]:,.2f}"] if fit.training.money else []
    row = [fit.strategy, fit.checkpointing, str(batches.micro_batch), str(batches.accumulation)]
    return [*row, gib(e.total), f"{e.tokens_per_s:,.0f}", *hours, *paid]


def row(fit: Fit) -> dict[str, Any]:
    """For JSON. micro_batch is 0 where nothing fits."""
    names = {"strategy": fit.strategy, "checkpointing": fit.checkpointing, "world_size": fit.world_size}
    if fit.estimate is None or fit.training is None:
        return {**names, "micro_batch": 0, "accumulation": 0, "checked": fit.checked or None}
    e = fit.estimate
    return {
        **names,
        "micro_batch": e.planned.batches.micro_batch,
        "accumulation": e.planned.batches.accumulation,
        "total": e.total,
        "total_range": show.total_range(e),
        "step_s": e.step_s,
        "step_range_s": list(e.step_range_s),
        "tokens_per_s": e.tokens_per_s,
        "checked": fit.checked or None,
        **fit.training.as_dict(),
    }
