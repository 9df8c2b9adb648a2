"""Other right solutions of lesson 16, differently built: the check must pass them."""

import math

import torch

from lessons.checking import right_attempt


@right_attempt("diagnose")
def from_bug_to_animal():
    bugs = {
        "target off by one": "lynx",
        "gradient summed": "koala",
        "parameter reduced": "heron",
        "accumulation scaled twice": "gecko",
        "shards orthogonalised": "marmot",
        "optimizer first": "dingo",
        "untied": "crane",
        "seeds differ": "jackal",
        "data repeated": "egret",
        "local clip norm": "badger",
        "no_grad missing": "ferret",
        "one rank validates": "ibis",
    }
    return {animal: bug for bug, animal in bugs.items()}


@right_attempt("test_learns")
def in_one_process(run):
    (report,) = run(1, 1, 40)
    late = sum(report.losses[-5:]) / 5
    assert math.log(4) <= min(report.losses) and late < 0.8 * report.losses[0], f"it ends at {late:.2f}"


@right_attempt("test_one_process")
def by_torch_testing(run):
    alone = run(1, accumulation=1)[0]
    for report in run(2, 4):
        norms, right = torch.tensor(report.grad_norms), torch.tensor(alone.grad_norms)
        torch.testing.assert_close(norms, right[: len(norms)], rtol=1e-3, atol=0)
        for weights, due in zip(report.weights, alone.weights, strict=False):
            torch.testing.assert_close(weights, due, rtol=0, atol=1e-4)


@right_attempt("test_memory")
def against_a_table(run):
    for ranks, states in ((1, 32768), (2, 16384), (4, 8192)):
        held = [report.held for report in run(ranks, 1, 4)]
        assert held == ranks * [{"parameters": 24576, "optimizer states": states}], held


@right_attempt("test_validation")
def with_sets(run):
    reports = run(ranks=4, accumulation=1, steps=11)
    assert {report.stuck for report in reports} == {""}, "it hangs"
    assert len({tuple(report.val_losses) for report in reports}) == 1 and len(reports[0].val_losses) == 2, "results"
    assert max(max(report.graph) for report in reports) == 0, "something is kept"
