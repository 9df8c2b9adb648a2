"""`shardrun certify` through accelerate launch, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def shardrun(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardrun", *arguments], capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.ranks
@pytest.mark.slow
def test_a_config_of_ones_own_is_certified(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("distributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: bf16\nnum_processes: 2\n")
    result = shardrun("certify", "--config", str(config), "--steps", "4", "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    assert "8 of 8 equal the single-process run." in result.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert len(rows) == 8 and all(row["equal"] and row["world_size"] == 2 for row in rows)


def test_an_unknown_config_is_refused_with_the_names_there_are() -> None:
    result = shardrun("certify", "--config", "cpu/zero4")
    assert result.returncode == 2
    assert "there is no accelerate config 'cpu/zero4'" in result.stderr and "cpu/zero3" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_the_verbs() -> None:
    result = shardrun("--help")
    assert result.returncode == 0 and "certify" in result.stdout and "compare" in result.stdout
