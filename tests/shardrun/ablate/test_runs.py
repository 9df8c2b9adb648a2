"""A comparison: pairs, sweeps and the table from mocked runs with known answers; killed and resumed with real ones."""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardrun import ablate
from shardrun.ablate import runs as runs_module
from shardrun.ablate.ideas import Changes, Setting
from shardrun.ablate.runs import Result, Runs


def asked(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    return parser.parse_args(arguments)


def curve_to(loss: float) -> list[tuple[int, float, float]]:
    """Ten validations on a straight line from 3 down to the loss."""
    return [(100 * i, 3.0 + (loss - 3.0) * i / 10, 1.0 * i) for i in range(1, 11)]


class Mocked:
    """In place of training: losses as a function of what the run is. Notes what was trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[str, int]] = []
        self.stop_after = 1000
        monkeypatch.setattr(Runs, "_train", lambda runs, key, label, changes, seed: self.train(runs, changes, seed))

    def train(self, runs: Runs, changes: Changes, seed: int) -> Result:
        if len(self.trained) == self.stop_after:
            raise KeyboardInterrupt
        setting = runs.setting.with_changes(changes)
        self.trained.append((json.dumps(changes, sort_keys=True), seed))
        loss = self.loss(setting, seed)
        return Result("", seed, loss == float("inf"), loss, 1000, 10.0, 5.0 if setting.config.model.bias else 4.0,
                      curve_to(loss), "data", "c" * 40, {"python": "3", "torch": "2"}, "a machine")  # fmt: skip

    def loss(self, setting: Setting, seed: int) -> float:
        """QK-norm is worth 0.1, a bias costs 0.2 with no spread at all, smear does nothing that can be seen."""
        model = setting.config.model
        noise = {1: 0.0, 2: 0.01, 3: -0.01}[seed]
        loss = 2.0 + 0.3 * seed  # between seeds far more than any effect
        loss += 0.0 if model.qk_norm else 0.1 + noise
        loss += 0.2 if model.bias else 0.0
        return loss + (0.0 if model.smear else 5 * noise)


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> Mocked:
    return Mocked(monkeypatch)


CHOSEN = ("--drop", "qk_norm,smear", "--add", "bias", "--steps", "40", "--out")


def test_effects_are_of_pairs_so_that_seeds_cancel(mocked: Mocked, tmp_path: Path) -> None:
    text, content = ablate.ablate(asked(*CHOSEN, str(tmp_path), "--target", "2.8"))
    arms = {arm["name"]: arm for arm in content["arms"]}  # type: ignore[attr-defined]
    assert {name: arm["verdict"] for name, arm in arms.items() if name != "baseline"} == {
        "no qk_norm": "pays",
        "no smear": "not seen",
        "with bias": "costs",
    }
    effect = arms["no qk_norm"]["effects"]["val_loss"]
    assert effect["mean"] == pytest.approx(0.1) and effect["spread"] == pytest.approx(0.01)
    assert arms["with bias"]["effects"]["val_loss"]["spread"] == pytest.approx(0.0, abs=1e-12)
    assert arms["with bias"]["effects"]["step_time"]["mean"] == pytest.approx(0.25)
    # From 3 in a line: the baseline comes to 2.8 after 0.2 / 0.7 of its tokens with seed 1, and with seed 3 not at all.
    assert arms["baseline"]["reached"] == 2 and arms["no qk_norm"]["effects"]["tokens_to_target"] is None
    assert "reached 2 of 3" in text and "+0.1000 ± 0.0100" in text and "no smear (smear off)" in text
    assert (tmp_path / "chosen.png").stat().st_size > 5000


def test_tokens_to_the_target_are_relative_to_the_pairs(mocked: Mocked, tmp_path: Path) -> None:
    content = ablate.ablate(asked("--add", "bias", "--seeds", "2", "--target", "2.9", "--out", str(tmp_path)))[1]
    effect = content["arms"][1]["effects"]["tokens_to_target"]  # type: ignore[index]
    expected = [0.7 / 0.5 - 1, 0.4 / 0.2 - 1]  # slopes of the lines; linear curves, so interpolation is exact
    assert effect["mean"] == pytest.approx(sum(expected) / 2)


def test_a_run_that_diverged_is_kept_and_named(mocked: Mocked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mocked, "loss", lambda s, seed: float("inf") if s.config.model.bias and seed == 2 else 2.0)
    text, content = ablate.ablate(asked("--add", "bias", "--out", str(tmp_path)))
    assert "diverged 1 of 3" in text and "diverges" in text
    assert content["arms"][1]["val_loss"] == [2.0, None, 2.0]  # type: ignore[index]
    json.loads(json.dumps(content, allow_nan=False))


def test_an_interrupted_comparison_goes_on_where_it_was(mocked: Mocked, tmp_path: Path) -> None:
    mocked.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(asked(*CHOSEN, str(tmp_path)))
    mocked.stop_after = 1000
    ablate.ablate(asked(*CHOSEN, str(tmp_path)))
    assert len(mocked.trained) == len(set(mocked.trained)) == 12
    ablate.ablate(asked("--drop", "qk_norm", "--steps", "40", "--seeds", "2", "--out", str(tmp_path)))
    assert len(mocked.trained) == 12  # another question, the same runs
    ablate.ablate(asked("--drop", "qk_norm", "--steps", "41", "--seeds", "1", "--out", str(tmp_path)))
    assert len(mocked.trained) == 14  # another length is another run


def test_a_sweep_takes_each_arms_best_rate_and_goes_beyond_an_edge(
    mocked: Mocked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(setting: Setting, seed: int) -> float:
        """Best at the preset's rates, but for a constant schedule: at a quarter of them, beyond the sweep."""
        factor = setting.config.optimizer.muon_lr / 0.03
        best = 0.25 if setting.config.schedule.name == "constant" else 1.0
        return 2.0 + abs(factor - best) + 0.01 * seed

    monkeypatch.setattr(mocked, "loss", loss)
    text, content = ablate.ablate(asked("--suite", "schedules", "--seeds", "2", "--out", str(tmp_path)))
    factors = {arm["name"]: arm["factor"] for arm in content["arms"]}  # type: ignore[attr-defined]
    assert factors == {"warm-up, stable, decay": 1, "constant": 0.25, "cosine": 1, "cosine + warm-down": 1}
    assert list(content["sweeps"]["constant"]) == ["0.125", "0.25", "0.5", "1", "2"]  # type: ignore[index]
    assert len(mocked.trained) == 4 * 3 + 2 + 4  # a sweep on the first seed, two factors more, one run per arm
    assert "at the edge" not in text and "| 0.25 |" in text.replace("  ", " ").replace("  ", " ")


def test_runs_on_other_data_are_not_paired(mocked: Mocked, tmp_path: Path) -> None:
    arguments = asked("--drop", "qk_norm", "--seeds", "1", "--out", str(tmp_path))
    ablate.ablate(arguments)
    file = tmp_path / "results.json"
    content = json.loads(file.read_text())
    next(iter(content["runs"].values()))["data_hash"] = "other"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="runs on different data .*choose another --out"):
        ablate.ablate(arguments)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no results file"):
        ablate.ablate(arguments)


