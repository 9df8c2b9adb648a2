"""Libraries that do not load, ranks that hang, training that fails: each in processes of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from shardrun import launch
from shardrun.doctor import collective, engine, probe, training

MEETING = "print('loading torch', flush=True); print('meeting the other rank', flush=True); import sys, time; "


def rank(code: str) -> tuple[str, ...]:
    """The command of a rank that only plays one; sys.argv is -c, BACKEND, RANK, WORLD_SIZE, PORT."""
    return (sys.executable, "-c", MEETING + code)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_collective_that_hangs_is_ended_and_says_where_each_rank_was() -> None:
    before, started = children(), time.monotonic()
    code = "print('summing', flush=True) if sys.argv[2] == '0' else 0; time.sleep(60)"
    (line,) = collective.two_ranks("gloo", 1.5, rank(code))
    assert line.status == "failure" and line.fix
    assert "rank 0 while summing; rank 1 while meeting the other rank" in line.said
    assert time.monotonic() - started < 20 and children() <= before


def test_a_rank_that_ends_with_an_error_ends_the_other() -> None:
    before, started = children(), time.monotonic()
    code = "time.sleep(60) if sys.argv[2] == '0' else sys.exit('RuntimeError: no such device')"
    (line,) = collective.two_ranks("gloo", 60, rank(code))
    assert line.status == "failure" and line.said == "rank 1 ended with an error: RuntimeError: no such device"
    assert time.monotonic() - started < 30 and children() <= before


def test_ranks_that_are_killed_are_not_called_well() -> None:
    (line,) = collective.two_ranks("gloo", 60, rank("import os; os.kill(os.getpid(), 9)"))
    assert line.status == "failure" and "signal 9" in line.said


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="names a network device")
def test_a_network_device_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    (line,) = collective.two_ranks("gloo", 120)
    assert line.status == "failure" and "nonesuch0" in line.said and "GLOO_SOCKET_IFNAME=lo" in line.fix


@pytest.mark.parametrize(
    ("code", "timeout", "why"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", 60, "ImportError: libcudart.so.13"),
        ("import os; os.kill(os.getpid(), 11)", 60, "ended by signal 11"),
        ("import time; time.sleep(60)", 0.5, "no answer within"),
        ("print('{')", 60, "its answer is no JSON"),
    ],
)
def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, code: str, timeout: float, why: str) -> None:
    with pytest.raises(probe.Unanswered, match=why.replace(".", r"\.")):
        probe.ask(code, timeout)
    monkeypatch.setattr(engine, "DEEPSPEED", code)
    if sys.platform == "linux":
        (line,) = engine.deepspeed(timeout)
        assert line.status == "failure" and why in line.said and "pip install" in line.fix


def test_deepspeeds_operators() -> None:
    sound = {
        "version": "0.19.8", "built": [], "built_for": "0.0", "torch": "2.13.0+cu130", "torch_cuda": "13.0",
        "nvcc": [13, 0], "ninja": True, "compiler": True,
    }  # fmt: skip

    def ops(**changes: object) -> tuple[str, str]:
        _, line = engine.judged({**sound, **changes})
        return line.status, line.said

    assert ops()[0] == "ok" and "can be compiled here" in ops()[1]
    assert "no nvcc" in ops(nvcc=[])[1] and "no ninja" in ops(ninja=False)[1]
    assert "nvcc is of CUDA 12.4, torch of 13.0" in ops(nvcc=[12, 4])[1]
    assert ops(torch="2.13.0+cpu", torch_cuda=None, nvcc=[])[0] == "ok"
    assert ops(built=["fused_adam"], built_for="2.13")[0] == "ok"
    status, said = ops(built=["fused_adam"], built_for="2.9")
    assert status == "failure" and "compiled for torch 2.9, and this is 2.13" in said and "fused_adam" in said


def test_training_that_fails_hangs_or_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def play(output: str, status: int | Exception, record: str = ""):  # type: ignore[no-untyped-def]
        def launched(config: Path, module: str, arguments: list[str], options: list[str], log: Path, *_: object) -> int:
            log.write_text(output)
            if record:
                run = log.parent / "run"
                run.mkdir()
                (run / "summary.json").write_text(f'{{"status": "{record}"}}')
                (run / "metrics.jsonl").write_text('{"step": 3}\n')
            if isinstance(status, Exception):
                raise status
            return status

        monkeypatch.setattr(training, "launch", launched)
        (line,) = training.train("zero2", 0, 60, lambda text: text.replace("secret", "***"))
        return line

    line = play("starting\nshardrun: error: the loss is nan at step 2.\n", 2)
    assert line.status == "failure" and line.said.startswith("the loss is nan at step 2 (on 2 CPU processes; ")
    assert "accelerate launch --num_processes 2" in line.fix and "cpu/zero2.yaml" in line.fix
    line = play("Traceback\n[rank1]: RuntimeError: out of secret memory\n=====\nsummary\n", 1)
    assert "RuntimeError: out of secret memory" in line.said  # which the report blots out; the file is blotted here
    kept = Path(line.said.split("printed: ")[1].rstrip(")"))
    assert kept.is_relative_to(tmp_path) and "out of *** memory" in kept.read_text()
    assert "did not end within 60 s" in play("…", subprocess.TimeoutExpired("accelerate", 60)).said
    assert "'interrupted' after step 3 of 5" in play("", 0, record="interrupted").said


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_training_on_gpus_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for what the failed run leaves
    (line,) = training.train("ddp", 2, 200)
    assert line.status == "failure" and "this machine has none that torch can use" in line.said


@pytest.mark.skipif(sys.platform == "win32", reason="sessions and signals of Unix")
def test_nothing_is_left_of_a_launch_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher whose rank, in a session of its own as torchrun's are, is deaf to an interruption, as it is itself."""
    deaf = "import signal, sys, time, os; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    rank_code = deaf + "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    launcher_code = (
        deaf + "import subprocess; subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], "
        "start_new_session=True); time.sleep(60)"
    )
    note = tmp_path / "rank"
    process = subprocess.Popen([sys.executable, "-c", launcher_code, rank_code, str(note)], start_new_session=True)
    try:
        while not (note.exists() and note.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        monkeypatch.setattr(launch, "GRACE", 0.5)
        launch._end(process)
    finally:
        process.kill()
        process.wait()
    pid = int(note.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the rank lives on"
        time.sleep(0.05)
    assert os.path.exists(note)
