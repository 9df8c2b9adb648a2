"""A plan that one can act on: near its simulation, as wide as the terminal, in JSON; what fits and what it costs."""

import argparse
import contextlib
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_simulated, plan_times
from shardrun import compare, plan, prices
from shardrun.plan import fit, show
from shardrun.plan.estimates import OTHER, configure, fullest, kernels_for, planned
from shardrun.plan.simulation import simulate_one
from speedrun.books.shapes import scenario_of
from speedrun.presets import PRESETS
from strategies import catalogue
from strategies.ledger.hardware import LESS, MORE, UTILISATION, find_gpu
from strategies.ledger.terms import CATEGORIES
from tests.shardrun.test_plan import shardrun

ROOT = Path(__file__).parents[2]
RESULTS: dict[str, Any] = json.loads((ROOT / plan_simulated.RESULTS).read_text())
TINY = ("--layers", "2", "--width", "128", "--heads", "1", "--vocab", "600", "--seq", "128", "--optimizer", "adamw")


def test_plan_is_within_three_percent_of_every_committed_simulation() -> None:
    assert set(RESULTS) == {case.key for case in plan_simulated.cases()}
    for case in plan_simulated.cases():
        tensors, allocated = plan_simulated.off(case, RESULTS)
        assert abs(tensors) <= plan_simulated.WITHIN, case.key
        assert -MORE <= allocated <= LESS, case.key


