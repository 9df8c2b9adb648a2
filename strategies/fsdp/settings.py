"""Which of FSDP2's settings can run on so many ranks. Plain Python, no torch."""

from collections.abc import Mapping
from typing import Any


def resharded_to(engine: Mapping[str, Any], ranks: int) -> int:
    """Ranks over which a wrapped unit's parameters lie between the forward and the backward pass: all that shard (true,
    the default), one, which keeps them whole (false, 1), or groups of neighbours of the size that is asked for.

    ranks: that shard, of one replica under HSDP.
    """
    asked = engine.get("reshard_after_forward", True)
    if isinstance(asked, bool):
        return ranks if asked else 1
    return int(asked)


def fsdp_refusal(engine: Mapping[str, Any], ranks: int) -> tuple[str, str] | None:
    """The first setting that cannot run, and why, with the way out; None where all can.

    ranks: of the launch. A size that is no divisor, `fully_shard` refuses too, after the process group has started.
    """
    shards = ranks // int(engine.get("replicas", 1))
    size = resharded_to(engine, shards)
    if not (0 < size <= shards and shards % size == 0):
        fits = ", ".join(str(n) for n in range(2, shards + 1) if shards % n == 0)
        return (
            "fsdp_reshard_after_forward",
            f"{size} ranks do not divide the {shards} that shard; write true, false{f' or one of {fits}' * bool(fits)}",
        )
    return None
