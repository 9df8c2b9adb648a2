"""Going back: what is beyond the step is set aside, and everything that says "the newest" follows the history."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shardrun.__main__ import main
from shardrun.checkpoint import check
from shardrun.checkpoint.export import export
from speedrun.config import CheckpointConfig, Config
from speedrun.run.checkpoints import Resumed, asked_to_resume
from speedrun.run.folder import RunFolder
from speedrun.run.writer import Lock
from strategies.checkpoint.folder import checkpoints, find_checkpoint, name_of, of_history, set_aside
from strategies.checkpoint.format import read_index
from strategies.checkpoint.history import history_of, read_history
from strategies.errors import UserError
from tests.ranks import RankPool
from tests.speedrun.runs import content, launch_of, metrics, read, small, train_here
from tests.strategies.checkpoint.damage import flip

OPTIMIZER = dataclasses.replace(small().optimizer, orthogonalization_dtype="float32")
SHAPES: dict[str, tuple[int, ...]] = {}


def config(out: Path, **fields: Any) -> Config:
    defaults = {"steps": 8, "eval_every": 2, "checkpoint": CheckpointConfig(every=2, keep=4), "optimizer": OPTIMIZER}
    return small(out=str(out), **{**defaults, **fields})


def saved(run: Path, step: int) -> Path:
    return run / "checkpoints" / name_of(step)


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in metrics(path)]


def aside(run: Path) -> list[int]:
    return sorted(step for _, step, _ in set_aside(run / "checkpoints"))


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on one process, with checkpoints 2, 4, 6 and 8."""
    out = tmp_path_factory.mktemp("trained")
    ranks.run(1, train_here, "single", config(out))
    index = read_index(saved(out / "run", 8))
    SHAPES.update(
        {name.removeprefix("weight/"): t.shape for name, t in index.tensors.items() if name.startswith("weight/")}
    )
    return out / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resumed(run: Path, resume: str, **fields: Any) -> Resumed:
    wanted = config(run.parent, **{"steps": 20, **fields, "resume": resume})
    found = asked_to_resume(wanted, SHAPES, read(run, "config.json")["data_hash"])
    assert found
    return found


def begin(run: Path, resume: str, **fields: Any) -> RunFolder:
    """A start without its training: what it goes on from, and what that does to the folder."""
    wanted = config(run.parent, **{"steps": 20, **fields, "resume": resume})
    data_hash = read(run, "config.json")["data_hash"]
    found = asked_to_resume(wanted, SHAPES, data_hash)
    opened = RunFolder(run, wanted, launch_of("single"), "small", data_hash, 1, found)
    opened.open()
    return opened


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("single", "ddp", "fsdp", "zero2", "zero3"))
def test_going_back_is_a_history_of_its_own(ranks: RankPool, tmp_path: Path, name: str) -> None:
    world_size, run = 1 if name == "single" else 2, tmp_path / "run"
    ranks.run(world_size, train_here, name, config(tmp_path))
    whole, first = metrics(run), read(run, "history.json")
    path, keep = str(saved(run, 4)), CheckpointConfig(every=2, keep=2)
    ranks.run(world_size, train_here, name, config(tmp_path, resume=path, steps=7, checkpoint=keep))
    assert list(checkpoints(run / "checkpoints")) == [6, 7] and aside(run) == [6, 8]
    within = run / "checkpoints/set_aside" / first["id"]
    assert metrics(within) == whole and read(within, "summary.json")["step"] == 8
    assert steps_of(run) == [*range(8)] and read(run, "summary.json")["step"] == 7
    assert metrics(run)[:5] == whole[:5]
    now = read(run, "history.json")
    assert now["parent"] == {"id": first["id"], "step": 4} and now["moving"] is None and now["id"] != first["id"]
    assert history_of(saved(run, 7))["id"] == now["id"] and history_of(within / name_of(8))["id"] == first["id"]
    export(find_checkpoint(run), read_index(find_checkpoint(run)), tmp_path / "hub")
    own, other = (lines[-1]["val_loss"] for lines in (metrics(run), whole))
    card = (tmp_path / "hub/README.md").read_text()
    assert "| step | 7 |\n" in card and f"{own:.4f}" in card and f"{other:.4f}" not in card
    ranks.run(world_size, train_here, name, config(tmp_path, resume="auto", steps=9, checkpoint=keep))
    assert read(run, "config.json")["resumed_at"] == 7 and steps_of(run) == [*range(10)]
    assert list(checkpoints(run / "checkpoints")) == [8, 9] and aside(run) == [6, 8]
    assert read(run, "history.json")["id"] == now["id"]


