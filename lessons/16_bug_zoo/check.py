"""Checks of lesson 16. The learner's tests are tried on healthy trainers, and on the animals that they have to kill."""

import sys
from functools import partial
from pathlib import Path

import torch

from lessons.cases import formula, st
from lessons.checking import Wrong, expect, expect_numbers

sys.path.insert(0, str(Path(__file__).parent))

from animals import ANIMALS  # noqa: E402
from zoo import DIAGNOSES, Trainer, run  # noqa: E402

KILLS = {
    "test_learns": ("lynx", "dingo"),
    "test_one_process": ("badger", "egret", "gecko", "heron", "jackal", "koala", "marmot"),
    "test_memory": ("crane", "dingo"),
    "test_validation": ("ferret", "ibis"),
}
"""Every animal is killed by some test."""

ANSWERS = {
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

WOULD_SHOW = {
    "target off by one": "A model that has to say what it is given gets to a loss next to zero, below the entropy.",
    "gradient summed": "Sums over the ranks are exactly world_size times the mean: 2.00 times the norm on two ranks.",
    "parameter reduced": "Each rank would step along a gradient of its own rows: noisier norms, all rows read.",
    "accumulation scaled twice": "The norm would be exactly 1/accumulation of what it is alone.",
    "shards orthogonalised": "The momentum would not have to be gathered: fewer bytes in all_gather.",
    "optimizer first": "The weights would never change, and the optimizer would never make a state.",
    "untied": "There would be a parameter more: in the bytes held, in the bytes sent.",
    "seeds differ": "The ranks' weights would be apart before the first step.",
    "data repeated": "There would be fewer different rows in a step.",
    "local clip norm": "The ranks would clip by different norms, and nothing would be all-reduced.",
    "no_grad missing": "The bytes of the graph would grow with every validation.",
    "one rank validates": "The ranks would part at the first validation.",
}

LOOK = {
    "lynx": "its loss comes far below what the data allow, ln 4",
    "dingo": "its loss never falls, and its optimizer has no states at all. (Half of nothing is nothing: if you "
    "compare ranks with each other, compare them also with what they should hold)",
    "badger": "its ranks clip by different norms. Look at grad_norms, and on every rank",
    "egret": "its norms and its weights are not those of one process",
    "gecko": "its norm is half of what it should be, but AdamW and Muon do not notice a factor: its weights are right. "
    "Compare grad_norms, and with one process that does not accumulate: one that accumulates as well has the same bug",
    "heron": "its norms and its weights are not those of one process",
    "jackal": "its ranks begin with different weights. One process has one seed",
    "koala": "its norm is twice what it should be, but AdamW and Muon do not notice a factor: its weights are right. "
    "Compare grad_norms",
    "marmot": "only its inner matrices, up and down, differ from those of one process. Compare all weights, after the "
    "first step and later",
    "crane": 'look at "embed" and "head" after training, or at the bytes of its parameters',
    "ferret": "after its validations autograd keeps something for a backward pass: Report.graph",
    "ibis": "it does not come to its end: Report.stuck. Its validations are no list of results on every rank",
}

HEALTHY = {
    "test_learns": "It falls by more than one nat in thirty steps and ends between ln 4 and 2.3, not below ln 4; a "
    "loss goes up from one step to the next now and then, as every step has other rows.",
    "test_one_process": "Sums in another order round differently, so compare with a tolerance (1e-3 of the norm, 1e-4 "
    "of a weight). And a rank's losses are those of its own rows: only their mean is that of one process.",
    "test_memory": "Parameters are whole on every rank; optimizer states are of the rank's rows alone.",
    "test_validation": "It validates after every fifth step, and the number of steps is yours.",
}  # fmt: skip


class _Elsewhere(Trainer):
    """Weights become nan where there is more than one rank."""

    def gather(self):
        super().gather()
        if self.ranks.world_size > 1 and len(self.report.losses) > 1:
            self.model.up.detach().fill_(float("nan"))


class _Nan(Trainer):
    """The loss becomes nan."""

    def gather(self):
        super().gather()
        if len(self.report.losses) > 1:
            self.model.up.detach().fill_(float("nan"))


class _Ends(Trainer):
    """The loss comes to an end of its own."""

    def train(self, steps):
        report = super().train(steps)
        report.losses[-1] = self.end
        return report


class _Lucky(_Ends):
    """As good as can be, and no better: ln 4 is 1.386."""

    end = 1.45


class _TooGood(_Ends):
    """Better than the data allow, if only in the end."""

    end = 1.2


class _LastRank(Trainer):
    """The last rank has other weights than the first, after the first step."""

    def weights(self):
        found = super().weights()
        if self.report.losses and self.ranks.world_size > 1 and self.ranks.rank == self.ranks.world_size - 1:
            found["down"] += 0.01
        return found


class _Late(Trainer):
    """From the fourth step on gradients are summed over the ranks, not averaged."""

    def reduce(self):
        super().reduce()
        for p in self.shards.values():
            p.grad *= self.ranks.world_size if len(self.report.losses) > 2 else 1


class _Holds(Trainer):
    """Holds something else than it should."""

    def train(self, steps):
        report = super().train(steps)
        self.other(report.held)
        return report


class _WholeStates(_Holds):
    def other(self, held):
        held["optimizer states"] *= self.ranks.world_size


class _OneMoment(_Holds):
    def other(self, held):
        held["optimizer states"] = held["optimizer states"] * 3 // 4


class _Copies(_Holds):
    def other(self, held):
        held["parameters"] *= 2


class _OwnResult(Trainer):
    """Every rank validates on its part and keeps the result to itself."""

    def add_validation(self):
        self.report.val_losses.append(self.model(*self.split(self.mine(self.data.validation))).item())


class _NeverValidates(Trainer):
    def due(self, step):
        return False


class _KeepsOnTheLast(Trainer):
    """The last rank's validation keeps its graph."""

    def validate(self):
        with torch.set_grad_enabled(self.ranks.rank == self.ranks.world_size - 1):
            self.add_validation()


STRAYS = {
    "test_learns": {_Nan: "whose losses are nan from the third step on. nan is neither below nor above anything: "
        "assert what should be, in place of failing where it is not",
        _TooGood: "whose loss ends at 1.2, while it is above ln 4 at first. Look at the lowest loss, and compare with "
        "ln 4 itself"},
    "test_one_process": {
        _LastRank: "whose last rank has other weights than the first. Look at every rank's report",
        _Late: "that goes wrong from the fourth step on. Look at every step",
        _Elsewhere: "whose weights and norms are nan on two ranks. nan is neither below nor above anything: assert "
        "what should be, in place of failing where it is not",
    },
    "test_memory": {
        _WholeStates: "that keeps whole optimizer states on each of two ranks. Compare with what a rank's rows need",
        _OneMoment: "that keeps three quarters of the optimizer states: one of AdamW's moments is missing. Compute "
        "the bytes, and compare with them",
        _Copies: "that holds its parameters twice. Compute their bytes, and compare with them",
    },
    "test_validation": {
        _OwnResult: "whose ranks have a result each. Compare val_losses of all ranks",
        _NeverValidates: "that never validates. How many results are due after so many steps?",
        _KeepsOnTheLast: "whose last rank keeps a graph after each validation. Look at every rank's report",
    },
}  # fmt: skip
"""Sick trainers that are not in the zoo: a test is not made for twelve animals alone."""


def diagnose(theirs):
    found = theirs()
    expect(isinstance(found, dict), f"Your function returned {found!r}; a dictionary animal → diagnosis is asked for.")
    for animal, claim in found.items():
        expect(animal in ANSWERS, f"There is no {animal!r} in the zoo; there are {', '.join(ANSWERS)}.")
        expect(claim in DIAGNOSES, f"{claim!r} is no key of DIAGNOSES in zoo.py; they are {', '.join(DIAGNOSES)}.")
    if missing := [animal for animal in ANSWERS if animal not in found]:
        raise Wrong(f"There is no diagnosis for {', '.join(missing)}.")
    claims = list(found.values())
    if twice := next((claim for claim in claims if claims.count(claim) > 1), ""):
        sick = " and ".join(animal for animal, claim in found.items() if claim == twice)
        raise Wrong(f"You have {twice!r} more than once ({sick}); each bug is in the zoo once. {WOULD_SHOW[twice]}")
    right = sum(found[animal] == answer for animal, answer in ANSWERS.items())
    for animal, answer in ANSWERS.items():
        if (claim := found[animal]) != answer:
            raise Wrong(f"{right} of {len(ANSWERS)} are right. {animal} is not {claim!r}: {WOULD_SHOW[claim]}")


def step_bytes(theirs):
    for embedding, inner, ranks in ((1_200_000, 5_400_000, 6), (38_633_472, 84_934_656, 8), (2048, 4096, 2)):
        once = (ranks - 1) / ranks * 4
        everything = embedding + inner
        mistakes = {
            "reduce_scatter": {
                "That is an all-reduce, two passes of the ring; each rank needs only its rows.": 2 * once * everything,
                "That is the payload; a ring sends (N − 1)/N of it.": 4 * everything,
                "AdamW's gradients are reduced too.": once * inner,
            },
            "all_gather": {
                "Muon's momentum is missing: it is gathered so that matrices are orthogonalised whole.": once
                * everything,
                "AdamW treats every number alone; only Muon's momentum has to be gathered.": 2 * once * everything,
                "The new parameters are missing.": once * inner,
                "That is the payload; a ring sends (N − 1)/N of it.": 4 * (everything + inner),
            },
            "all_reduce": {
                "The norm needs one number of every rank; that is none.": 0,
                "That is the payload; a ring sends 2 (N − 1)/N of it.": 4,
                "Gradients are reduce-scattered here; only the norm is all-reduced.": 2 * once * everything,
            },
        }
        right = {
            "reduce_scatter": once * everything,
            "all_gather": once * (everything + inner),
            "all_reduce": 2 * once,
        }
        what = f"{embedding:,} elements of embedding and {inner:,} of inner matrices on {ranks} ranks, in bytes"
        expect_numbers(theirs(embedding, inner, ranks), right, what, mistakes, ranks)
    divided = st.integers(0, 10**6).map(lambda each: 840 * each)
    formula(
        theirs,
        lambda embedding, inner, ranks: {
            "reduce_scatter": 4 * (embedding + inner) - 4 * (embedding + inner) / ranks,
            "all_gather": 4 * (embedding + 2 * inner) * (1 - 1 / ranks), "all_reduce": 8 - 8 / ranks,
        },
        "in bytes", "ranks", embedding=divided, inner=divided, ranks=st.integers(1, 8),
    )  # fmt: skip


def test_learns(theirs):
    _try_out("test_learns", theirs)


def test_one_process(theirs):
    _try_out("test_one_process", theirs)


def test_memory(theirs):
    _try_out("test_memory", theirs)


def test_validation(theirs):
    _try_out("test_validation", theirs)


def _try_out(name, theirs):
    """It must let the healthy live, whatever their seed, and kill all that it is for."""
    calls = []

    def trained(trainer, seed, ranks=2, accumulation=2, steps=12):
        calls.append(seed)
        return run(trainer, ranks, accumulation, steps, seed)

    for seed in (0, 1, 5):
        try:
            found = theirs(partial(trained, Trainer, seed))
        except AssertionError as error:
            other = " with another seed, which has other numbers; test what must hold for all" if seed else ""
            raise Wrong(f"Your test kills the healthy trainer{other} ({_said(error)}). {HEALTHY[name]}") from error
        expect(
            found is None, f"Your test returns {found!r}, which nobody looks at. A test says by assert what is wrong."
        )
        expect(bool(calls), "Your test never calls run: it would pass whatever the trainer does.")
    if name == "test_learns" and _killed("a healthy trainer", theirs, partial(trained, _Lucky, 2)):
        raise Wrong("Your test kills a healthy trainer that learns more than others: its loss ends at 1.45, and ln 4 "
                    "is 1.386. What the data allow is no mistake.")  # fmt: skip
    lived = [animal for animal in KILLS[name] if not _killed(animal, theirs, partial(trained, ANIMALS[animal], 2))]
    if lived:
        rest = f" (So do {' and '.join(lived[1:])}.)" if lived[1:] else ""
        raise Wrong(f"Your test lets {lived[0]} live: {LOOK[lived[0]]}.{rest}")
    for trainer, words in STRAYS[name].items():
        if not _killed("another sick trainer", theirs, partial(trained, trainer, 2)):
            raise Wrong(f"Your test kills the zoo's animals, but lets a trainer live {words}.")


def _killed(animal, test, run):
    try:
        test(run)
    except AssertionError:
        return True
    except NotImplementedError:
        raise
    except Exception as error:
        raise Wrong(
            f"On {animal} your test does not fail but breaks: {type(error).__name__}: {error}. A test says by assert "
            "what is wrong, also where lists are shorter than expected."
        ) from error
    return False


def _said(error):
    return f"it says: {error}" if str(error) else "it says nothing: give your assert a message"
