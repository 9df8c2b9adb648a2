"""benchmarks/gpu: to its end on a CPU, and piece by piece with parts that hang, fail, or lack a package."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.books import add_books
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.results import Result
from tests.benchmarks.parts import MACHINE, part

ROOT = Path(__file__).parents[2]


def options(folder: Path, **given: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"minutes": 5, "only": None, "peer": None, "tiny": False, "out": folder} | given))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a card, which nobody has to ask."""
    monkeypatch.setattr(gpu, "look_at", lambda options: (dict(MACHINE), True))
    monkeypatch.setattr(sys, "argv", ["gpu", "--minutes", "5", "--only", "fail", "--out", "here"])


def records(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "test-card.json").read_text())["parts"]


def test_a_part_that_fails_is_recorded_with_its_last_lines_and_the_rest_goes_on(
    card: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.examine(options(tmp_path), [part("fail"), part("good")]) == 1
    found = records(tmp_path)
    assert (found["fail"]["status"], found["good"]["status"]) == ("failed", "done")
    assert found["fail"]["last lines"] == ["this is fail", "it is broken"]
    assert found["fail"]["result"]["tables"] == {"Seen": [{"what": "fail", "tiny": "no"}]}
    assert (tmp_path / "test-card" / "good.log").read_text() == "this is good\n"
    assert "not well: fail" in capsys.readouterr().out
    gpu.examine(options(tmp_path), [part("fail"), part("good")])
    assert capsys.readouterr().out.count(" before") == 2, "nothing is run twice"


def test_the_table_shows_what_was_found_on_what_and_what_was_not_run(card: None, tmp_path: Path) -> None:
    real = {name: PARTS[i].name for i, name in enumerate(("good", "fail"))}
    parts = [Part(real[name], "", "tests.benchmarks.parts", 30, (), (name,)) for name in real]
    gpu.examine(options(tmp_path), parts)
    text = (tmp_path / "test-card.md").read_text()
    assert text.startswith("# Test Card\n") and "rate of copies (TB/s) 2.5" in text and "it is broken" in text
    assert "| what | tiny |\n|---|---|\n| good | no |" in text
    assert text.count("Not yet run.") == len(PARTS) - 2
    assert "no card" not in text


def test_a_part_that_hangs_is_ended_with_all_that_it_started(card: None, tmp_path: Path) -> None:
    hanging = Part("hang", "", "tests.benchmarks.parts", 4, (), ("hang",))
    assert gpu.examine(options(tmp_path), [hanging, part("good")]) == 1
    found = records(tmp_path)
    assert (found["hang"]["status"], found["good"]["status"]) == ("over its limit", "done")
    assert found["hang"]["seconds"] < 15
    assert found["hang"]["result"]["tables"]["Seen"], "what it had found is kept"
    if Path("/proc/self/environ").exists():  # elsewhere only its own session is known
        assert not alive(int(found["hang"]["result"]["notes"][0]))


def alive(pid: int) -> bool:
    """Whether it runs: where nobody waits for it, a process that has been killed stays as a zombie."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_part_that_lacks_a_package_is_left_out_until_the_package_is_there(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = part("good", "numpy", "no_such_package", "nor_this")
    assert gpu.examine(options(tmp_path), [lacking]) == 1
    sentence = "Left out: the packages no_such_package and nor_this are not installed."
    assert records(tmp_path)["good"]["result"]["notes"] == [sentence]
    assert "left out for want of no_such_package, nor_this" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "find_spec", lambda name: True)
    assert gpu.examine(options(tmp_path), [lacking]) == 0
    assert records(tmp_path)["good"]["status"] == "done"


def test_it_goes_on_where_the_time_was_over(card: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = Part("hang", "", "tests.benchmarks.parts", 6, (), ("hang",))
    assert gpu.examine(options(tmp_path, minutes=4 / 60), [slow, part("good")]) == 1
    assert records(tmp_path)["hang"]["status"] == "cut off, the time was over"
    said = capsys.readouterr().out
    assert "good: not begun, too little time is left" in said
    assert f"This goes on:\n  {sys.executable} -m benchmarks.gpu --minutes 5 --out here\n" in said
    assert gpu.examine(options(tmp_path), [part("hang"), part("good")][1:]) == 0
    assert records(tmp_path)["good"]["status"] == "done"


def test_a_part_begins_where_half_of_its_limit_is_left_and_shorter_ones_after_it_too(
    card: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Part("hang", "", "tests.benchmarks.parts", 600, (), ("hang",))
    assert gpu.examine(options(tmp_path, minutes=1), [long, part("good")]) == 1
    assert "hang: not begun, too little time is left" in capsys.readouterr().out
    assert list(records(tmp_path)) == ["good"]


def test_done_is_done_for_these_sources_and_arguments_unless_it_is_named(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(**given: Any) -> bool:
        gpu.examine(options(tmp_path, **given), [part("good")])
        return "good: done before" not in capsys.readouterr().out

    assert runs()
    assert not runs()
    assert runs(only=["good"])
    monkeypatch.setattr(gpu, "sources_hash", lambda: "others")
    assert runs()
    assert not runs()
    monkeypatch.setattr(gpu, "arguments_of", lambda part, options: [*part.arguments, "--peer", "there"])
    assert runs()


def test_sources_are_what_a_result_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    seen = [gpu.sources_hash()]
    for name, text in (
        ("speedrun/model/a.py", "1"),
        ("speedrun/model/a.py", "2"),
        ("accelerate_configs/single.yaml", "2"),
        ("benchmarks/gpu/b.py", "2"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.append(gpu.sources_hash())
    (tmp_path / "README.md").write_text("words")
    assert len(set(seen)) == 5 and gpu.sources_hash() == seen[-1]


def test_ctrl_c_ends_what_runs_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from benchmarks.gpu import __main__ as gpu
from tests.benchmarks.parts import MACHINE, part
gpu.look_at = lambda options: (dict(MACHINE), True)
gpu.PARTS = [part("good"), part("hang")]
sys.argv = ["gpu", "--out", {str(tmp_path)!r}]
gpu.main()
"""
    command = [sys.executable, "-c", script]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=here, stdout=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        while not (tmp_path / "test-card" / ".hang.json").exists() and time.monotonic() - started < 60:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "This goes on:\n" in said and f"-m benchmarks.gpu --out {tmp_path}" in said
    assert [record["status"] for record in records(tmp_path).values()] == ["done", "interrupted"]


def test_nothing_made_on_a_cpu_goes_where_the_cards_tables_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "look_at", lambda options: (dict(MACHINE), False))
    gpu.examine(options(None), [])  # type: ignore[arg-type]
    assert not (tmp_path / "benchmarks").exists() and (tmp_path / "runs" / "gpu-tiny").is_dir()
    assert "/runs/" in (ROOT / ".gitignore").read_text().split()


