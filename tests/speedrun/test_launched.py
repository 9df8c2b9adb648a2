"""Real launches, as a learner types them: what is printed, what is left, and that no process stays behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from speedrun.data.shards import write_tokens
from speedrun.run.command_line import parse
from tests.ranks import RankPool
from tests.speedrun.runs import in_folder, metrics, read, train_here

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    *("--model.layers", "1", "--model.width", "48", "--model.heads", "3", "--data.global-batch", "12"),
    *("--data.sequence-length", "64", "--data.eval-tokens", "640", "--name", "run"),
]

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@contextmanager
def launch(
    config: str, out: Path, *arguments: str, options: tuple[str, ...] = (), python: str = sys.executable
) -> Iterator[subprocess.Popen[str]]:
    """`accelerate launch` in a session of its own, with its output piped; nothing of it outlives the block.

    python: a warm one (tests/warm.py) where a test is about what is said, since `finish` does not see its ranks.
    """
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    file = Path("accelerate_configs/cpu", f"{config}.yaml")  # an absolute path stays itself
    process = subprocess.Popen(
        [
            *(python, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", str(file), *options, "-m", "speedrun.train", *arguments),
            *("--out", str(out)),
        ],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for left in [*_processes(process.pid), process]:
            left.kill()


def _processes(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """Wait for the launcher and all its ranks; returns what they printed."""
    ranks: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + seconds
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            ranks.update({rank.pid: rank for rank in _processes(process.pid)})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        ended.set()
        watcher.join()
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=max(1.0, deadline - time.monotonic()))
    assert not alive, "ranks outlived their launcher"
    return output, errors


def test_zero3_prints_our_lines_only_and_keeps_the_accelerate_config(tmp_path: Path) -> None:
    with launch("zero3", tmp_path, "tiny", "--steps", "2", *SMALL) as process:
        output, errors = finish(process, 120)
    assert process.returncode == 0
    # What accelerate's own process logs before it starts the ranks is beyond us: that it found no GPU, OMP_NUM_THREADS.
    launcher = ("torch/distributed/run.py", "real_accelerator.py")
    lines = [line for line in (output + errors).splitlines() if line and not any(name in line for name in launcher)]
    assert lines[0].startswith("tiny: ") and "zero3 on 2 ranks (cpu, fp32)" in lines[0]
    assert lines[1].startswith("kernels: torch (")
    assert lines[2].startswith("attention: sdpa (")
    assert lines[3].startswith("orthogonalisation: ")
    assert [line.split("/")[0] for line in lines[4:-1]] == ["step:0", "step:1", "step:2"]
    assert lines[-1] == f"run: {tmp_path / 'run'}"
    config = read(tmp_path / "run", "config.json")
    written = yaml.safe_load((ROOT / "accelerate_configs/cpu/zero3.yaml").read_text())
    assert config["launch"]["config"] == written
    assert config["launch"]["config_file"] == "accelerate_configs/cpu/zero3.yaml"
    environment = read(tmp_path / "run", "environment.json")
    assert environment["versions"]["deepspeed"] and environment["command"][1:3] == ["tiny", "--steps"]


def test_a_mistake_is_one_sentence_also_in_the_summary_of_torchrun(tmp_path: Path, warm_python: str) -> None:
    with launch("ddp", tmp_path, "tiny", "--data.global-batch", "13", python=warm_python) as process:
        output, errors = finish(process, 60)
    assert process.returncode != 0
    sentence = "shardrun: error: data.global_batch 13 does not divide over 2 ranks; use 12, or another number"
    lines = (output + errors).splitlines()
    assert sum(line.startswith(sentence) for line in lines) == 1
    assert (output + errors).count(sentence) == 2, "once by a rank, once in the summary, not once per rank"
    # It is the last thing that the summary says, before its closing rule.
    assert lines[-2].strip().startswith("traceback : " + sentence) and set(lines[-1]) == {"="}
    assert not any(tmp_path.iterdir())


def test_a_mistake_on_one_process_is_the_last_thing_on_the_screen(tmp_path: Path) -> None:
    """Nothing of accelerate's own launcher after it, which has a traceback for every status that is not 0."""
    with launch("single", tmp_path, "tiny", "--data.global-batch", "0") as process:
        output, errors = finish(process, 60)
    sentence = "data.global_batch is 0, but must be from 1 to 1,000,000"
    assert process.returncode != 0 and output == ""
    assert errors.splitlines()[-1] == f"shardrun: error: {sentence}" and errors.count(sentence) == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (("--data.global-batch", "0"), "data.global_batch is 0, but must be from 1 to 1,000,000"),
        (("--stepps", "3"), "the command line is wrong; what is printed above says where."),
    ],
)
def test_a_mistake_is_the_last_thing_on_the_screen_with_a_config_of_ones_own(
    tmp_path: Path, mistake: tuple[str, ...], sentence: str
) -> None:
    """One that does not tell the launcher to be quiet: its traceback comes first, and the sentence once, after it."""
    config = tmp_path / "own.yaml"
    config.write_text("distributed_type: 'NO'\nuse_cpu: true\nmixed_precision: 'no'\nnum_processes: 1\n")
    with launch(str(config.with_suffix("")), tmp_path / "runs", "tiny", *mistake) as process:
        output, errors = finish(process, 60)
    assert process.returncode != 0 and "CalledProcessError" in errors and mistake[0] in output + errors
    assert errors.splitlines()[-1].startswith(f"shardrun: error: {sentence}") and errors.count(sentence) == 1


