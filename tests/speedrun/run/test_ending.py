"""How a rank's process ends: its status, its sentence, and what it leaves for torchrun's summary."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from speedrun.run.ending import NotSaved, Preempted, Stopped, _may_be_launcher, as_exception, guarded
from speedrun.run.last_words import another_has_spoken, leave_for_torchrun, say_once, speaks_first
from speedrun.run.signals import PREEMPTING, Signals
from strategies.errors import UserError


@pytest.fixture(autouse=True)
def restored_signal() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *PREEMPTING)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UserError("data.global_batch 3 is odd."), 2, "shardrun: error: data.global_batch 3 is odd.\n"),
        (FileExistsError("runs/x is there."), 2, "shardrun: error: runs/x is there.\n"),
        (PermissionError(13, "Not yours", "runs/x"), 2, "shardrun: error: [Errno 13] Not yours: 'runs/x'\n"),
        (FloatingPointError("the loss is nan."), 2, "shardrun: error: the loss is nan.\n"),
        (KeyboardInterrupt(), 130, "shardrun: interrupted;"),
        (Stopped(), 130, "shardrun: interrupted;"),
        (Preempted(), 143, "shardrun: preempted;"),
        (RuntimeError("[gloo/pair.cc:553] Connection closed by peer [::1]:1"), 1, "shardrun: another rank has ended,"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_no_traceback(
    error: BaseException,
    status: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    (tmp_path / "0").mkdir()
    with pytest.raises(SystemExit) as end:
        guarded(raising(error))
    shown = capsys.readouterr().err
    assert end.value.code == status
    assert shown.startswith(sentence) and shown.count("\n") == 1
    left = json.loads((tmp_path / "0" / "error.json").read_text())["message"]
    assert left["message"] == shown.strip() == left["extraInfo"]["py_callstack"]


def test_output_that_nobody_reads_any_more_is_no_lost_rank() -> None:
    script = "from speedrun.run.ending import guarded; guarded(lambda: [print(i, flush=True) for i in range(10**6)])"
    rank = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout and rank.stderr and rank.stdout.readline() == "0\n"
    rank.stdout.close()
    shown = rank.stderr.read()
    assert rank.wait(60) == 1
    assert shown == "shardrun: nobody reads the output any more (`| head`?), and so this rank ends.\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_lacks_a_character_is_no_end(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [io.BytesIO(), io.BytesIO()]
    for name, stream in zip(("stdout", "stderr"), written, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))

    def job() -> None:
        print("resumed: steps 6 → 8")
        raise UserError("läufe/漢 is not there.")

    with pytest.raises(SystemExit) as end:
        guarded(job)
    assert end.value.code == 2
    assert written[0].getvalue() == b"resumed: steps 6 ? 8\n"
    assert "is not there." in written[1].getvalue().decode(encoding)


def test_an_error_of_ours_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        guarded(raising(RuntimeError("a bug")))
    assert end.value.code == 1
    assert "Traceback" in (shown := capsys.readouterr().err) and "RuntimeError: a bug" in shown


def test_a_run_that_ends_well_has_status_zero_and_hides_one_deprecation_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def job() -> None:
        for message in (
            "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another.",
            "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.",
            "`torch.distributed.all_reduce` is deprecated.",
        ):
            warnings.warn(message, FutureWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as seen, pytest.raises(SystemExit) as end:
        warnings.simplefilter("always")
        guarded(job)
    assert end.value.code == 0 and capsys.readouterr().err == ""
    assert [str(warning.message) for warning in seen] == ["`torch.distributed.all_reduce` is deprecated."]


def test_ranks_of_one_machine_say_a_sentence_once_and_different_ones_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        say_once("shared")
        assert (tmp_path / rank / "error.json").exists() == (rank == "0")
        say_once(f"of rank {rank}")
    assert capsys.readouterr().err.splitlines() == ["shared", "of rank 0", "of rank 1"]


def test_the_ranks_that_do_not_speak_give_the_one_that_does_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    assert speaks_first("something")
    began = time.monotonic()
    assert not speaks_first("something")
    assert time.monotonic() - began >= 1


def test_a_rank_knows_whether_another_has_something_else_to_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not another_has_spoken("ended")  # there is no torchrun
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    (tmp_path / "0").mkdir()
    assert not another_has_spoken("ended")
    say_once("ended")
    assert not another_has_spoken("ended") and another_has_spoken("another")
    say_once("the data are missing")
    assert another_has_spoken("ended")


def test_what_all_ranks_say_stands_once_in_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for rank, sentence in enumerate(("data is missing.", "data is missing.", "rank 2 has another trouble.")):
        file = tmp_path / str(rank) / "error.json"
        file.parent.mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        leave_for_torchrun(sentence)
        written.append(json.loads(file.read_text())["message"]["message"] if file.exists() else None)
    assert written == ["data is missing.", None, "rank 2 has another trouble."]
    failures = {
        rank: ProcessFailure(rank, 100 + rank, exitcode, str(tmp_path / str(rank) / "error.json"))
        for rank, exitcode in ((1, -15), (0, 2))  # within one second, and the one that was ended comes first
    }
    assert ChildFailedError("speedrun.train", failures).get_first_failure()[0] == 0


def test_the_first_interrupt_is_noted_and_a_later_one_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals() as interruption:
        assert not interruption.interrupted
        for _ in range(3):  # the terminal's, and torchrun's within the same moment
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.interrupted and not interruption.preempted
        interruption._since -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", [number.name for number in PREEMPTING if number != signal.SIGALRM])
def test_every_other_signal_is_noted_and_never_interrupts_at_once(name: str) -> None:
    """SIGALRM is the one by which pytest ends a test that hangs here: what somebody else handles stays theirs."""
    outside = signal.signal(getattr(signal, name), signal.SIG_DFL)  # the suite may run under nohup
    alarm, before = signal.getsignal(signal.SIGALRM), signal.getsignal(getattr(signal, name))
    with Signals() as interruption:
        for _ in range(2):  # a cluster's to the rank, and the launcher's
            os.kill(os.getpid(), getattr(signal, name))
        interruption._since -= 2
        os.kill(os.getpid(), getattr(signal, name))
        assert interruption.preempted and not interruption.interrupted and interruption.name == name
        assert signal.getsignal(signal.SIGALRM) == alarm
    assert signal.getsignal(getattr(signal, name)) is before
    signal.signal(getattr(signal, name), outside)


def test_what_nohup_ignores_stays_ignored_but_for_a_rank_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    outside = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.heard
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with Signals() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.preempted
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, outside)


def test_a_ctrl_c_of_any_rank_counts_for_more_than_sigterm_and_a_checkpoint_that_failed_for_most() -> None:
    """Whatever share of the ranks it is."""
    assert as_exception(0.0, 0.0, 0.0) is None
    assert type(as_exception(1.0, 0.0, 0.0)) is type(as_exception(0.25, 0.0, 0.0)) is Preempted
    assert type(as_exception(0.0, 0.25, 0.0)) is type(as_exception(1.0, 1 / 64, 0.0)) is Stopped
    assert type(as_exception(1.0, 1.0, 1 / 64)) is NotSaved


ORPHAN = """
import os, subprocess, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "1"
rank = "import time; time.sleep(2); from speedrun.run.ending import guarded; guarded(lambda: time.sleep(60))"
print(subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher_lives", (0.0, 8.0))
def test_a_rank_ends_when_its_launcher_has_gone_also_while_it_still_imported(launcher_lives: float) -> None:
    if launcher_lives == 0 and _may_be_launcher_under_torchrun(1):
        pytest.skip("process 1 of this machine, which orphans go to, looks like a launcher, or cannot be seen")
    launcher = [sys.executable, "-c", ORPHAN, str(launcher_lives)]
    root = Path(__file__).parents[3]
    printed = subprocess.run(launcher, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rank = psutil.Process(int(printed.stdout))
    try:
        rank.wait(timeout=40)  # it imports torch first
    finally:
        if rank.is_running():
            rank.kill()


def _may_be_launcher_under_torchrun(parent: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "1")
        return _may_be_launcher(parent)
