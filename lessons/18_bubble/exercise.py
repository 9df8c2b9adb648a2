"""Lesson 18, the bubble. Write the five functions. All times are in seconds, all rates per second."""


def compute_seconds(parameters: int, tokens: int, ranks: int, rate: float, mfu: float) -> float:
    """How long a rank computes in one training step, forward and backward.

    parameters: all of them in matrix products; tokens: of the step, over all ranks; rate: operations per second at a
    GPU's peak; mfu: the share of it that is reached, 0 to 1.
    """
    raise NotImplementedError


def link_seconds(payload: int, collective: str, ranks: int, gigabits: float) -> float:
    """How long a collective takes on a ring of these ranks, without latency.

    payload: bytes, as lesson 3 counts it; collective: "all_reduce", "all_gather" or "reduce_scatter"; gigabits: the
    link's speed in Gb/s (10⁹ bits per second), each way.
    """
    raise NotImplementedError


def least_tokens(ranks: int, gradient_bytes: int, bandwidth: float, rate: float) -> float:
    """From how many tokens per rank and step on DDP's all-reduce fits into the time of backward. Not rounded.

    gradient_bytes: 4 for float32, 2 for bf16; bandwidth: bytes per second; rate: operations per second that are
    reached. All parameters are in matrix products; the all-reduce goes round a ring, without latency.
    """
    raise NotImplementedError


def record_seconds(traffic: list[dict], bandwidth: float, latency: float) -> float:
    """How long the communication of a step of a run would take on a link, if nothing were hidden.

    traffic: of a rank, as it stands in a run's ledger.json: a dictionary per collective with `collective`, `purpose`,
    `calls`, `predicted`, `measured` and `remainder` (bytes of payload) and `ring_bytes`; bandwidth: bytes per second;
    latency: seconds per call.
    """
    raise NotImplementedError


def exposed(backward: list[float], messages: list[float]) -> float:
    """How long after the end of backward the last bucket of gradients has arrived, under DDP.

    backward[i]: seconds of backward from when bucket i − 1 is complete (or from the start) until bucket i is; the last
    bucket is complete when backward ends. messages[i]: seconds that bucket i takes on the link. The link carries one
    message at a time, in order, while backward goes on.
    """
    raise NotImplementedError