def test_a_bad_token_that_one_rank_meets_ends_all(tmp_path: Path, warm_python: str) -> None:
    """One token, in one row of a step in mid-run: only its rank can know. The others wait for it in a collective."""
    tokens = np.random.default_rng(1).integers(0, 50256, 12 * 32 * 10)
    tokens[12 * 32 * 9] = 60_000
    write_tokens(tmp_path / "fineweb_train_000001.bin", tokens)
    write_tokens(tmp_path / "fineweb_val_000000.bin", tokens[:2000])
    small = ["--model.vocab-size", "50257", "--model.layers", "1", "--model.width", "16", "--model.heads", "1"]
    arguments = ["tiny", *small, "--data.source", str(tmp_path), *SMALL, "--data.sequence-length", "32"]
    with launch("ddp", tmp_path / "runs", *arguments, "--steps", "10", python=warm_python) as process:
        output, errors = finish(process, 60)
    assert process.returncode != 0
    sentence = f"Shard {tmp_path}/fineweb_train_000001.bin holds token 60000 at position 3456, outside model.vocab_size"
    assert sentence in errors
    assert f"traceback : shardrun: error: {sentence}" in errors
    assert read(tmp_path / "runs/run", "summary.json")["status"] in ("failed", "running")  # whoever came first
    assert 1 <= len(metrics(tmp_path / "runs/run")) <= 10


def test_ctrl_c_ends_all_ranks_and_leaves_a_readable_record(tmp_path: Path) -> None:
    with launch("ddp", tmp_path, "tiny", "--steps", "100000", *SMALL) as process:
        deadline = time.monotonic() + 90
        lines = tmp_path / "run/metrics.jsonl"
        while not (lines.is_file() and lines.read_text().count("\n") > 4) and time.monotonic() < deadline:
            time.sleep(0.2)
        interrupted = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, errors = finish(process, 60)
    assert time.monotonic() - interrupted < 60  # torchrun would wait 300 s for a rank that does not end
    assert process.returncode != 0
    assert errors.count("shardrun: interrupted; a run that had begun holds everything up to its last step.") == 1
    summary = read(tmp_path / "run", "summary.json")
    assert summary["status"] == "interrupted" and summary["step"] == metrics(tmp_path / "run")[-1]["step"] >= 4


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["train_loss"] for line in metrics(folder) if line["step"]}


def test_a_killed_rank_ends_all_and_the_restart_resumes_by_itself(ranks: RankPool, tmp_path: Path) -> None:
    """kill -9 of rank 1 in mid-run, under torchrun's --max_restarts: the curve is that of a run nobody has killed.

    test_resume.py kills a rank of the pool under every strategy; benchmarks/kills.md has real launches of each.
    """
    arguments = ["tiny", "--steps", "30", "--checkpoint.every", "3", "--resume", "auto", *SMALL]
    whole = parse([*arguments, "--progress", "none"])[1]
    ranks.run(2, train_here, "fsdp", in_folder(whole, tmp_path / "whole"))
    restarts = ("--max_restarts", "1", "--monitor_interval", "1")
    with launch("fsdp", tmp_path / "killed", *arguments, options=restarts) as process:
        lines, deadline = tmp_path / "killed/run/metrics.jsonl", time.monotonic() + 120
        while not (lines.is_file() and lines.read_text().count("\n") > 8) and time.monotonic() < deadline:
            time.sleep(0.02)
        first = [p for p in _processes(process.pid) if p.environ().get("RANK")]
        next(p for p in first if p.environ()["RANK"] == "1").kill()
        _, alive = psutil.wait_procs(first, timeout=30)
        assert not alive, "a rank outlived the one that was killed by 30 s"
        output, errors = finish(process, 200)
    assert process.returncode == 0, errors
    assert "rank 1 ended or hung in step" in errors
    assert read(tmp_path / "killed/run", "config.json")["resumed_at"] >= 3
    assert losses(tmp_path / "killed/run") == losses(tmp_path / "whole/run")


def test_a_rank_that_hangs_is_named_after_the_collective_timeout(tmp_path: Path) -> None:
    """Rank 1 is stopped, not killed. Under ZeRO-2, whose engine makes process groups with timeouts of their own."""
    arguments = ["tiny", "--steps", "100000", "--collective-timeout", "5", *SMALL]
    with launch("zero2", tmp_path, *arguments) as process:
        lines, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while not (lines.is_file() and lines.read_text().count("\n") > 4) and time.monotonic() < deadline:
            time.sleep(0.05)
        stopped = next(p for p in _processes(process.pid) if p.environ().get("RANK") == "1")
        waiting = next(p for p in _processes(process.pid) if p.environ().get("RANK") == "0")
        stopped.suspend()
        waiting.wait(60)
        stopped.kill()  # as torchrun would do after 30 s, since it cannot answer
        output, errors = finish(process, 60)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("shardrun: error: rank 1 ended or hung in step ")]
    assert len(said) == 1
    assert read(tmp_path / "run", "summary.json")["status"] == "failed"
