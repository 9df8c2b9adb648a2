"""Every command of README, CONTRIBUTING, lessons, benchmarks, docstrings and config files does what a reader may expect
before anything starts: launches pass the trainer's checks on 8 (fake) GPUs, verbs take their arguments.

The first rank and the last of every launch go through accelerate's own parser, the environment that it makes,
`select.launched` and `checks.check`, which is all that happens before a process group starts but for making weights.
FineWeb is stood in for by small shards, of which the validation shard has the size of the real one and no bytes.
"""

import argparse
import contextlib
import importlib
import io
from pathlib import Path

import numpy as np
import pytest

from shardrun.__main__ import VERBS
from shardrun.ablate.ideas import IDEAS
from shardrun.launch import find_config, shipped_config
from shardrun.lesson.course import course, find_lesson
from speedrun.data.shards import HEADER_BYTES, write_tokens
from speedrun.presets import PRESETS
from speedrun.run.command_line import parse
from tests.fake_cuda.process import FakeCUDAProcess
from tests.rehearsal import commands, dry
from tests.rehearsal.commands import ROOT, Command

COMMANDS = commands.documented()
LAUNCHES = [command for command in COMMANDS if "shardrun" not in command.words]
VERB_CALLS = [command for command in COMMANDS if "shardrun" in command.words]

FLAGSHIP = (
    "accelerate launch --config_file accelerate_configs/ddp.yaml -m speedrun.train speedrun --target-val-loss 3.28"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader types: the project, its lessons copied by `shardrun lesson start`, FineWeb fetched."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    (folder / "learning").mkdir()
    (folder / "learning/accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    for lesson in course():
        (folder / "learning" / lesson.name).symlink_to(lesson.folder)
    shards = folder / "data/fineweb10B"
    shards.mkdir(parents=True)
    tokens = np.full(100_000, 7, dtype=np.uint16)
    tokens[::500] = 50256
    write_tokens(shards / "fineweb_train_000001.bin", tokens)
    write_tokens(shards / "fineweb_val_000000.bin", tokens)
    with open(shards / "fineweb_val_000000.bin", "r+b") as file:
        file.seek(8)
        file.write(np.int32(100_000_000).tobytes())
        file.truncate(HEADER_BYTES + 2 * 100_000_000)  # a hole: it takes no room on the disk
    return folder


def test_commands_are_found_where_they_stand() -> None:
    found = {(command.file, " ".join(command.words)) for command in COMMANDS}
    assert ("README.md", FLAGSHIP) in found
    assert ("lessons/17_speedrun/README.md", FLAGSHIP.replace(" acc", " learning/acc")) in found
    assert ("README.md", "shardrun plan speedrun --world 8 --gpu h100") in found
    assert ("strategies/README.md", "shardrun certify --config cpu/ddp") in found
    assert {"README.md", "speedrun/README.md", "tests/README.md", "benchmarks/README.md"} <= {c.file for c in COMMANDS}
    assert ("shardrun/ablate/__init__.py", "shardrun ablate --suite schedules --seeds 3") in found
    # each config file has its own, and each lesson starts with one
    assert len({c.file for c in LAUNCHES if c.file.startswith("accelerate_configs/")}) == len(
        list((ROOT / "accelerate_configs").rglob("*.yaml"))
    )
    assert {f"lessons/{lesson.name}/README.md" for lesson in course()} <= {c.file for c in COMMANDS}


def test_a_command_over_two_lines_with_a_prompt_a_variable_and_a_comment(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(
        "shardrun plan\n```sh\n$ accelerate launch --config_file a.yaml \\\n"
        "    -m speedrun.train tiny --steps ${STEPS:-60}   # it's quick\n```\nThen `shardrun lesson\ncheck N`, or so.\n"
    )
    words = "accelerate launch --config_file a.yaml -m speedrun.train tiny --steps 60"
    assert commands.commands_of(file) == [
        Command("README.md", 3, tuple(words.split()), False),
        Command("README.md", 6, ("shardrun", "lesson", "check", "1"), True),
    ]


@pytest.mark.parametrize("command", LAUNCHES, ids=str)
def test_a_launch_passes_all_checks_before_a_process_group(
    command: Command, folder: Path, gpus: FakeCUDAProcess
) -> None:
    said = gpus.run(dry.dry_run, command.words, str(folder), str((ROOT / command.file).parent))
    if " ".join(command.words) == FLAGSHIP:
        cuts = "speedrun: 16 rows in micro-batches of 16, 32 rows in micro-batches of 32, "
        cuts += "24 rows in micro-batches of 12, 24 rows in micro-batches of 12"
        assert said == [f"rank {rank} of 8: ddp, bf16; {cuts}" for rank in (0, 7)]


@pytest.mark.parametrize("command", VERB_CALLS, ids=str)
def test_a_verb_takes_its_arguments_and_knows_what_they_name(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    verb, *arguments = command.words[command.words.index("shardrun") + 1 :] or ["explain"]
    assert verb in VERBS, f"there is no verb {verb}"
    parser = argparse.ArgumentParser(prog=f"shardrun {verb}")
    importlib.import_module(f"shardrun.{verb}").add_arguments(parser)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = vars(parser.parse_args(arguments))
    except SystemExit:
        assert command.mentioned and "the following arguments are required" in printed.getvalue(), printed.getvalue()
        return
    for name in ("config", "a", "b"):
        for config in [parsed[name]] if isinstance(parsed.get(name), str) else parsed.get(name) or []:
            find_config(config)
    if parsed.get("preset"):
        assert parsed["preset"] in PRESETS
    if verb == "compare":
        for strategy in parsed["strategies"].split(","):
            shipped_config(f"{parsed['configs']}/{strategy}")
    for ideas in (parsed.get("drop"), parsed.get("add")):
        assert set((ideas or "").split(",")) - {""} <= set(IDEAS)
    if parsed.get("number"):
        lesson = find_lesson(parsed["number"])
        names = {exercise.name for exercise in lesson.exercises}
        if lesson.capstone:
            names.add(Path(lesson.capstone.file).stem)
        assert not parsed.get("exercise") or parsed["exercise"] in names
    if parsed.get("trainer"):
        parse([parsed["preset"], *parsed["trainer"]])
