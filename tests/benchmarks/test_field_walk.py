"""The walk over all fields of the configuration: a sample of what benchmarks/field_walk.md has whole."""

from collections import Counter
from pathlib import Path

from benchmarks.field_walk import FIELDS, walk


def test_no_value_of_any_field_ends_in_a_traceback() -> None:
    tally, failed = walk(100, first=14)
    assert not failed
    ends = sum(tally.values(), Counter[str]())
    assert ends.total() >= 100 and ends["refused"] > 20 and ends["trained"] > 20


def test_the_table_is_of_all_fields() -> None:
    table = (Path(__file__).parents[2] / "benchmarks" / "field_walk.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["field", *(field.name for field in FIELDS)]
    assert "in none of these ways: 0." in table