def test_a_loss_that_is_not_finite_is_a_result_and_any_other_failure_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, options = ablate.configure(asked("--steps", "4"))
    message = "the loss is nan at step 2: lower the learning rates or clip."

    def launch(config: Path, module: str, arguments: list[str], options: list[str], log: Path) -> int:
        """What the trainer leaves when it ends early."""
        folder = Path(arguments[arguments.index("--out") + 1]) / arguments[arguments.index("--name") + 1]
        folder.mkdir(parents=True)
        run = dataclasses.asdict(setting.with_changes({"seed": 5}).config)
        files = {"config.json": {"run": run, "data_hash": "d"}}
        files["environment.json"] = {"commit": None, "python": "3", "versions": {"torch": "2"}, "gpus": ["a GPU"]}
        lines = [{"step": 0, "tokens": 0, "train_time_ms": 0.0, "val_loss": 5.0}]
        lines.append({"step": 1, "tokens": 9, "train_time_ms": 7.0, "data_time_ms": 1.0, "compute_time_ms": 6.0})
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        log.write_text(f"shardrun: error: {message}\n")
        return 2

    monkeypatch.setattr(runs_module, "launch", launch)
    result = Runs("tiny", options, setting, tmp_path).get("x", {}, 5)
    assert result.diverged and result.val_loss == float("inf") and (result.tokens, result.step_ms) == (9, 7.0)
    message = "data.global_batch 7 does not divide."
    with pytest.raises(ValueError, match="x, seed 6, ended with status 2: data.global_batch 7 does not divide"):
        Runs("tiny", options, setting, tmp_path).get("x", {}, 6)


def test_an_infinite_loss_survives_the_results_file(tmp_path: Path) -> None:
    result = Result("x", 1, True, float("inf"), 5, 1.0, 2.0, [], "d", None, {}, "m")
    content = {"schema": runs_module.SCHEMA, "runs": {"k": dataclasses.asdict(result)}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert runs_module.read(tmp_path / "results.json") == {"k": result}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "0.5,x"], "--sweep 0.5,x must be different positive factors"),
        (["--suite", "features", "--drop", "muon"], "two ways of saying what to compare"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
    ],
)
def test_slips_are_answered_with_a_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        ablate.ablate(asked(*arguments, "--out", str(tmp_path)))


@pytest.mark.ranks
@pytest.mark.slow
def test_killed_in_the_middle_of_a_real_run_and_started_again(tmp_path: Path, warm_python: str) -> None:
    arguments = ["ablate", "--drop", "qk_norm", "--seeds", "1", "--steps", "3", "--out", str(tmp_path), "--json", "--"]
    arguments += ["--data.global-batch", "2", "--data.sequence-length", "16", "--data.eval-tokens", "64"]
    # A process of its own, since it is killed, with launches that are warm.
    code = "import sys; sys.executable = sys.argv.pop(1); from shardrun.__main__ import main; main()"
    command = [sys.executable, "-c", code, warm_python, *arguments]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert first.stderr is not None
    assert "[1/2] seed 1, baseline: val loss" in first.stderr.readline()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert len(runs_module.read(tmp_path / "results.json")) == 1
    command = [warm_python, "-m", "shardrun", *arguments]
    second = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert second.returncode == 0, second.stderr
    assert "baseline: val loss" in second.stderr and ", kept" in second.stderr.splitlines()[0]
    arms = json.loads(second.stdout)["arms"]
    assert [arm["name"] for arm in arms] == ["baseline", "no qk_norm"]
    assert arms[0]["tokens"] == arms[1]["tokens"] == [3 * 2 * 16] and arms[0]["val_loss"] != arms[1]["val_loss"]
