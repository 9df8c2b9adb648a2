"""Hours and money of a whole training: the preset's steps, or a budget of tokens."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from shardrun.plan.estimates import Estimate, Planned, estimate
from shardrun.prices import Price, parse_price, price_of
from shardrun.tables import table, wrapped
from strategies.ledger.hardware import Gpu


@dataclass(frozen=True)
class WholeRun:
    """Of one strategy. Seconds with the least and the most that measured rows allow; money in the price's currency."""

    tokens: int
    steps: int
    seconds: tuple[float, float, float]
    """Expected, least, most."""
    price: Price | None
    world_size: int

    @property
    def money(self) -> tuple[float, ...]:
        """Expected, least, most; nothing without a price."""
        per_second = self.price.amount * self.world_size / 3600 if self.price else 0.0
        return tuple(seconds * per_second for seconds in self.seconds) if self.price else ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        bounds = ("expected", "least", "most")
        hours = {name: seconds / 3600 for name, seconds in zip(bounds, self.seconds, strict=True)}
        money = dict(zip(bounds, self.money, strict=True)) if self.price else None
        currency = self.price.currency if self.price else None
        said = {"tokens": self.tokens, "steps": self.steps, "hours": hours, "money": money, "currency": currency}
        return {"training": said}


def asked(gpu: Gpu, arguments: argparse.Namespace) -> Price | None:
    """The price asked for, or the table's; None for a GPU that it lacks. Raises UserError for a price that is none."""
    return parse_price(arguments.price) if arguments.price is not None else price_of(gpu)


def as_input(price: Price | None) -> dict[str, Any]:
    """For JSON."""
    return {"price": dataclasses.asdict(price) if price else None}


def training(stages: list[Planned], e: Estimate, gpu: Gpu, price: Price | None, budget: int | None = None) -> WholeRun:
    """All stages of the run under the strategy of an estimate: the preset's steps, or those of --steps or --tokens.

    budget: tokens in their place, in the stages' proportions.
    """
    seconds, tokens, steps = [0.0, 0.0, 0.0], 0, 0
    for planned in stages:
        books = e.books
        one = e
        if len(stages) > 1:
            one = estimate([planned], e.strategy, books.world_size, books.precision, gpu, books.engine)
        count = planned.stage.last - planned.stage.first
        for i, each in enumerate((one.step_s, *one.step_range_s)):
            seconds[i] += count * each
        tokens, steps = tokens + count * planned.stage.tokens_per_step, steps + count
    factor = budget / tokens if budget else 1.0
    expected, least, most = (factor * each for each in seconds)
    return WholeRun(budget or tokens, round(factor * steps), (expected, least, most), price, e.books.world_size)


def show(price: Price | None, estimates: list[Estimate], trainings: list[WholeRun]) -> None:
    """Hours and money of each strategy that fits."""
    rows = []
    for e, each in zip(estimates, trainings, strict=True):
        if e.fits:
            money = [f"{amount:,.2f}" for amount in each.money]
            rows.append([e.strategy, *(hours(seconds) for seconds in each.seconds), *money])
    if rows:
        first = trainings[0]
        what = f"{first.tokens / 1e9:,.3f} billion tokens, {first.steps:,} steps"
        money = [price.currency, "from", "to"] if price else []
        table(f"The whole training of {what}, where it fits", ["strategy", "hours", "from", "to", *money], rows)
    wrapped("Price:", price_in_words(price))


def price_in_words(price: Price | None) -> str:
    """Which price, and where from."""
    return f"{price}." if price else "the table has none for this GPU; give one with --price 2.49."


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f}" if seconds >= 36 else f"{seconds / 3600:.4f}"