@pytest.mark.ranks
def test_the_best_is_the_best_of_the_history(ranks: RankPool, trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    losses = {line["step"]: line["val_loss"] for line in metrics(run) if "val_loss" in line}
    assert losses[8] == min(losses.values())
    keep = CheckpointConfig(every=2, keep=1, keep_best=True)
    worse = dataclasses.replace(OPTIMIZER, muon_lr=1e-6, embedding_lr=1e-6, head_lr=1e-6)
    path = str(saved(run, 4))
    ranks.run(1, train_here, "single", config(tmp_path, resume=path, steps=6, checkpoint=keep, optimizer=worse))
    now = {line["step"]: line["val_loss"] for line in metrics(run) if "val_loss" in line}
    assert now[6] > losses[8] and steps_of(run)[-1] == 6
    best = min((4, 6), key=lambda step: now[step])
    assert list(checkpoints(run / "checkpoints")) == sorted({best, 6})


@pytest.mark.ranks
@pytest.mark.parametrize(
    "way", ("relative", "dots", "link to the run", "link to the checkpoints", "linked checkpoints")
)
def test_its_own_checkpoint_is_its_own_by_any_path(
    run: Path, monkeypatch: pytest.MonkeyPatch, way: str, tmp_path: Path
) -> None:
    path = saved(run, 4)
    if way == "relative":
        monkeypatch.chdir(run)
        path = Path("checkpoints", name_of(4))
    elif way == "dots":
        path = run / "checkpoints" / ".." / "checkpoints" / name_of(4)
    elif way == "link to the run":
        (tmp_path / "link").symlink_to(run)
        path = saved(tmp_path / "link", 4)
    elif way == "link to the checkpoints":
        (tmp_path / "link").symlink_to(run / "checkpoints")
        path = tmp_path / "link" / name_of(4)
    else:  # on a larger disk
        shutil.move(run / "checkpoints", tmp_path / "large")
        (run / "checkpoints").symlink_to(tmp_path / "large")
        path = tmp_path / "large" / name_of(4)
    begin(run, str(path))
    assert list(checkpoints(run / "checkpoints")) == [2, 4] and aside(run) == [6, 8]
    assert resumed(run, "auto").step == 4


@pytest.mark.ranks
def test_what_was_set_aside_can_be_gone_back_to(run: Path) -> None:
    first = read(run, "history.json")["id"]
    whole = metrics(run)
    begin(run, str(saved(run, 4)))
    second = read(run, "history.json")["id"]
    begin(run, str(run / "checkpoints/set_aside" / first / name_of(6)))
    now = read(run, "history.json")
    assert now["parent"] == {"id": first, "step": 6} and now["id"] not in (first, second)
    assert list(checkpoints(run / "checkpoints")) == [2, 4, 6] and aside(run) == [8]
    assert metrics(run) == whole[:7] and steps_of(run / "checkpoints/set_aside" / second) == [0, 1, 2, 3, 4]
    assert resumed(run, "auto").step == 6
    begin(run, str(saved(run, 2)))
    assert list(checkpoints(run / "checkpoints")) == [2] and aside(run) == [4, 6, 8] and metrics(run) == whole[:3]


@pytest.mark.ranks
def test_the_newest_goes_on_with_the_history(run: Path) -> None:
    history = read(run, "history.json")
    for resume in ("auto", str(run), str(saved(run, 8)), str(run / "checkpoints")):
        begin(run, resume)
        assert read(run, "history.json") == history and not aside(run) and len(metrics(run)) == 9


@pytest.mark.ranks
def test_a_run_elsewhere_knows_its_parent_and_leaves_it_alone(run: Path, tmp_path: Path) -> None:
    before = content(run)
    wanted = config(tmp_path, steps=20, resume=str(saved(run, 4)), name="other")
    found = asked_to_resume(wanted, SHAPES, read(run, "config.json")["data_hash"])
    RunFolder(tmp_path / "other", wanted, launch_of("single"), "small", "abc", 1, found).open()
    parent = read(tmp_path / "other", "history.json")["parent"]
    assert parent == {"id": read(run, "history.json")["id"], "step": 4, "run": str(saved(run, 4))}
    assert content(run) == before
    with pytest.raises(FileExistsError, match="holds a run already"):  # another's checkpoint into a run that is there
        RunFolder(tmp_path / "other", wanted, launch_of("single"), "small", "abc", 1, found)


@pytest.mark.ranks
def test_folders_of_older_versions_go_on_and_go_back(run: Path) -> None:
    """No history.json, no id in an index: one history."""
    (run / "history.json").unlink()
    for path in checkpoints(run / "checkpoints").values():
        index = json.loads((path / "index.json").read_text())
        del index["run"]["history"]
        _rewrite(path, index)
    assert resumed(run, "auto").step == 8
    begin(run, "auto")
    assert list(of_history(run / "checkpoints")) == [2, 4, 6, 8]
    begin(run, str(saved(run, 4)))
    assert list(of_history(run / "checkpoints")) == [2, 4] and aside(run) == [6, 8]
    assert resumed(run, "auto").step == 4


def _rewrite(path: Path, index: dict[str, Any]) -> None:
    import hashlib

    written = (json.dumps(index, indent=1) + "\n").encode()
    sums = [line for line in (path / "SHA256SUMS").read_text().splitlines() if "index.json" not in line]
    (path / "index.json").write_bytes(written)
    sums.append(f"{hashlib.sha256(written).hexdigest()}  index.json")
    (path / "SHA256SUMS").write_text("\n".join(sorted(sums, key=lambda line: line.split()[1])) + "\n")


@pytest.mark.ranks
def test_a_checkpoint_of_another_run_that_was_put_here_does_not_count(
    ranks: RankPool, run: Path, tmp_path: Path
) -> None:
    ranks.run(1, train_here, "single", config(tmp_path, name="other", steps=10))
    shutil.copytree(saved(tmp_path / "other", 10), saved(run, 10))
    assert resumed(run, "auto").step == 8 and find_checkpoint(run) == saved(run, 8)
    begin(run, "auto")
    other = read(tmp_path / "other", "history.json")["id"]
    assert [(one, step) for one, step, _ in set_aside(run / "checkpoints")] == [(other, 10)]


@pytest.mark.ranks
def test_a_damaged_checkpoint_is_set_aside_with_the_others(run: Path) -> None:
    flip(saved(run, 6) / "index.json", 50)
    begin(run, str(saved(run, 4)))
    assert list(of_history(run / "checkpoints")) == [2, 4] and aside(run) == [6, 8]


class Killed(BaseException):
    pass


@pytest.mark.ranks
@pytest.mark.parametrize("from_aside", (False, True))
def test_a_kill_between_any_two_changes_of_going_back_is_completed_by_the_next_start(
    run: Path, tmp_path: Path, from_aside: bool
) -> None:
    """Of the folder's own: renames, replacements, removals."""
    first = read(run, "history.json")["id"]
    target, step = saved(run, 4), 4
    if from_aside:
        begin(run, str(saved(run, 4)))
        target, step = run / "checkpoints/set_aside" / first / name_of(6), 6
    whole = {path.name for path in (run / "checkpoints").rglob("step_*")}
    moment, ended = 0, False
    while not ended:
        moment += 1
        copy = tmp_path / str(moment) / "run"
        shutil.copytree(run, copy)
        before = content(copy)
        ended = not _killed_at(moment, copy, str(copy / target.relative_to(run)))
        assert {path.name for path in (copy / "checkpoints").rglob("step_*")} == whole
        if read_history(copy) == read_history(run):
            now = {name: data for name, data in content(copy).items() if not name.endswith(".partial")}
            assert now == before  # nothing had begun
            continue
        assert resumed(copy, "auto").step == step and find_checkpoint(copy).name == name_of(step)
        assert check(find_checkpoint(copy))["intact"]
        begin(copy, "auto")
        assert max(checkpoints(copy / "checkpoints")) == step == steps_of(copy)[-1]
        assert steps_of(copy / "checkpoints/set_aside" / first) == [*range(9)]
        assert read(copy, "history.json")["moving"] is None and read(copy, "summary.json")["step"] == step
    assert moment > 8


def _killed_at(moment: int, copy: Path, resume: str) -> bool:
    """Whether a start that goes back is killed just before its nth change of the folder."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:

        def counting(function: Any) -> Any:
            def changes(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == moment:
                    raise Killed
                return function(*arguments, **options)

            return changes

        for name in ("rename", "replace", "unlink", "fsync", "mkdir"):
            patch.setattr(os, name, counting(getattr(os, name)))
        try:
            begin(copy, resume)
        except Killed:
            return True
    return False


@pytest.mark.ranks
def test_a_damaged_checkpoint_that_was_asked_for_changes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train_here, "fsdp", config(tmp_path))
    flip(saved(tmp_path / "run", 4) / "rank_001.safetensors", 4000)
    before = content(tmp_path)
    wanted = config(tmp_path, resume=str(saved(tmp_path / "run", 4)))
    with pytest.raises(AssertionError, match=r"step_00000004/rank_001.safetensors is damaged"):
        ranks.run(2, train_here, "fsdp", wanted)
    assert content(tmp_path) == before


@pytest.mark.ranks
def test_a_record_without_checkpoints_is_set_aside_where_the_run_begins_again(ranks: RankPool, tmp_path: Path) -> None:
    """--resume auto of a run that has never saved: it was wiped out without a word."""
    ranks.run(1, train_here, "single", config(tmp_path, checkpoint=CheckpointConfig(), steps=3))
    first, before = read(tmp_path / "run", "history.json")["id"], metrics(tmp_path / "run")
    again = config(tmp_path, checkpoint=CheckpointConfig(), steps=4, resume="auto")
    ranks.run(1, train_here, "single", again)
    assert steps_of(tmp_path / "run") == [0, 1, 2, 3, 4]
    assert metrics(tmp_path / "run/checkpoints/set_aside" / first) == before


@pytest.mark.ranks
def test_inspect_and_verify_say_what_is_set_aside_and_whether_the_run_lives(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = read(run, "history.json")["id"]
    begin(run, str(saved(run, 4)))
    for action in ("inspect", "verify"):
        with pytest.raises(SystemExit, match="^0$"):
            main(["checkpoint", action, str(run)])
        printed = capsys.readouterr().out
        assert f"{saved(run, 4)}" in printed and "status of the run: died" in printed
        for step in (6, 8):
            assert (
                f"set aside, of a history that was left: {run / 'checkpoints/set_aside' / first / name_of(step)}"
                in printed
            )
    lock = Lock(run)
    with pytest.raises(SystemExit, match="^0$"):
        main(["checkpoint", "inspect", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["status"] == "running"
    lock.release()


def damaged(run: Path, number: int, text: bytes) -> bytes:
    """Put this in the place of a line of the record; returns the whole file."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[number] = text
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    return b"".join(lines)


@pytest.mark.parametrize("back", (False, True))
@pytest.mark.parametrize(
    "text", (b'{"step": 3, "tr\n', b"\0\0\0\xff\n", b"[]\n", b'{"step": "3"}\n', b"[" * 10**5 + b"\n")
)
def test_a_damaged_line_takes_no_other_with_it(run: Path, text: bytes, back: bool) -> None:
    before = damaged(run, 3, text)
    opened = RunFolder(run, config(run.parent, steps=20), launch_of("single"), "small", "", 1, _to(run, back))
    said = opened.open()
    left_out = "1 line is damaged and left out; metrics.jsonl.damaged keeps the file as it was"
    assert said[0] == f"warning: {run / 'metrics.jsonl'}: {left_out}"
    assert steps_of(run) == [0, 1, 2, 4, *(() if back else (5, 6, 7, 8))]
    assert (run / "metrics.jsonl.damaged").read_bytes() == before
    opened.finish("finished")


def _to(run: Path, back: bool) -> Resumed | None:
    resume = str(saved(run, 4)) if back else "auto"
    return asked_to_resume(config(run.parent, steps=20, resume=resume), SHAPES, read(run, "config.json")["data_hash"])


def test_the_last_line_of_a_killed_run_is_no_damage(run: Path) -> None:
    damaged(run, -1, b'{"step": 8, "tra')
    assert begin(run, "auto").path == run and not (run / "metrics.jsonl.damaged").exists()
    assert steps_of(run) == list(range(8))


def test_a_history_that_cannot_be_read_is_named(run: Path) -> None:
    (run / "history.json").unlink()
    (run / "history.json").mkdir()
    with pytest.raises(UserError, match="history.json cannot be read"):
        begin(run, "auto")
