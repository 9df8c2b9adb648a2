"""What a presentation records of a run, what a replay shows of it, and what spoilt recordings are told."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardrun.present.record import find_recording, read_recording
from tests.shardrun.present.conftest import Recorded, show

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.ranks


def test_the_recording_is_what_the_run_wrote(recorded: Recorded) -> None:
    events = read_recording(recorded.folder)
    assert [events[0]["kind"], events[1]["kind"], events[-1]["kind"]] == ["lesson", "output", "end"]
    run = recorded.folder / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in event.items() if k not in ("kind", "at")} for event in events if event["kind"] == "step"]
    assert steps == metrics and metrics[-1]["step"] == 9
    books = [event for event in events if event["kind"] == "books"]
    ledger = json.loads((run / "ledger.json").read_text())
    assert books[-1]["ranks"] == ledger["ranks"] and books[-1]["step"] == ledger["step"] == 8
    assert {event["step"] for event in books} <= {3, 8}
    times = [event["at"] for event in events if "at" in event]
    assert times == sorted(times)


def test_a_recording_under_the_name_of_earlier_is_found(recorded: Recorded, tmp_path: Path) -> None:
    """From before the verb had its name."""
    (tmp_path / "old").mkdir()
    shutil.copy(recorded.folder / "presentation.jsonl", tmp_path / "old/demo.jsonl")
    assert find_recording("old", tmp_path) == tmp_path / "old"
    assert read_recording(tmp_path / "old") == read_recording(recorded.folder)


def test_parts_come_in_order_and_answers_after_their_questions(recorded: Recorded) -> None:
    heads = re.findall(r"^Lesson 4: DDP · (.+?) ─", recorded.printed, re.M)
    heads = [re.sub(r" \(\d+ of \d+\)|(?<=Question) \d of \d", "", head) for head in heads]
    order = list(dict.fromkeys(re.sub(r"part \d+ of 15: ", "", head) for head in heads))
    parts = ["Goal", "Mental model", "Terms", "Guess first", "demo.py", "What to look at", "Training", "One step"]
    assert order == [*parts, "The books", "Question", "The page to share"]
    numbers = [int(number) for number in re.findall(r"^Lesson 4: DDP · part (\d+) of 15: ", recorded.printed, re.M)]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 16))
    assert "The number: 4 bytes per parameter" in recorded.printed
    assert recorded.printed.index("Does optimizer.step() synchronise") < recorded.printed.index("The step is local")
    assert "predicted = measured, to the byte" in recorded.printed


def test_what_is_piped_is_plain_and_fits(recorded: Recorded) -> None:
    assert "\x1b" not in recorded.printed
    assert max(map(len, recorded.printed.splitlines())) <= 100


def test_a_replay_shows_the_same_without_ranks_or_torch(recorded: Recorded) -> None:
    page = recorded.folder / "page.html"
    before = page.read_bytes()
    page.unlink()
    code = (
        "import sys; from shardrun.__main__ import main\n"
        f"try: main(['present', '4', '--replay', {recorded.folder.name!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'accelerate', 'deepspeed', 'matplotlib'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=recorded.folder.parents[1], env=environment, text=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert page.read_bytes() == before
    assert done.stdout.splitlines() == recorded.printed.splitlines()[:-1]  # which says how to replay it


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        (lambda text: text[:-40], "ends in the middle of line"),
        (
            lambda text: "".join(text.splitlines(keepends=True)[:5]),
            "breaks off after line 5: it was ended before",
        ),
        (lambda text: text.replace('{"kind": "step"', "{", 1), "cannot be read at line"),
        (lambda text: "", "is no recording of a presentation"),
        (lambda text: text.replace('"schema": 1', '"schema": 99', 1), "is no recording of a presentation (schema 1)"),
    ],
)
def test_a_spoilt_recording_is_refused_in_a_sentence(recorded: Recorded, tmp_path: Path, cut, sentence: str) -> None:
    (tmp_path / "presentation.jsonl").write_text(cut((recorded.folder / "presentation.jsonl").read_text()))
    status, printed, said = show("4", "--replay", str(tmp_path))
    assert status == 2 and sentence in said and str(tmp_path / "presentation.jsonl") in said
    assert said.count("\n") == 1 and not printed


def test_mistakes_get_a_sentence(recorded: Recorded, tmp_path: Path) -> None:
    for arguments, sentence in (
        (("99",), "there is no lesson 99; there are 1, 2"),
        (("4", "--replay", "nothing"), "there is no recording in nothing; shardrun present N makes one"),
        (("4", "--replay", str(recorded.folder / "run")), "is a run of the trainer, not of shardrun present"),
        (("5", "--replay", str(recorded.folder)), "shows lesson 4, not 5: shardrun present 4 --replay"),
        (("4", "--replay", str(recorded.folder), "--processes", "4"), "--replay starts nothing"),
        (("5", "--config", "cpu/zero4"), "there is no accelerate config 'cpu/zero4'"),
        (("12", "--processes", "2"), "lesson 12 is shown in one process"),
        (("5", "--processes", "0"), "--processes is at least 1, not 0"),
        (("5", "--auto", "-1"), "--auto is a number of seconds, not -1.0"),
    ):
        status, _, said = show(*arguments, "--out", str(tmp_path / "runs"))
        assert status == 2 and sentence in said and said.count("\n") == 1, (arguments, said)
    assert not (tmp_path / "runs").exists()
