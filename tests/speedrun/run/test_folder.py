"""What a run leaves on disk and at Weights & Biases."""

import contextlib
import resource
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from speedrun.run.folder import SCHEMA, RunFolder
from speedrun.run.writer import status
from strategies.errors import UserError
from tests.speedrun.runs import launch_of, metrics, read, small

STEP = {"step": 1, "tokens": 384, "train_loss": 5.5, "val_loss": 5.0, "train_time_ms": 10.0, "step_avg_ms": 10.0}


def run_folder(folder: Path, name: str = "run", **fields: Any) -> RunFolder:
    return RunFolder(folder / name, small(out=str(folder), **fields), launch_of("ddp", 0, 2), "tiny", "abc", 123)


def test_every_file_says_its_schema_and_a_killed_run_says_running(tmp_path: Path) -> None:
    opened = run_folder(tmp_path)
    opened.step({**STEP, "val_bits_per_byte": None})
    opened.ledger(3, [{"rank": 0, "measured": {"parameters": 4}}])
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "environment.json", "metrics.jsonl", "ledger.json", "summary.json", "history.json"),
    }
    for name in ("config.json", "environment.json", "ledger.json", "summary.json"):
        assert read(folder, name)["schema"] == SCHEMA
    assert metrics(folder) == [{"schema": SCHEMA, **STEP, "val_bits_per_byte": None}]  # readable before it is closed
    assert read(folder, "summary.json")["status"] == "running"
    config = read(folder, "config.json")
    assert config["launch"]["strategy"] == "ddp" and config["launch"]["world_size"] == 2
    assert config["run"]["data"]["global_batch"] == 12 and config["data_hash"] == "abc" and config["parameters"] == 123
    assert read(folder, "ledger.json")["step"] == 3
    assert read(folder, "ledger.json")["ranks"] == [{"rank": 0, "measured": {"parameters": 4}}]
    opened.finish("finished")
    summary = read(folder, "summary.json")
    assert (summary["status"], summary["error"], summary["train_loss"]) == ("finished", None, 5.5)


def test_a_run_with_a_target_leaves_a_record_in_the_form_of_the_public_ones(tmp_path: Path) -> None:
    opened = run_folder(tmp_path, target_val_loss=4.0)
    opened.step({**STEP, "step": 0, "train_loss": None, "train_time_ms": 0.0})
    opened.step(STEP)
    opened.step({**STEP, "step": 2, "val_loss": 3.9, "train_time_ms": 2500.0, "tokens": 768})
    opened.finish("finished")
    text = (tmp_path / "run" / "record.txt").read_text(encoding="utf-8")
    root = Path(__file__).parents[3]
    assert (root / "speedrun/model/gpt.py").read_text(encoding="utf-8") in text  # the source, whole
    assert '"python": ' in text and "step:1/2 train_loss:5.5000 val_loss:5.0000 train_time:10ms" in text
    assert text.endswith("finished; 4.0 reached at step 2: 2.5 s of training, 768 tokens\n")
    if find_spec("matplotlib"):
        assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    unreached = run_folder(tmp_path / "other", target_val_loss=1.0)
    unreached.step(STEP)
    unreached.finish("interrupted")
    text = (tmp_path / "other" / "run" / "record.txt").read_text(encoding="utf-8")
    assert text.endswith("interrupted; the target 1.0 was not reached: 5.0000 at step 1 was the best\n")


def test_a_failed_run_keeps_its_error_and_traceback(tmp_path: Path) -> None:
    opened = run_folder(tmp_path)
    try:
        raise RuntimeError("out of something")
    except RuntimeError as error:
        opened.finish("failed", error)
    summary = read(tmp_path / "run", "summary.json")
    assert summary["error"] == "out of something" and "test_folder.py" in summary["traceback"]


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    run_folder(tmp_path).finish("finished")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="run holds a run already; give this one another --name"):
        run_folder(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_full_disk_does_not_stop_the_run_and_no_line_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = run_folder(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    opened.step({**STEP, "step": 0})
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, before[1]))  # room for a part of the next line
        for step in (1, 2, 3):
            opened.step({**STEP, "step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    opened.step({**STEP, "step": 4})
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may become larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_at_the_start_ends_it_in_a_sentence(tmp_path: Path) -> None:
    for size in (0, 200, 1000):
        with full_disk(size), pytest.raises(UserError, match=rf"run{size} cannot be written \(File too large\): make"):
            run_folder(tmp_path, name=f"run{size}")


def test_a_disk_that_is_full_at_the_end_loses_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = run_folder(tmp_path)
    opened.step({**STEP, "step": 0})
    with full_disk(0):
        opened.ledger(1, [])
        opened.step({**STEP, "step": 1})
        opened.finish("finished")
    said = capsys.readouterr().out
    for name in ("ledger.json", "metrics.jsonl", "summary.json"):
        assert f"{name} cannot be written" in said
    assert status(tmp_path / "run") == "died"
    assert not list((tmp_path / "run").glob(".*.partial"))
