"""The catalogue is the only list of strategies: one more is a folder and a line in it, and gets everything."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from strategies import catalogue

ROOT = Path(__file__).parents[2]
MIRROR = """
distributed_type: MULTI_GPU
main_training_function: mirror
use_cpu: true
gpu_ids: '-1,-1'
mixed_precision: 'no'
num_processes: 2
main_process_port: 0
"""


def test_strategies_are_named_in_the_catalogue_and_their_folders_only() -> None:
    folders = {Path(folder.replace(".", "/")) for folder in catalogue.FOLDERS.values()}
    named = re.compile('"(' + "|".join(name for name in catalogue.names() if name != "single") + ')"')
    found = [
        path
        for top in ("speedrun", "shardrun", "strategies")
        for path in (ROOT / top).rglob("*.py")
        if named.search(path.read_text()) and not folders & set(path.relative_to(ROOT).parents)
    ]
    assert [str(path.relative_to(ROOT)) for path in found] == ["strategies/catalogue.py"]


def test_every_strategy_has_words_for_all_that_a_rank_keeps() -> None:
    keys = {"parameters", "master parameters", "gradients", "waiting", "optimizer states", "activations", "buffers"}
    for name in catalogue.names():
        assert set(catalogue.books(name).words) == keys, name


def test_an_unknown_name_is_said_once_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"there is no strategy 'zero4'; there are single, ddp, "):
        catalogue.books("zero4")


@pytest.fixture(scope="module")
def with_mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of `strategies` that has one more, and its config."""
    folder = tmp_path_factory.mktemp("with_mirror")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "strategies", folder / "strategies", ignore=ignored)
    shutil.copytree(ROOT / "tests/strategies/mirror", folder / "strategies/mirror", ignore=ignored)
    listed = folder / "strategies/catalogue.py"
    line = '    "mirror": "strategies.mirror",\n'
    listed.write_text(listed.read_text().replace('    "zero1"', f'{line}    "zero1"', 1))
    (folder / "mirror.yaml").write_text(MIRROR)
    return folder


PREDICT = """
import json
from speedrun.books.shapes import scenario_of
from speedrun.presets import PRESETS
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic

scenario, sent = scenario_of(PRESETS["tiny"][1], "mirror", 4, "bf16"), {}
for entry in predict_traffic(scenario):
    name = entry.collective + (" (bookkeeping)" if entry.purpose == "bookkeeping" else "")
    calls, payload = sent.get(name, (0, 0))
    sent[name] = calls + entry.calls, payload + entry.payload_bytes
print(json.dumps({"held": predict_memory(scenario)[0], "sent": sent}))
"""
"""Of rank 0 of 4, what the books say."""


def python(folder: Path, *arguments: str) -> str:
    """What Python prints there."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def say(folder: Path, *arguments: str) -> str:
    """What a verb prints there."""
    return python(folder, "-m", "shardrun", *arguments)


def test_one_more_is_planned(with_mirror: Path) -> None:
    estimates = json.loads(say(with_mirror, "plan", "tiny", "--world", "4", "--json"))["estimates"]
    assert "mirror" in [estimate["strategy"] for estimate in estimates]


@pytest.mark.slow
def test_one_more_is_simulated_as_its_books_say(with_mirror: Path) -> None:
    """To the byte: what a rank holds between the passes, and what it sends."""
    arguments = ["plan", "tiny", "--world", "4", "--simulate", "--strategies", "mirror", "--json"]
    (found,) = json.loads(say(with_mirror, *arguments))["strategies"]
    predicted = json.loads(python(with_mirror, "-c", PREDICT))
    for moment, categories in predicted["held"].items():
        for category, expected in categories.items():
            assert found["moments"][moment].get(category, 0) == expected, (moment, category)
    assert {c["collective"]: [c["calls"], c["payload_bytes"]] for c in found["collectives"]} == predicted["sent"]


@pytest.mark.ranks
@pytest.mark.slow
def test_one_more_gets_its_certificate_and_an_explanation(with_mirror: Path) -> None:
    assert "the strategy: mirror" in say(with_mirror, "explain", "mirror.yaml")
    assert "mirror" in say(with_mirror, "certify", "--config", "mirror.yaml", "--steps", "2")
