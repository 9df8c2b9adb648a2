"""One writer of a run's folder: real processes that hold it, die, fork and start at the same moment."""

import errno
import json
import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from speedrun.run import writer
from speedrun.run.writer import LOCK, Lock, holder, status
from tests.ranks import RankPool, processes
from tests.speedrun.runs import content, small, train_here

pytestmark = pytest.mark.ranks
NO_FLOCK = OSError(errno.ENOTSUP, "no locks here")


def no_flock(*_: Any) -> None:
    raise NO_FLOCK


def hold(folder: Path, said: Connection, flock: bool = True, child: bool = False) -> None:
    """In a process of its own: take the folder and say so, then sleep. child: fork one that outlives it."""
    if not flock:
        writer.fcntl.flock = no_flock  # type: ignore[assignment]
    try:
        Lock(folder)
    except ValueError as error:
        said.send(str(error))
        return
    if child and os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    said.send("held")
    time.sleep(60)


def start(*arguments: Any) -> tuple[Any, Connection]:
    ours, theirs = processes().Pipe()
    process = processes().Process(target=hold, args=(arguments[0], theirs, *arguments[1:]), daemon=True)
    process.start()
    return process, ours


def answer(pipe: Connection) -> str:
    assert pipe.poll(60)
    return str(pipe.recv())


@pytest.mark.parametrize("flock", (True, False))
def test_a_second_one_says_who_is_there_and_a_dead_one_lets_go(
    tmp_path: Path, flock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flock:
        monkeypatch.setattr(writer.fcntl, "flock", no_flock)
    folder = tmp_path / "run"
    process, pipe = start(folder, flock)
    assert answer(pipe) == "held"
    (folder / "summary.json").write_text('{"status": "running"}')
    before, clock = content(folder), time.strftime("%H:")
    with pytest.raises(ValueError, match="; wait for it or give another --name.$") as error:
        Lock(folder)
    assert f"{folder} is being trained by process {process.pid} on {os.uname().nodename} since {clock}" in str(
        error.value
    )
    assert content(folder) == before and status(folder) == "running"
    process.kill()
    process.join()
    assert status(folder) == "died" and holder(folder) is None
    lock = Lock(folder)
    assert lock.note == "" and status(folder) == "running"
    lock.release()
    assert [path.name for path in folder.iterdir()] == ["summary.json"]


def test_a_child_that_outlives_the_run_does_not_hold_it(tmp_path: Path) -> None:
    process, pipe = start(tmp_path / "run", True, True)
    assert answer(pipe) == "held"
    process.kill()
    process.join()
    Lock(tmp_path / "run").release()  # the child sleeps on


@pytest.mark.parametrize("flock", (True, False))
@pytest.mark.parametrize("left", ("nothing", "a dead one"))
def test_of_several_at_the_same_moment_one_wins(tmp_path: Path, flock: bool, left: str) -> None:
    for i in range(2):
        folder = tmp_path / str(i)
        if left == "a dead one":
            folder.mkdir()
            (folder / LOCK).write_text(json.dumps({**_here(), "started": "long ago"}))
        started = [start(folder, flock) for _ in range(4)]
        said = [answer(pipe) for _, pipe in started]
        for process, _ in started:
            process.kill()
            process.join()
        assert said.count("held") == 1 and sum("is being trained by process" in one for one in said) == 3, said


def _here() -> dict[str, Any]:
    mine = writer.Holder(os.uname().nodename, os.readlink("/proc/self/ns/pid"), os.getpid(), "", time.time() - 9e4)
    return dict(vars(mine))


def test_a_number_that_is_used_again_is_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.fcntl, "flock", no_flock)
    (tmp_path / LOCK).write_text(json.dumps({**_here(), "started": "before this process was"}))
    assert holder(tmp_path) is None
    Lock(tmp_path).release()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"7",
        b"[" * 100_000,
        b"{}",
        b'{"host": 1, "space": 2, "pid": "x", "started": 3, "since": "then"}',
        b'{"host": "node7", "space": "", "pid": 3, "started": "", "since": 1e300}',
        b'{"host": "node7", "space": "", "pid": 3, "started": "", "since": NaN}',
    ],
)
def test_a_lock_file_that_names_nobody_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    (tmp_path / "summary.json").write_text('{"status": "running"}')
    assert holder(tmp_path) is None and status(tmp_path) == "died"
    lock = Lock(tmp_path)
    assert lock.note == "" and status(tmp_path) == "running"
    lock.release()


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", '{"status": 7}', "NaN", ""])
def test_a_damaged_summary_is_no_run_and_no_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    assert status(tmp_path) is None


def test_on_another_host_its_last_sign_decides(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({**_here(), "host": "node7", "pid": 3}))
    (tmp_path / "summary.json").write_text('{"status": "running"}')
    with pytest.raises(
        ValueError, match="is being trained by process 3 on node7 since ....-..-.. ..:.*last sign of life"
    ):
        Lock(tmp_path)
    assert status(tmp_path) == "running"
    long_ago = time.time() - writer.SILENCE - 60
    os.utime(tmp_path / LOCK, (long_ago, long_ago))
    assert status(tmp_path) == "died"
    lock = Lock(tmp_path)
    assert "was being trained by process 3 on node7" in lock.note and "no sign for 4 minutes" in lock.note
    lock.release()


def test_signs_of_life_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BEAT", 0.05)
    lock = Lock(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / LOCK).stat().st_mtime > 0
    lock.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/run cannot be written \(Not a directory\): name another folder"):
        Lock(tmp_path / "file" / "run")


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    Lock(tmp_path / "a" / "b").release()
    assert not (tmp_path / "a").exists()


def test_a_second_start_of_a_run_changes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    """On two ranks, which is said by rank 0 alone; the same without --resume."""
    ranks.run(2, train_here, "ddp", small(out=str(tmp_path)))
    lock, before = Lock(tmp_path / "run"), content(tmp_path)
    for resume in ("auto", "none"):
        with pytest.raises(AssertionError, match=rf"is being trained by process {os.getpid()} on "):
            ranks.run(2, train_here, "ddp", small(out=str(tmp_path), resume=resume, steps=8))
        assert content(tmp_path) == before
    lock.release()


@pytest.mark.slow
def test_two_launches_of_one_command(tmp_path: Path, warm_python: str) -> None:
    """The first one trains to its end, the second one ends with 2."""
    command = [
        *(warm_python, "-m", "speedrun.train", "tiny", "--steps", "60", "--data.global-batch", "4", "--name", "dup"),
        *("--eval-every", "0", "--data.eval-tokens", "2048", "--data.sequence-length", "64", "--progress", "plain"),
        *("--checkpoint.every", "2", "--resume", "auto", "--out", str(tmp_path)),
    ]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2], said
    assert f"{tmp_path / 'dup'} is being trained by process " in said[codes.index(2)]
    lines = (tmp_path / "dup/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(61)]
    assert not (tmp_path / "dup" / LOCK).exists()
