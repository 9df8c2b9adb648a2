"""Lesson 16, the bug zoo. First the diagnoses, from what demo.py shows; then the tests that kill.

A test gets `run`, which trains one animal: run(ranks=2, accumulation=2, steps=12) → a list of Reports, one per
rank (see `Report` in zoo.py for what is in them). ranks: 1, 2 or 4; accumulation: 1, 2 or 4. A test raises
AssertionError, with a message, where the trainer is broken, and does nothing where it is not.
"""

from collections.abc import Callable

import torch  # noqa: F401

Run = Callable[..., list]


def diagnose() -> dict[str, str]:
    """Animal → diagnosis, for all twelve: a key of DIAGNOSES in zoo.py, each of them once."""
    raise NotImplementedError


def step_bytes(embedding: int, inner: int, ranks: int) -> dict[str, float]:
    """Bytes that a rank of the healthy trainer sends in a step without validation, on a ring, in float32.

    embedding: elements of the embedding, which is the head as well (AdamW); inner: elements of all inner matrices
    (Muon). Everything divides by the ranks. Keys "reduce_scatter", "all_gather", "all_reduce".
    """
    raise NotImplementedError


def test_learns(run: Run) -> None:
    """Does the loss do what an honest loss can do? It has to fall, and it cannot fall below the entropy of the data.

    Each token is followed by one of four, all equally likely, among 64: ln 4 nats per token are left to the best model.
    """
    raise NotImplementedError


def test_one_process(run: Run) -> None:
    """Do several ranks that accumulate train as one process does that takes the whole batch at once?

    In everything that has to be equal: what goes into the optimizer, on every rank, and what comes out.
    """
    raise NotImplementedError


def test_memory(run: Run) -> None:
    """Does a rank hold what it should, of parameters and of optimizer states, and are ties still ties?

    "embed" has 64 × 32 elements and is "head" as well; "up" and "down" have 64 × 32 each, and go to Muon. AdamW keeps
    two float32 per element of this rank's rows, Muon one.
    """
    raise NotImplementedError


def test_validation(run: Run) -> None:
    """Does a run with validations come to its end, with one result on all ranks, and leave nothing behind?

    The trainer validates after every fifth step. `stuck` is empty if the run came to its end.
    """
    raise NotImplementedError