def test_predicted_is_held_against_the_allocator(tmp_path: Path) -> None:
    lines = {
        "parameters": {"predicted": 600, "measured": 600, "remainder": 0},
        "activations": {"predicted": 900, "measured": 700, "remainder": -200, "why": "an estimate"},
    }
    allocator = {"peak": {"allocated": 1000, "allocated, in no category": 9}}
    ledger = {"ranks": [{"memory": {"peak": lines}, "allocator": allocator}]}
    result = Result(tmp_path / "result.json")
    add_books(result, "fsdp", ledger)
    (row,) = result.content["tables"]["Bytes at each moment"]
    assert (row["predicted"], row["measured"], row["allocated"]) == (1500, 1300, 1000)
    assert (row["too high by"], row["in no category"]) == ("50.0%", 9)
    (line,) = result.content["tables"]["Lines with a remainder"]
    assert (line["category"], line["remainder"], line["why"]) == ("activations", -200, "an estimate")


PEER = """
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert not config.bias and config.dropout == 0.0
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.embed(idx) @ self.embed.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
"""What nanoGPT's model.py offers, in a few lines of our own."""


def test_a_peers_model_is_timed_beside_ours(tmp_path: Path) -> None:
    from benchmarks.gpu import steps
    from benchmarks.gpu.sizes import config_of, with_tokens
    from benchmarks.train_step_loop import alone
    from speedrun.stages import resolve_stages
    from strategies.select import Launch

    (tmp_path / "model.py").write_text(PEER)
    config = with_tokens(config_of("gpt2", tiny=True), "pydocs", tiny=True)
    stages = [alone(config, stage, 8) for stage in resolve_stages(config, config.steps)]
    result = Result(tmp_path / "result.json")
    launch = Launch("single", 0, 0, 1, 1, "fp32", True)
    steps.peer(steps.Bench("gpt2", config, launch, stages, 1, 1, result), tmp_path, compiled=False)
    (row,) = result.content["tables"]["Steps"]
    assert row["way"] == "nanoGPT's model, eager" and row["rows × tokens"] == "2 × 32"
    assert row["ms"] > 0 and row["launches"] > 10 and row["device (ms)"] > 0
    (longest,) = (rows for title, rows in result.content["tables"].items() if "longest" in title)
    assert len(longest) == 10 and longest == sorted(longest, key=lambda row: -row["ms"])


