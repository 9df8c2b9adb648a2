"""What is compared with what: arms out of ideas, and the suites that have a name."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from shardrun.ablate.ideas import IDEAS, Changes, Setting
from speedrun.config import OptimizerConfig
from strategies.errors import UserError

ALL_RATES = tuple(f"optimizer.{field.name}" for field in fields(OptimizerConfig) if field.name.endswith("_lr"))


@dataclass(frozen=True)
class Arm:
    """One way of training; all arms of a comparison differ from its first, the baseline, in `changes`."""

    name: str
    group: str = ""
    changes: Changes | None = None
    dropped: bool = False
    """An idea was taken out: a higher loss than the baseline's speaks for it. Else a lower one does."""


@dataclass(frozen=True)
class Suite:
    """The first arm is the baseline. factors: the learning rates in `rates` are multiplied by each of them and the
    best one counts, for every arm by itself; none: rates as the preset has them."""

    arms: tuple[Arm, ...]
    factors: tuple[float, ...] = ()
    rates: tuple[str, ...] = ALL_RATES
    left_out: tuple[str, ...] = ()
    """Sentences on what was left out, and why."""


FEATURES = (
    *("muon", "polar_express", "normuon", "adamw_every", "embedding_lr"),
    *("rope", "window", "paired_heads", "attention_gate", "qk_norm", "relu2", "softcap", "zero_init", "tied_head"),
    *("ngrams", "ngrams_for_blocks", "smear", "value_embeddings", "embedding_skip", "backout", "multi_token"),
    *("bf16", "fp8", "compile"),
)
"""Of the ideas, those that the suite `features` asks about."""

OPTIMIZERS: dict[str, Changes] = {
    "AdamW": {"optimizer.name": "adamw"},
    "Muon": {"optimizer.name": "muon"},
    "NorMuon": {"optimizer.name": "muon", "optimizer.normuon": True},
    "Muon, Newton–Schulz": {"optimizer.name": "muon", "optimizer.orthogonalization": "newton_schulz"},
}
SCHEDULES: dict[str, Changes] = {
    "warm-up, stable, decay": {"schedule.name": "trapezoid"},
    "constant": {"schedule.name": "constant"},
    "cosine": {"schedule.name": "cosine"},
    "cosine + warm-down": {"schedule.name": "cosine_warmdown", "schedule.decay": 0.2},
}

SUITES = {
    "features": "the ideas that make sense at the preset's size: what it has is dropped, what it lacks is added",
    "all": "every idea that is possible here",
    "optimizers": "AdamW, Muon, NorMuon, Muon with Newton–Schulz; the rate of the blocks' matrices is swept for each",
    "schedules": "constant, cosine, cosine + warm-down, warm-up–stable–decay; all rates are swept for each",
}


def suite_of(name: str, setting: Setting, factors: tuple[float, ...] | None) -> Suite:
    """A named suite. factors: of the learning rates, in place of the suite's own; () for no sweep.

    Raises ValueError for a name there is not.
    """
    if name == "optimizers":
        arms = tuple(Arm(label, "optimizer", changes) for label, changes in OPTIMIZERS.items())
        return Suite(arms, (0.5, 1.0, 2.0) if factors is None else factors, ("optimizer.muon_lr", "optimizer.adamw_lr"))
    if name == "schedules":
        arms = tuple(Arm(label, "schedule", changes) for label, changes in SCHEDULES.items())
        return Suite(arms, (0.5, 1.0, 2.0) if factors is None else factors)
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}; there are {', '.join(SUITES)}.")
    chosen = FEATURES if name == "features" else tuple(IDEAS)
    hindrances = {name: IDEAS[name].hindrance(setting) for name in chosen}
    return Suite(
        (Arm("baseline"), *(_arm(name, setting) for name in chosen if not hindrances[name])),
        factors or (),
        left_out=tuple(f"{name} is not possible here: {why}" for name, why in hindrances.items() if why),
    )


def one_at_a_time(
    drop: Sequence[str], add: Sequence[str], setting: Setting, factors: tuple[float, ...] | None
) -> Suite:
    """The baseline against these ideas, each by itself.

    Raises ValueError for an unknown idea, one to drop that the setting does not have, one to add that it has already,
    and one that is not possible.
    """
    for name in (*drop, *add):
        if name not in IDEAS:
            raise UserError(f"there is no idea {name!r}; shardrun ablate --list shows all of them.")
        if why := IDEAS[name].hindrance(setting):
            raise UserError(f"{name} is not possible here: {why.rstrip('.')}.")
        if IDEAS[name].is_on(setting) != (name in drop):
            there = "has it already: use --drop" if name in add else "does not have it: use --add"
            raise UserError(f"{name} cannot be {'added' if name in add else 'dropped'}, the run {there} {name}.")
    return Suite((Arm("baseline"), *(_arm(name, setting) for name in (*drop, *add))), factors or ())


def scaled(arm: Arm, factor: float, suite: Suite, setting: Setting) -> Changes:
    """The arm's changes with its learning rates multiplied. A factor of 1 changes nothing."""
    changes = dict(arm.changes or {})
    if factor != 1.0:
        there = setting.with_changes(changes)
        changes |= {rate: there.get(rate) * factor for rate in suite.rates}
    return changes


def _arm(name: str, setting: Setting) -> Arm:
    idea = IDEAS[name]
    on = idea.is_on(setting)
    return Arm(f"no {name}" if on else f"with {name}", idea.group, idea.off if on else idea.on, dropped=on)
