"""Whatever is written or printed as JSON, every reader takes: it has no NaN and no Infinity."""

import ast
import json
from pathlib import Path

import pytest

from strategies import strict_json

ROOT = Path(__file__).parents[1]
TOPS = ("lessons", "benchmarks", "shardrun", "speedrun", "strategies")


def writers(source: str) -> list[int]:
    """Lines that use Python's own json.dump or json.dumps, under whatever name they were imported."""
    tree = ast.parse(source)
    names = {"json"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "json" and alias.asname
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            found += [node.lineno] if node.attr in ("dump", "dumps", "JSONEncoder") else []
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            found += (
                [node.lineno] if {alias.name for alias in node.names} - {"loads", "load", "JSONDecodeError"} else []
            )
    return found


def test_all_json_is_written_in_one_place() -> None:
    own = ROOT / "strategies/strict_json.py"
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for top in TOPS
        for path in sorted((ROOT / top).rglob("*.py"))
        if path != own
        for line in writers(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"use strategies.strict_json.dumps: {found}"
    assert writers(own.read_text(encoding="utf-8"))  # the search does find


@pytest.mark.parametrize("source", ("import json as j\nj.dumps(1)", "from json import dumps", "import json\njson.dump"))
def test_another_writer_is_seen(source: str) -> None:
    assert writers(source)


def test_what_is_not_finite_is_null_wherever_it_stands() -> None:
    nan, inf = float("nan"), float("inf")
    content = {"a": nan, "b": [1.5, inf, {"c": (-inf, "NaN", True, None)}]}

    def refused(name: str) -> None:
        raise AssertionError(name)

    text = strict_json.dumps(content, indent=2)
    assert json.loads(text, parse_constant=refused) == {"a": None, "b": [1.5, None, {"c": [None, "NaN", True, None]}]}
    assert strict_json.dumps({"x": Path("a")}, default=str) == '{"x": "a"}'


def test_letters_of_a_path_in_a_c_locale_are_whole_again() -> None:
    bytewise = "läufe".encode().decode("ascii", "surrogateescape")
    text = strict_json.dumps({bytewise: [bytewise, "漢"]})
    assert json.loads(text) == {"läufe": ["läufe", "漢"]}
    assert json.loads(strict_json.dumps("half \ud800")) == "half ?"