def test_a_kernel_that_is_wrong_is_a_line_and_a_failure_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import kernels
    from benchmarks.kernels import Case

    def broken() -> list[Case]:
        raise NotImplementedError("no such card")

    def twice() -> list[Case]:
        return [Case("twice", lambda: torch.full((3,), 2.0), {"once": lambda: torch.ones(3)}, 1, 1)]

    file = tmp_path / "result.json"
    monkeypatch.setattr(kernels, "CASES", (broken, twice))
    monkeypatch.setattr(sys, "argv", ["kernels", str(file), "--tiny"])
    with pytest.raises(SystemExit, match="wrong or failed: broken, twice"):
        kernels.main()
    found = json.loads(file.read_text())
    assert found["notes"] == ["broken failed: NotImplementedError: no such card"]
    (row,) = found["tables"]["Kernels"]
    assert row["times faster than"] == "**wrong**: differs from once by 100.00%, so not timed"


@pytest.mark.parametrize("venv", (True, False))
def test_make_gpu_sets_nothing_up(tmp_path: Path, venv: bool) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    if venv:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").touch()
    command = ["make", "-n", "gpu", "PYTHON=python3.12", "ARGS=--minutes 4"]
    # A make that runs these tests hands its options down, and this one would then say which folder it is in.
    here = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    said = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=True).stdout.split()
    assert said == [".venv/bin/python" if venv else "python3.12", "-m", "benchmarks.gpu", "--minutes", "4"]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_to_its_end_on_a_cpu(tmp_path: Path, warm_python: str) -> None:
    """Every part at tiny sizes, as a person starts it."""
    command = [warm_python, "-m", "benchmarks.gpu", "--tiny", "--minutes", "14", "--out", str(tmp_path)]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=here, stdout=subprocess.PIPE, text=True) as process:
        try:
            said, _ = process.communicate()
        finally:
            process.terminate()  # on which it ends its parts
    (file,) = tmp_path.glob("no-card-*.json")
    state = json.loads(file.read_text())
    found = state["parts"]
    possible = [each for each in PARTS if all(find_spec(package) for package in each.packages)]
    for each in possible:
        assert found[each.name]["status"] == "done" or each.name == "doctor", found[each.name]["last lines"]
    whole = all(record["status"] == "done" and not record["result"]["missing"] for record in found.values())
    assert process.returncode == (0 if whole else 1), said

    text = file.with_suffix(".md").read_text()
    assert "**no card: tiny sizes, no figure here is a GPU's.**" in text.splitlines()
    assert "Not yet run." not in text
    tables = {name: record["result"]["tables"] for name, record in found.items()}
    assert [row["step"] for row in tables["run"]["Steps"]] == list(range(1, 13))
    assert {row["stage"] for row in tables["run"]["Steps"]} == {0, 1, 2, 3}
    books = tables["books"]["Bytes at each moment"]
    strategies = {"single", "ddp", "fsdp"} | ({"zero1", "zero2", "zero3"} if find_spec("deepspeed") else set())
    assert {row["run"] for row in books} == strategies and len(books) == 5 * len(strategies)
    for row in books:
        exact = row["moment"] != "peak" and (row["run"], row["moment"]) != ("ddp", "after prepare")
        assert not exact or row["predicted"] == row["measured"], row
    losses = [[row[f"step {i}"] for i in range(1, 6)] for row in tables["books"]["Training losses"]]
    assert len(losses) == len(strategies)
    assert all(run == pytest.approx(losses[0], rel=1e-2) for run in losses), "in bf16, which rounds here and there"
    (verdicts,) = tables["certificate"].values()
    assert {row["strategy"] for row in verdicts} == strategies and all(row["equal"] for row in verdicts)
    for preset, stages in (("gpt2", {0}), ("speedrun", {0, 1})):
        assert {row["stage"] for row in tables[f"steps-{preset}"]["Steps"]} == stages
    assert {row["function"] for row in tables["attention"]["Attention"]} == {"sdpa", "causal, no mask"}
