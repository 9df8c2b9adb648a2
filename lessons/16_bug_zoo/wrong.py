"""Wrong attempts at lesson 16, and what their message must say."""

import torch

from lessons.checking import wrong_attempt

BUGS = {
    "badger": "local clip norm",
    "crane": "untied",
    "dingo": "optimizer first",
    "egret": "data repeated",
    "ferret": "no_grad missing",
    "gecko": "accumulation scaled twice",
    "heron": "parameter reduced",
    "ibis": "one rank validates",
    "jackal": "seeds differ",
    "koala": "gradient summed",
    "lynx": "target off by one",
    "marmot": "shards orthogonalised",
}


@wrong_attempt("diagnose", says="exactly world_size times")
def factors_exchanged():
    return {**BUGS, "gecko": BUGS["koala"], "koala": BUGS["gecko"]}


@wrong_attempt("diagnose", says="noisier norms, all rows read")
def noises_exchanged():
    return {**BUGS, "egret": BUGS["heron"], "heron": BUGS["egret"]}


@wrong_attempt("diagnose", says="more than once (egret and heron)")
def the_same_twice():
    return {**BUGS, "egret": BUGS["heron"]}


@wrong_attempt("diagnose", says="no diagnosis for lynx")
def one_forgotten():
    return {animal: bug for animal, bug in BUGS.items() if animal != "lynx"}


def _bytes(gathered, embedding, inner, ranks, scattered=1):
    once = (ranks - 1) / ranks * 4
    return {
        "reduce_scatter": scattered * once * (embedding + inner),
        "all_gather": once * gathered,
        "all_reduce": 2 * once,
    }


@wrong_attempt("step_bytes", says="Muon's momentum is missing")
def parameters_only(embedding, inner, ranks):
    return _bytes(embedding + inner, embedding, inner, ranks)


@wrong_attempt("step_bytes", says="AdamW treats every number alone")
def all_momenta(embedding, inner, ranks):
    return _bytes(2 * (embedding + inner), embedding, inner, ranks)


@wrong_attempt("step_bytes", says="two passes of the ring")
def all_reduced(embedding, inner, ranks):
    return _bytes(embedding + 2 * inner, embedding, inner, ranks, scattered=2)


@wrong_attempt("test_learns", says="never calls run")
def passes_all(run):
    pass


@wrong_attempt("test_learns", says="lets lynx live: its loss comes far below what the data allow")
def only_falls(run):
    for report in run(steps=30):
        assert report.losses[-1] < report.losses[0] - 0.5


@wrong_attempt("test_learns", says="its loss never falls")
def only_the_floor(run):
    for report in run(steps=30):
        assert min(report.losses) > 1.386


@wrong_attempt("test_learns", says="kills the healthy trainer")
def reaches_the_entropy(run):
    assert run(steps=30)[0].losses[-1] < 1.386, "not at the entropy"


@wrong_attempt("test_learns", says="with another seed")
def learnt_by_heart(run):
    report = run(steps=2, ranks=1, accumulation=1)[0]
    assert abs(report.losses[0] - 4.1982) < 1e-3, "another loss"


@wrong_attempt("test_one_process", says="lets badger live")
def runs_and_looks_away(run):
    run(ranks=2)


def _same_weights(run, **alone):
    right = run(ranks=1, **alone)[0].weights[-1]
    for report in run(ranks=2):
        for name, weight in report.weights[-1].items():
            assert torch.allclose(weight, right[name], atol=1e-4), name


@wrong_attempt("test_one_process", says="do not notice a factor")
def weights_only(run):
    _same_weights(run, accumulation=1)


@wrong_attempt("test_one_process", says="one that accumulates as well has the same bug")
def accumulating_reference(run):
    _same_weights(run)
    alone = run(ranks=1)[0].grad_norms
    for report in run(ranks=2):
        assert all(abs(norm / right - 1) < 1e-3 for norm, right in zip(report.grad_norms, alone, strict=True)), "norms"


@wrong_attempt("test_one_process", says="Sums in another order round differently")
def exactly(run):
    alone = run(ranks=1, accumulation=1)[0]
    for report in run(ranks=2):
        assert report.grad_norms == alone.grad_norms, "norms"


@wrong_attempt("test_one_process", says="a rank's losses are those of its own rows")
def own_losses(run):
    alone = run(ranks=1, accumulation=1)[0]
    for report in run(ranks=2):
        assert all(abs(a - b) < 1e-3 for a, b in zip(report.losses, alone.losses, strict=True)), "losses"


@wrong_attempt("test_memory", says='"embed" and "head"')
def states_only(run):
    for ranks in (1, 2):
        for report in run(ranks=ranks):
            assert report.held["optimizer states"] in (4 * 4 * 2048 // ranks, 6 * 4 * 2048 // ranks)


@wrong_attempt("test_memory", says="Half of nothing is nothing")
def states_halved(run):
    one, two = run(ranks=1)[0].held, run(ranks=2)[0].held
    assert two["optimizer states"] * 2 == one["optimizer states"], "not half"
    assert two["parameters"] == 3 * 2048 * 4, "parameters"


@wrong_attempt("test_memory", says="optimizer states are of the rank's rows alone")
def states_whole(run):
    for report in run(ranks=2):
        assert report.held["optimizer states"] == 4 * 4 * 2048, "states"


@wrong_attempt("test_validation", says="Report.graph")
def comes_to_its_end(run):
    for report in run(ranks=2):
        assert not report.stuck, report.stuck


@wrong_attempt("test_validation", says="does not fail but breaks: IndexError")
def last_results(run):
    first, second = run(ranks=2)
    assert first.val_losses[-1] == second.val_losses[-1]
    assert not first.graph[-1]


@wrong_attempt("test_validation", says="It validates after every fifth step")
def every_step(run):
    for report in run(ranks=2, steps=12):
        assert len(report.val_losses) == 12, "too few validations"
