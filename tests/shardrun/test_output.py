"""No character, no closed pipe, no interruption and no full disk loses a result or leaves half of one."""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from shardrun import compare
from shardrun.__main__ import main
from shardrun.data.convert import convert
from shardrun.data.tokenize import tokenize
from shardrun.data.writing import Together
from shardrun.lesson.course import find_lesson
from shardrun.lesson.folder import Folder, start
from shardrun.output import write_whole
from speedrun.data.shards import write_tokens

CONFIG = Path(__file__).parents[2] / "accelerate_configs/cpu"

VERBS = [
    ["explain", str(CONFIG / "zero2.yaml")],
    ["diff", str(CONFIG / "zero2.yaml"), str(CONFIG / "fsdp.yaml")],
    ["plan", "tiny"],
    ["plan", "tiny", "--json"],
    ["plan", "--court"],
    ["ablate", "--list"],
    ["lesson", "list"],
    ["lesson", "progress"],
    ["lesson", "start", "5"],
    ["lesson", "hint", "5"],
    ["lesson", "solution", "5"],
    ["data", "inspect", "text"],
    ["data", "inspect", "nothing-→"],
    ["--help"],
    *([verb, "--help"] for verb in ("plan", "compare", "certify", "data", "checkpoint", "present", "doctor")),
]
"""Verbs that start nothing; the others say what they say through the same stream."""

IN_ASCII = """
import io, json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from shardrun.__main__ import main
wrong = []
for arguments in json.loads(sys.stdin.read()):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding={encoding!r}, errors="strict") for _ in range(2)]
    sys.stdout, sys.stderr = streams
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        status = repr(error)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    [stream.flush() for stream in streams]
    said = [stream.buffer.getvalue().decode(stream.encoding) for stream in streams]
    expected = 2 if "nothing" in arguments[-1] else 0
    if status != expected or "codec" in said[1] or not "".join(said).strip():
        wrong.append((arguments, status, said[1][-300:]))
print(json.dumps(wrong))
"""


@pytest.mark.parametrize("encoding", ["ascii"])  # latin-1 was tried too
def test_a_terminal_that_lacks_characters(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "漢字→ä.txt").write_text("text →", encoding="utf-8")
    code = IN_ASCII.format(root=str(Path(__file__).parents[2]), encoding=encoding)
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(VERBS), capture_output=True, text=True, cwd=tmp_path, timeout=200
    )
    assert json.loads(done.stdout) == [], done.stderr


def test_the_real_streams_lack_characters_too(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "shardrun", "explain", str(CONFIG / "zero2.yaml")]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=Path(__file__).parents[2], timeout=100)
    assert done.returncode == 0 and b"?" in done.stdout and not done.stderr


