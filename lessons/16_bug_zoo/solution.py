"""Lesson 16, the bug zoo: the diagnoses, and one way to write the tests."""

import math
from collections.abc import Callable

import torch

Run = Callable[..., list]


def diagnose() -> dict[str, str]:
    """Norms first, then bytes, then what is left."""
    return {
        "badger": "local clip norm",  # the ranks' norms differ, and the 4 bytes of the all-reduce are missing
        "crane": "untied",  # 8 KiB more of parameters, and all that belongs to them
        "dingo": "optimizer first",  # the loss stays, and there are no optimizer states
        "egret": "data repeated",  # 8 different rows in a step of 16
        "ferret": "no_grad missing",  # the graph grows with every validation
        "gecko": "accumulation scaled twice",  # half the norm, with 2 micro-batches
        "heron": "parameter reduced",  # a norm as of half the rows, from 16 different ones
        "ibis": "one rank validates",  # it hangs, with rank 0 in the validation
        "jackal": "seeds differ",  # the ranks are apart at first
        "koala": "gradient summed",  # twice the norm, on 2 ranks
        "lynx": "target off by one",  # a loss below ln 4
        "marmot": "shards orthogonalised",  # Muon's all-gather is missing
    }


def step_bytes(embedding: int, inner: int, ranks: int) -> dict[str, float]:
    """Gradients once, parameters once, Muon's momentum once, and one number for the norm."""
    once = (ranks - 1) / ranks * 4
    return {
        "reduce_scatter": once * (embedding + inner),
        "all_gather": once * (embedding + inner) + once * inner,
        "all_reduce": 2 * once,
    }


def test_learns(run: Run) -> None:
    """Thirty steps are enough for both."""
    for report in run(ranks=2, steps=30):
        first, last = report.losses[0], report.losses[-1]
        assert last < first - 0.5, f"the loss stays where it was: {first:.2f}, {last:.2f}"
        assert min(report.losses) > math.log(4), f"{min(report.losses):.3f} is better than the data allow"


def test_one_process(run: Run) -> None:
    """The reference has nothing of what is tested: one rank, one micro-batch."""
    (alone,) = run(ranks=1, accumulation=1)
    for rank, report in enumerate(run(ranks=2, accumulation=2)):
        for step, (norm, right) in enumerate(zip(report.grad_norms, alone.grad_norms, strict=False)):
            assert math.isclose(norm, right, rel_tol=1e-3), f"step {step}, rank {rank}: norm {norm}, alone {right}"
        for step, (weights, right) in enumerate(zip(report.weights, alone.weights, strict=False)):
            for name, weight in weights.items():
                assert torch.allclose(weight, right[name], atol=1e-4), f"before step {step}, rank {rank}: {name}"


def test_memory(run: Run) -> None:
    """Against what they should hold, not against each other: half of nothing is nothing."""
    matrix = 64 * 32
    for ranks in (1, 2):
        for report in run(ranks=ranks):
            assert torch.equal(report.weights[-1]["embed"], report.weights[-1]["head"]), "the tie has come undone"
            assert report.held["parameters"] == 3 * matrix * 4, f"{report.held['parameters']} bytes of parameters"
            states = (2 * matrix + 2 * matrix) * 4 // ranks
            found = report.held["optimizer states"]
            assert found == states, f"{found} bytes of optimizer states in place of {states}"


def test_validation(run: Run) -> None:
    """The end first: a run that hangs has no results to compare."""
    reports = run(ranks=2, steps=12)
    for report in reports:
        assert not report.stuck, f"the ranks wait for each other: {report.stuck}"
    for rank, report in enumerate(reports):
        assert len(report.val_losses) == 2, f"rank {rank} has {len(report.val_losses)} results of two validations"
        assert report.val_losses == reports[0].val_losses, f"rank {rank} has other results than rank 0"
        assert not any(report.graph), f"rank {rank} keeps {report.graph[-1]:,} bytes for a backward pass"
