"""What DeepSpeed's ZeRO-1, -2 and -3 hold, send and hide: books_flat.py and books_partitioned.py. Plain Python."""

from strategies.ledger.terms import StrategyBooks
from strategies.zero.books_flat import FlatBooks
from strategies.zero.books_partitioned import PartitionedBooks


def books(name: str) -> StrategyBooks:
    """For strategies.catalogue."""
    stage = int(name.removeprefix("zero"))
    return PartitionedBooks(stage) if stage == 3 else FlatBooks(stage)