@pytest.mark.parametrize("name", catalogue.spread(4))
def test_plan_is_within_three_percent_of_a_simulation(name: str) -> None:
    """Gradient checkpointing and accumulation, where gradients come while activations go: the furthest from a sum."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("triton")
    arguments = ask(*TINY, "--world", "4", "--accumulation", "4", "--checkpointing", "block")
    config = configure(arguments)
    stages = planned(config, arguments, 4, kernels_for(config, find_gpu("h100"), arguments))
    stage, _, memory = fullest(stages, name, 4, "bf16")
    replay = simulate_one(stage, name, 0, 4, "bf16").replay
    assert replay is not None
    tensors = sum(size for category, size in memory.items() if category not in OTHER)
    assert tensors == pytest.approx(replay.peak_total, rel=0.03)


def ask(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args(words)


COMMANDS = [
    ("plan", "--params", "20B", "--world", "64", "--accumulation", "8", "--why"),
    ("plan", "speedrun"),
    ("plan", "gpt2", "--sweep"),
    ("plan", *TINY, "--fit", "--world", "2"),
    ("diff", "ddp", "zero3_offload", "--params", "20B", "--why"),
    ("diff", "cpu/single", "cpu/single_bf16"),
    *(("explain", name) for name in ("zero3_offload", "fsdp", "cpu/zero1", "ddp")),
]


def test_every_line_fits_a_terminal_of_80_columns() -> None:
    """In a pseudo-terminal; and no word is broken: there are the same ones as in a wide one."""
    narrow, wide = (in_terminal(columns) for columns in (80, 200))
    for command, one, other in zip(COMMANDS, narrow, wide, strict=True):
        assert one.strip() and max(map(len, one.splitlines())) <= 80, command
        assert words(one) == words(other), command


def words(text: str) -> set[str]:
    return {word for word in text.split() if set(word) - set("─\\")}


def in_terminal(columns: int) -> list[str]:
    """What the commands print in a terminal so wide."""
    code = (
        "import contextlib, sys\nfrom shardrun.__main__ import main\n"
        f"for command in {COMMANDS!r}:\n"
        "    with contextlib.suppress(SystemExit): main(list(command))\n"
        "    print('\\f')"
    )
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    read = b""
    try:
        while part := os.read(ours, 65536):
            read += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=100) == 0
    os.close(ours)
    return read.decode().replace("\r\n", "\n").split("\f\n")[: len(COMMANDS)]


def test_advice_comes_first_and_notes_only_when_asked_for() -> None:
    out = shardrun("plan", "gpt2")[1]
    assert out.startswith("Advice: fsdp fits with ") and "DeepSpeed all-reduces" not in out
    explained = shardrun("plan", "gpt2", "--why")[1]
    assert "DeepSpeed all-reduces" in explained and "NVIDIA/nccl issue 1685" in explained


def test_where_zero1_and_zero2_are_equal_it_says_why_and_shows_where_they_are_not() -> None:
    rows = {e["strategy"]: e for e in json.loads(shardrun("plan", "gpt2", "--json")[1])["estimates"]}
    one, two = rows["zero1"], rows["zero2"]
    assert one["total"] == two["total"] and one["moments"]["first block"] > two["moments"]["first block"]
    said = " ".join(shardrun("plan", "gpt2")[1].split())
    assert (
        "zero1 and zero2 are equal at their peak: no gradient" in said and "at the moment “first block” zero1" in said
    )
    # With accumulation they differ at the peak, and nothing is to be explained.
    assert "zero1 and zero2 are equal" not in shardrun("plan", "gpt2", "--accumulation", "4")[1]


def test_explain_shows_what_the_engine_makes_of_its_defaults(tmp_path: Path) -> None:
    for name, keys in {
        "zero2": ("reduce_bucket_size", "reduce_scatter", "overlap_comm", "contiguous_gradients"),
        "zero3": ("stage3_max_live_parameters", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"),
        "fsdp": ("reshard_after_forward", "wrap", "reduce_dtype"),
        "ddp": ("bucket_cap_mb", "gradient_as_bucket_view"),
    }.items():
        found = {each["key"]: each for each in json.loads(shardrun("explain", name, "--json")[1])["settings"]}
        assert set(keys) <= set(found), name
        assert all(key in shardrun("explain", name)[1] for key in keys)
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000}, "bf16": {"enabled": true}}'
    )
    config = tmp_path / "mine.yaml"
    keys_of = f"deepspeed_config: {{deepspeed_config_file: {tmp_path / 'ds.json'}}}"
    config.write_text(f"distributed_type: DEEPSPEED\nnum_processes: 2\n{keys_of}\n")
    found = {each["key"]: each for each in json.loads(shardrun("explain", str(config), "--json")[1])["settings"]}
    assert found["reduce_bucket_size"]["value"] == "1,000,000" and found["reduce_bucket_size"]["said"]
    assert "1.9 MiB" in found["reduce_bucket_size"]["effect"] and not found["overlap_comm"]["said"]


SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "answers.schema.json").read_text())
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
TYPES |= {"boolean": bool, "null": type(None)}


def problems(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """What of the value is not as the schema says; of JSON Schema what ours uses."""
    if "$ref" in schema:
        return problems(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fitting = [kind for kind in kinds if isinstance(value, TYPES[kind])]
    if kinds and not fitting or isinstance(value, bool) and fitting not in ([], ["boolean"]):
        return [f"{where} is no {kinds}"]
    found = []
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}")
    if isinstance(value, dict):
        found += [f"{where}.{key} is missing" for key in schema.get("required", ()) if key not in value]
        of_keys = schema.get("properties", {})
        for key, inner in value.items():
            found += problems(inner, of_keys.get(key, schema.get("additionalProperties", {})), f"{where}.{key}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{where} has {len(value)} items")
        for i, inner in enumerate(value):
            found += problems(inner, schema.get("items", {}), f"{where}[{i}]")
    ways = [problems(value, way, where) for way in schema.get("anyOf", ())]
    return found + (min(ways, key=len) if ways and all(ways) else [])


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "gpt2", "--price", "210INR"),
        ("plan", "speedrun", "--sweep"),
        ("plan", *TINY, "--world", "2", "--fit", "--gpu", "40"),
        (
            "diff",
            "ddp",
            "zero2",
            "--params",
            "350M",
            "--optimizer",
            "adamw",
            "--checkpointing",
            "block",
            "--seq",
            "512",
        ),
        ("explain", "zero3"),
        ("plan", *TINY, "--world", "2", "--strategies", "fsdp,ddp", "--simulate"),
    ],
)
def test_json_is_as_the_schema_says(command: tuple[str, ...]) -> None:
    if "--simulate" in command:
        pytest.importorskip("triton")
    status, out, err = shardrun(*command, "--json")
    assert status == 0 and not err
    answer = json.loads(out)
    assert problems(answer, SCHEMA) == []
    answer.pop("advice")
    assert problems(answer, SCHEMA) == [".advice is missing"]


def test_the_court_s_json_is_all_that_it_prints() -> None:
    """In a process of its own: DeepSpeed, whose estimator is asked, prints a line where it is not told to be quiet."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DS_", "DEEPSPEED_"))}
    command = [sys.executable, "-m", "shardrun", "plan", *TINY, "--world", "2", "--court", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and problems(answer, SCHEMA) == []
    assert {"Shardrun", "accelerate", "ZeRO paper"} <= {each["who"] for each in answer["testimonies"]}
    answer["testimonies"][0]["bytes"]["ddp"] = "much"
    assert problems(answer, SCHEMA)


def test_a_simulation_that_the_schema_would_not_take_is_seen() -> None:
    row = {
        "strategy": "ddp",
        "stage": "data",
        "micro_batch": 8,
        "accumulation": 1,
        "sequence_length": 8,
        "seconds": 1.5,
    }
    assert problems({**row, "refused": "no"}, SCHEMA["$defs"]["simulated"]) == []
    assert problems(row, SCHEMA["$defs"]["simulated"])


def test_compare_fits_the_terminal_and_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs as large as one of 7B; that they are read rightly is another test's (tests/speedrun/test_offload.py)."""
    entry = {"predicted": 26_594_000_896, "measured": 26_594_000_896, "remainder": 0}
    sent = {
        "collective": "reduce_scatter",
        "purpose": "payload",
        "axis": "replicate",
        "calls": 12345,
        "ring_bytes": 1.5,
    }
    (tmp_path / "hsdp").mkdir()
    run = compare.ComparedRun(
        strategy="hsdp", folder=tmp_path / "hsdp", losses=[1.0], val_loss=10.8258, step_ms=19_844.0,
        memory=dict.fromkeys(CATEGORIES, entry), host={"optimizer states": entry}, activations=entry, peak=entry,
        predicted_for={"device": "GPU of compute capability 9.0", "torch": "2.13"},
        traffic=[{**sent, **entry, "ring_bytes": 1.5}], remainders=[],
    )  # fmt: skip
    arguments = argparse.Namespace(
        processes=8, preset="gpt2", config=PRESETS["gpt2"][1], steps=30, configs="cpu", trainer=[]
    )
    assert problems(json.loads(compare._write([run], arguments)), SCHEMA) == []
    printed = {}
    for columns in ("80", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            compare._print_books([run, run], 8, why=True)
        printed[columns] = out.getvalue()
        assert max(map(len, printed[columns].splitlines())) <= int(columns)
    assert words(printed["80"]) == words(printed["100"])


def test_plan_and_diff_take_the_same_model_and_mean_the_same_run() -> None:
    words = ("--params", "350M", "--optimizer", "adamw", "--checkpointing", "block", "--seq", "512", "--gpu", "a100")
    for options in ((), words):
        planned_of = json.loads(shardrun("plan", *options, "--json")[1])
        sides = json.loads(shardrun("diff", "ddp", "zero3", *options, "--json")[1])
        rows = {e["strategy"]: e for e in planned_of["estimates"]}
        for side in sides["sides"]:
            assert side["memory"] == rows[side["strategy"]]["memory"]
        assert sides["inputs"]["config"] == planned_of["inputs"]["config"]
        assert sides["inputs"]["gpu"] == planned_of["inputs"]["gpu"]


def test_20b_on_64_ranks_at_accumulation_8_is_refused_under_fsdp() -> None:
    asked = ("plan", "--params", "20B", "--world", "64", "--accumulation", "8", "--json")
    for options in ((), ("--checkpointing", "block"), ("--optimizer", "adamw", "--checkpointing", "block")):
        rows = {e["strategy"]: e for e in json.loads(shardrun(*asked, *options)[1])["estimates"]}
        assert not rows["fsdp"]["fits"] and rows["zero3"]["fits"]


def test_the_largest_micro_batch_is_the_largest_that_a_simulation_holds() -> None:
    """One row more and it does not fit, by the engine's own code; and so by the plan."""
    pytest.importorskip("triton")
    words = (*TINY, "--world", "2", "--gpu", "2", "--checkpointing", "none", "--strategies", "fsdp", "--fit")
    answer = json.loads(shardrun("plan", *words, "--simulate", "--json")[1])
    found = answer["fits"][0]
    rows = found["micro_batch"]
    assert f"{rows} rows fit, {rows + 1} rows do not fit" in found["checked"]
    planned_rows = json.loads(shardrun("plan", *words, "--json")[1])["fits"][0]["micro_batch"]
    assert abs(planned_rows / rows - 1) <= 0.03
    arguments = ask(*words)
    config = configure(arguments)
    search = fit.Search(config, find_gpu("2"), arguments, kernels_for(config, find_gpu("2"), arguments), 2)
    assert fit.holds(search, "fsdp", rows) and not fit.holds(search, "fsdp", rows + 1)


def test_a_preset_s_micro_batch_is_one_that_the_trainer_takes() -> None:
    """A divisor of a rank's rows; the largest of those that fit."""
    answer = json.loads(shardrun("plan", "gpt2", "--world", "2", "--gpu", "24", "--fit", "--json")[1])
    for found in answer["fits"]:
        if found["world_size"] == 2 and found["micro_batch"]:
            assert found["micro_batch"] * found["accumulation"] == 128
            options = ("--gpu", "24", "--checkpointing", found["checkpointing"], "--json", "--world", "2")
            rows = found["micro_batch"]
            for more in (rows, 2 * rows):
                out = shardrun("plan", "gpt2", "--micro-batch", str(more), *options)[1]
                e = next(e for e in json.loads(out)["estimates"] if e["strategy"] == found["strategy"])
                assert e["fits"] == (e["micro_batch"] == rows)


def test_hours_and_money_to_the_preset_s_steps_or_a_budget_of_tokens() -> None:
    answer = json.loads(shardrun("plan", "gpt2", "--price", "2.49", "--json")[1])
    for e in answer["estimates"]:
        training = e["training"]
        assert training["tokens"] == 19_560 * 256 * 1024 and training["currency"] == "USD"
        assert training["hours"]["expected"] == pytest.approx(19_560 * e["step_s"] / 3600)
        for bound in ("expected", "least", "most"):
            assert training["money"][bound] == pytest.approx(training["hours"][bound] * 8 * 2.49)
        assert training["hours"]["least"] < training["hours"]["expected"] < training["hours"]["most"]
    longer = json.loads(shardrun("plan", "gpt2", "--tokens", "100B", "--price", "210INR", "--json")[1])["estimates"][0]
    assert longer["training"]["tokens"] == pytest.approx(100e9, rel=1e-5) and longer["training"]["currency"] == "INR"
    # A run of stages takes as long as its stages.
    staged = json.loads(shardrun("plan", "speedrun", "--json")[1])["estimates"][0]
    assert staged["training"]["hours"]["expected"] < PRESETS["speedrun"][1].steps * staged["step_s"] / 3600 * 2


def test_a_price_says_where_it_is_from() -> None:
    assert f"read on {prices.READ}" in shardrun("plan", "gpt2")[1]
    assert "the table has none for this GPU" in shardrun("plan", "gpt2", "--gpu", "40")[1]
    assert prices.parse_price("2.49usd").currency == "USD" and prices.parse_price("210 INR").amount == 210
    for text in ("free", "-1", "0", "2.49DOLLARS", "INR"):
        status, _, err = shardrun("plan", "gpt2", "--price", text)
        assert status == 2 and "is no price of a GPU for an hour; write for example 2.49" in err
    assert "--tokens 'many' is no number of tokens" in shardrun("plan", "gpt2", "--tokens", "many")[2]


def test_times_have_the_margin_of_the_measured_rows() -> None:
    for kind, found in plan_times.utilisations().items():
        used = UTILISATION[kind]
        assert (used.least, used.typical, used.most) == pytest.approx(found, abs=5e-4), kind
    assert (ROOT / plan_times.TABLE).read_text() == plan_times.render()
    e = json.loads(shardrun("plan", "speedrun", "--world", "1", "--json")[1])["estimates"][0]
    low, high = e["step_range_s"]
    assert low < e["step_s"] < high


def test_a_checkpoint_is_as_large_as_one_that_was_saved() -> None:
    """benchmarks/checkpoint.md: gpt2 takes 1.49 GB."""
    assert "1.49 GB a checkpoint" in (ROOT / "benchmarks" / "checkpoint.md").read_text()
    books = scenario_of(PRESETS["gpt2"][1], "ddp", 2, "bf16")
    assert show.checkpoint_bytes(books) == pytest.approx(1.49e9, rel=0.005)
    assert "Checkpoint: 1.39 GiB" in shardrun("plan", "gpt2")[1]
