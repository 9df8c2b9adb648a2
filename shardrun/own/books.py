"""What a strategy of one's own should hold and send: what its lesson says (`Books` in the lesson's target.py)."""

from shardrun.own import OWN, target_of
from strategies.ledger.terms import StrategyBooks


def books(name: str) -> StrategyBooks:
    """For strategies.catalogue."""
    return target_of(OWN[name]).Books()  # type: ignore[no-any-return]
