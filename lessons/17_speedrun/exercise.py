"""Lesson 17, The speedrun. Write the five functions; `shardrun lesson check 17` says what is right."""

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 97.5th percentile, for 1, 2, … 10 degrees of freedom: T_975[0] is for 1."""


def read_record(text: str) -> list[tuple[int, float, float]]:
    """Every validation of a record: (step, validation loss, seconds of training so far), in order.

    text: a whole record.txt. It begins with the run's own source; its log lines begin with "step:", such as
    "step:20/60 train_loss:2.6489 val_loss:2.6411 bits_per_byte:3.8122 train_time:6465ms step_avg:323.26ms". Not every
    step has a val_loss, step 0 has no train_loss, and bits_per_byte is not always there.
    """
    raise NotImplementedError


def tokens_to_target(curve: list[tuple[int, float]], target: float) -> float | None:
    """Tokens after which the validation loss first comes down to `target`; None if it never does.

    curve: (tokens, validation loss) of every validation, in order; the first one lies above the target. Between two
    validations the loss counts as a straight line.
    """
    raise NotImplementedError


def step_ms(train_time_ms: list[float]) -> dict[str, float]:
    """{"average": milliseconds per step over the whole run, "median": milliseconds of the median step}.

    train_time_ms: milliseconds of training after the first, second, third … timed step, as they stand in metrics.jsonl.
    """
    raise NotImplementedError


def mfu(matrices: int, layers: int, width: int, length: int, tokens_per_second: float, gpus: int, peak: float) -> float:
    """Model FLOPs utilisation: which share of the GPUs' peak goes into what the model needs, 0 to 1.

    matrices: elements of all weight matrices, the head among them (not an embedding of its own); length: tokens of a
    row; tokens_per_second: of all GPUs together; peak: of one GPU, in operations per second. A product with a matrix
    takes 2 operations per element and token, backward twice that again. Causal attention takes 6 · layers · width ·
    length per token, forward and backward.
    """
    raise NotImplementedError


def paired(changed: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """What a change does to the loss: (mean difference, low, high), the latter two the mean's 95 % interval.

    changed[i] and baseline[i] are of the same seed: a pair. Difference: changed − baseline. The interval is mean ± t ·
    s / √n, with s the standard deviation of a sample (n − 1), and t for n − 1 degrees of freedom, from T_975.
    """
    raise NotImplementedError