def test_compare_writes_before_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever then becomes of printing."""

    def fail(*arguments: Any) -> None:
        raise UnicodeEncodeError("ascii", "→", 0, 1, "no such character")

    def write(runs: Any, arguments: Any) -> str:
        write_whole(tmp_path / "compare.json", "{}")
        return "{}"

    monkeypatch.setattr(compare, "_run_all", lambda arguments: ([], True))
    monkeypatch.setattr(compare, "_print_books", fail)
    monkeypatch.setattr(compare, "_write", write)
    with pytest.raises(UnicodeEncodeError):
        compare.run(argparse.Namespace(json=False, processes=2, why=False))
    assert (tmp_path / "compare.json").read_text() == "{}"


def small_text(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"document {number} " * 200)
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.shardrun.test_tokenize import byte_bpe

    tokenizer = byte_bpe()
    from tokenizers import pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["a"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_nobody_reads_the_output_any_more(tmp_path: Path, tokenizer_file: Path) -> None:
    """`| head -0`: a verb that leaves files still leaves them."""
    small_text(tmp_path / "text")
    command = [sys.executable, "-m", "shardrun", "data", "tokenize", str(tmp_path / "text"), "--processes", "1"]
    command += ["--tokenizer", str(tokenizer_file), "--out", str(tmp_path / "out")]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=pipe, cwd=Path(__file__).parents[2], timeout=100)
    assert done.returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("text_train_000001.bin", "text_val_000000.bin", "tokens.json", "tokenizer.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130)])  # SIGTERM, SIGHUP, SIGKILL were tried too
def test_an_interrupted_tokenize_leaves_nothing(tmp_path: Path, tokenizer_file: Path, number: int, status: int) -> None:
    """Sent to all of its processes, as a terminal does it, while shards are being written; no traceback, no process."""
    (tmp_path / "text").mkdir()
    for name in range(8):
        (tmp_path / "text" / f"{name}.txt").write_text(f"document {name} " * 50_000)
    command = [sys.executable, "-m", "shardrun", "data", "tokenize", str(tmp_path / "text"), "--processes", "2"]
    command += ["--tokenizer", str(tokenizer_file), "--out", str(tmp_path / "a/out"), "--shard-tokens", "25000"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=Path(__file__).parents[2]
    )
    until = time.monotonic() + 100
    while not list((tmp_path / "a").glob("out/*_000003.bin.part")) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status and b"Traceback" not in said
    assert not (tmp_path / "a").exists() or status == -9
    until = time.monotonic() + 20
    while still_there(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not still_there(process.pid)


def still_there(group: int) -> list[psutil.Process]:
    """Processes of that session which run."""
    return [
        each
        for each in psutil.process_iter(["status"])
        if each.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(each.pid) == group
    ]


@pytest.fixture
def full_disk() -> Any:
    """Files may not grow beyond 60 KiB: what a full disk does, within a process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, tokenizer_file: Path, full_disk: None) -> None:
    small_text(tmp_path / "text")
    with pytest.raises(ValueError, match=r"out/text_train_000001.bin cannot be written \(File too large\): make room"):
        tokenize(tmp_path / "text", tmp_path / "out", tokenizer_file, 1, 10**6, lambda *step: None)
    assert not (tmp_path / "out").exists()


def test_convert_leaves_nothing_of_what_it_could_not_end(tmp_path: Path) -> None:
    for split in ("train", "val"):
        np.save(tmp_path / f"x_{split}.npy", np.arange(50_000, dtype=np.uint16) % 99)
    errors: list[BaseException] = [OSError(28, "No space left on device"), KeyboardInterrupt()]

    def fail(path: Path, *rest: Any) -> None:
        write_tokens(path, *rest)
        if "000001" in path.name:
            raise errors.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardrun.data.convert.write_tokens", fail)
        for expected in (KeyboardInterrupt, ValueError):
            with pytest.raises(expected):
                convert([tmp_path], tmp_path / "out")
            assert not (tmp_path / "out").exists()
    assert len(convert([tmp_path], tmp_path / "out").shards) == 2


def test_what_a_killed_run_left_is_taken_away(tmp_path: Path) -> None:
    for name in ("text_val_000001.bin.part", "tokens_train_000000.bin.part", "held_out.part", "mine.part"):
        (tmp_path / name).write_bytes(b"")
    with Together(tmp_path) as files:
        files.part("text_val_000000.bin").write_bytes(b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.part", "text_val_000000.bin"]


def test_a_lesson_is_never_started_with_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is left alone from then on, so a half would stay."""
    lesson = find_lesson(5)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _raise)
        with pytest.raises(KeyboardInterrupt):
            start(Folder(tmp_path), lesson)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    start(Folder(tmp_path), lesson)
    exercise = tmp_path / lesson.name / "exercise.py"
    assert exercise.read_bytes() == (lesson.folder / "exercise.py").read_bytes()


def _raise(*arguments: Any) -> None:
    raise KeyboardInterrupt


def ended(action: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        action()
    return int(end.value.code or 0), capsys.readouterr().err


def test_sigterm_tidies_up_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tidied = []

    def run(arguments: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            tidied.append(True)
        return 0

    monkeypatch.setattr("shardrun.lesson.run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert ended(lambda: main(["lesson", "list"]), capsys) == (143, "")
    assert tidied == [True] and signal.getsignal(signal.SIGTERM) == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "before")
    with pytest.raises(ValueError, match=r"a.json cannot be written \(File too large\)"):
        write_whole(path, "x" * 100_000)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"no/a.json cannot be written \(No such file"):
        write_whole(tmp_path / "no" / "a.json", "x")


def test_letters_of_a_path_in_a_c_locale_are_written_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "card.md", "# " + "läufe".encode().decode("ascii", "surrogateescape"))
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == "# läufe"
