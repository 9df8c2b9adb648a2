"""What an hour of a GPU costs: the one table of prices. Plain Python.

Prices move from week to week and differ fivefold between providers. These are defaults as of their date, of one
marketplace that lists all four cards; give the price that you are offered with --price.
"""

import re
from dataclasses import dataclass

from strategies.errors import UserError
from strategies.ledger.hardware import GPUS, Gpu

READ, SOURCE = "2026-09-20", "akash.network/pricing/gpus, on demand, starting at"
PER_HOUR = {"h100": 2.71, "h200": 4.45, "a100": 1.71, "rtx4090": 0.39}
"""Name of a GPU → US dollars for one of them for an hour."""


@dataclass(frozen=True)
class Price:
    """amount: for one GPU for an hour, in that currency; source: where from, and as of when."""

    amount: float
    currency: str
    source: str

    def __str__(self) -> str:
        return f"{self.amount:,.2f} {self.currency} per GPU and hour ({self.source})"


def price_of(gpu: Gpu) -> Price | None:
    """The table's price; None for a GPU that it lacks."""
    name = next((name for name, known in GPUS.items() if known.name == gpu.name), "")
    if name not in PER_HOUR:
        return None
    return Price(PER_HOUR[name], "USD", f"a default, read on {READ}: {SOURCE}; --price overrides it")


def parse_price(text: str) -> Price:
    """'2.49', '2.49USD' or '210INR'. Without a currency it is US dollars. Raises UserError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]{3})?", text.strip())
    amount = float(match[1]) if match else 0.0
    if not match or not 0 < amount < 1e9:
        raise UserError(
            f"--price {text!r} is no price of a GPU for an hour; write for example 2.49, 2.49USD or 210INR."
        )
    return Price(amount, (match[2] or "USD").upper(), "--price")
