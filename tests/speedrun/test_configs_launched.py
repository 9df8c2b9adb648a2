"""A sample of the config files as people have them, launched; `python -m benchmarks.configs_launched` has them all."""

from pathlib import Path

import pytest

from benchmarks.configs_launched import compare
from tests.configs import entries

SAMPLE = ("fsdp2-activation-checkpointing", "found-json-clipping-as-text", "found-json-misspelt", "found-json-batch")


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_launch_makes_of_a_file_what_explain_says(tmp_path: Path, warm_python: str, name: str) -> None:
    (entry,) = (entry for entry in entries() if entry.id == name)
    outcome = compare(entry, tmp_path, warm_python)
    assert outcome.right, (outcome.explained, outcome.launched)
