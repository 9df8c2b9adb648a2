"""The table of ideas: every line changes what it says, and says so to the trainer in the same words."""

import dataclasses

import pytest

from shardrun.ablate import configure
from shardrun.ablate.ideas import IDEAS, Setting, trainer_options
from shardrun.ablate.suites import OPTIMIZERS, SCHEDULES, Suite, one_at_a_time, scaled, suite_of
from shardrun.launch import shipped_config
from speedrun.presets import PRESETS
from speedrun.run.command_line import parse

TINY = Setting(PRESETS["tiny"][1], shipped_config("cpu/single"))

EVERYTHING = {
    **{f"{name} {side}": getattr(idea, side) for name, idea in IDEAS.items() for side in ("off", "on")},
    **OPTIMIZERS,
    **SCHEDULES,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_trainers_options_make_the_same_configuration_as_the_changes(preset: str) -> None:
    """Each change once, the presets by turns: parsing takes long, and what options say does not hang on the preset."""
    default = PRESETS[preset][1]
    for name, changes in list(EVERYTHING.items())[list(PRESETS).index(preset) :: len(PRESETS)]:
        wanted = Setting(default, shipped_config("single")).with_changes(changes)
        assert parse([preset, *trainer_options(changes)])[1] == wanted.config, name


@pytest.mark.parametrize("preset", PRESETS)
def test_dropping_and_adding_turn_an_idea_off_and_on(preset: str) -> None:
    setting = Setting(PRESETS[preset][1], shipped_config("cpu/single"))
    for name, idea in IDEAS.items():
        assert not idea.is_on(setting.with_changes(idea.off)), name
        assert idea.is_on(setting.with_changes(idea.on)), name
        assert setting.with_changes(idea.off) != setting.with_changes(idea.on), name


def test_what_tiny_has_is_dropped_and_what_it_lacks_is_added() -> None:
    suite = suite_of("all", TINY, None)
    arms = {arm.name: arm for arm in suite.arms}
    assert arms["no muon"].dropped and arms["no muon"].changes == {"optimizer.name": "adamw"}
    assert not arms["with tied_head"].dropped and arms["with bf16"].changes == {"launch.mixed_precision": "bf16"}
    assert not any("unet_skips" in name for name in arms)
    assert any("unet_skips is not possible here" in reason for reason in suite.left_out)
    bf16 = Setting(TINY.config, shipped_config("cpu/single_bf16"))
    assert {arm.name for arm in suite_of("all", bf16, None).arms} >= {"no bf16"}


def test_the_default_suite_stays_affordable() -> None:
    assert len(suite_of("features", TINY, None).arms) <= 25


def test_every_rate_is_scaled_in_a_sweep_and_one_leaves_the_preset_alone() -> None:
    suite = suite_of("schedules", TINY, None)
    rates = {f.name for f in dataclasses.fields(TINY.config.optimizer) if f.name.endswith("lr")}
    changed = scaled(suite.arms[1], 2.0, suite, TINY)
    assert {f"optimizer.{rate}" for rate in rates} | {"schedule.name"} == set(changed)
    assert all(changed[f"optimizer.{rate}"] == 2 * getattr(TINY.config.optimizer, rate) for rate in rates)
    assert scaled(suite.arms[1], 1.0, suite, TINY) == {"schedule.name": "constant"}
    assert set(suite_of("optimizers", TINY, None).rates) == {"optimizer.muon_lr", "optimizer.adamw_lr"}
    assert suite_of("optimizers", TINY, ()).factors == () and isinstance(suite, Suite)


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        (["mouon"], [], "there is no idea 'mouon'; shardrun ablate --list"),
        (["tied_head"], [], "tied_head cannot be dropped, the run does not have it: use --add tied_head"),
        ([], ["muon"], "muon cannot be added, the run has it already: use --drop muon"),
        ([], ["unet_skips"], "unet_skips is not possible here: model.unet_skips joins"),
    ],
)
def test_a_wrong_idea_is_named_with_the_way_out(drop: list[str], add: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        one_at_a_time(drop, add, TINY, None)


def test_the_baseline_is_the_preset_with_the_callers_options() -> None:
    from tests.shardrun.ablate.test_runs import asked

    setting, options = configure(asked("--steps", "36", "--", "--data.global-batch", "4"))
    assert (setting.config.steps, setting.config.eval_every, setting.config.data.global_batch) == (36, 3, 4)
    assert parse(["tiny", *options])[1] == setting.config
    with pytest.raises(ValueError, match="use --target of shardrun ablate"):
        configure(asked("--", "--target-val-loss", "2"))
