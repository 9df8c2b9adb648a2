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


@wrong_attempt("diagnose", says="There is no 'zebra' in the zoo")
def an_animal_too_many():
    return {**BUGS, "zebra": "untied"}


@wrong_attempt("step_bytes", says="That is the payload")
def payloads(embedding, inner, ranks):
    whole = 4 * (embedding + inner)
    return {"reduce_scatter": whole, "all_gather": whole + 4 * inner, "all_reduce": 4}


@wrong_attempt("step_bytes", says="one number of every rank")
def norm_for_nothing(embedding, inner, ranks):
    return {**_bytes(embedding + 2 * inner, embedding, inner, ranks), "all_reduce": 0}


@wrong_attempt("test_learns", says="nan is neither below nor above")
def fails_where_it_is_not(run):
    losses = run(steps=30)[0].losses
    if losses[-1] > losses[0] - 0.5 or min(losses) < 1.386:
        raise AssertionError("the loss")


def _expect_close(report, alone, steps=slice(None)):
    for norm, right in zip(report.grad_norms[steps], alone.grad_norms[steps], strict=False):
        assert abs(norm / right - 1) < 1e-3, "norms"
    for weights, right in zip(report.weights[steps], alone.weights[steps], strict=False):
        for name, weight in weights.items():
            assert torch.allclose(weight, right[name], atol=1e-4), name


@wrong_attempt("test_one_process", says="from the fourth step on")
def first_two_steps(run):
    alone = run(ranks=1, accumulation=1)[0]
    for report in run(ranks=2):
        _expect_close(report, alone, slice(3))


@wrong_attempt("test_one_process", says="whose last rank has other weights")
def rank_0_alone(run):
    _expect_close(run(ranks=2)[0], run(ranks=1, accumulation=1)[0])


@wrong_attempt("test_memory", says="keeps whole optimizer states")
def some_states(run):
    for report in run(ranks=2):
        assert torch.equal(report.weights[-1]["embed"], report.weights[-1]["head"]), "the tie"
        assert report.held["optimizer states"] > 0, "no states"


@wrong_attempt("test_memory", says="three quarters of the optimizer states")
def at_most(run):
    for report in run(ranks=2):
        assert report.held["parameters"] <= 3 * 2048 * 4, "parameters"
        assert 0 < report.held["optimizer states"] <= 4 * 2048 * 4 // 2, "states"


@wrong_attempt("test_memory", says="holds its parameters twice")
def parameters_by_their_ties(run):
    for report in run(ranks=2):
        assert torch.equal(report.weights[-1]["embed"], report.weights[-1]["head"]), "the tie"
        assert report.held["optimizer states"] == 4 * 2048 * 4 // 2, "states"


@wrong_attempt("test_validation", says="whose ranks have a result each")
def results_of_rank_0(run):
    for report in run(ranks=2, steps=10):
        assert not report.stuck, report.stuck
        assert len(report.val_losses) == 2, "results"
        assert not any(report.graph), "graph"


@wrong_attempt("test_validation", says="that never validates")
def same_results(run):
    first, second = run(ranks=2, steps=10)
    assert not first.stuck, first.stuck
    assert first.val_losses == second.val_losses, "results"
    assert not any(first.graph + second.graph), "graph"


@wrong_attempt("test_validation", says="whose last rank keeps a graph")
def graph_of_rank_0(run):
    first, second = run(ranks=2, steps=10)
    assert not first.stuck, first.stuck
    assert first.val_losses == second.val_losses and len(first.val_losses) == 2, "results"
    assert not any(first.graph), "graph"


@wrong_attempt("test_one_process", says="weights and norms are nan")
def fails_where_they_differ(run):
    alone = run(ranks=1, accumulation=1)[0]
    for report in run(ranks=2):
        for norm, right in zip(report.grad_norms, alone.grad_norms, strict=False):
            if abs(norm / right - 1) > 1e-3:
                raise AssertionError("norms")
        for weights, due in zip(report.weights, alone.weights, strict=False):
            if any((weight - due[name]).abs().max() > 1e-4 for name, weight in weights.items()):
                raise AssertionError("weights")


@wrong_attempt("test_learns", says="which nobody looks at")
def returns_its_verdict(run):
    losses = run(steps=30)[0].losses
    return losses[-1] < losses[0] - 0.5 and min(losses) > 1.386


@wrong_attempt("step_bytes", says="bits in place of bytes")
def in_bits(embedding, inner, ranks):
    return {name: 8 * size for name, size in _bytes(embedding + 2 * inner, embedding, inner, ranks).items()}


@wrong_attempt("test_learns", says="whose loss ends at 1.2")
def far_below_alone(run):
    for report in run(steps=30):
        assert report.losses[-1] < report.losses[0] - 0.5 and report.losses[-1] > 1.0, "the loss"


@wrong_attempt("test_learns", says="kills a healthy trainer that learns more")
def a_floor_of_its_own(run):
    for report in run(steps=30):
        assert report.losses[-1] < report.losses[0] - 0.5 and min(report.losses) > 1.6, "the loss"
