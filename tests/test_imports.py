"""Imports run one way, between folders and between files, and a public name that others import exists once."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("lessons", "benchmarks", "shardrun", "speedrun", "strategies")
"""Each imports those after it only; lessons and benchmarks nothing of one another."""
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in TOPS
    for path in sorted((ROOT / top).rglob("*.py"))
}
"""Dotted name of a module → its file."""


def imported(module: str) -> Iterator[tuple[str, str]]:
    """(module of ours, name or "") of every import in a file, wherever it stands: in functions and for types too."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in FILES)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in FILES:
                    yield inner, ""
                elif node.module in FILES:
                    yield node.module, alias.name


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one that reach one another (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_five_rooms_import_downwards_only() -> None:
    order = {"lessons": 0, "benchmarks": 0, "shardrun": 1, "speedrun": 2, "strategies": 3}
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other, _ in imported(module)
        if (top := module.split(".")[0]) != (below := other.split(".")[0]) and order[top] >= order[below]
    ]
    assert not wrong


def test_no_circle_between_files() -> None:
    """A package's __init__ counts as a file of its own: its parts may not import it back."""
    graph = {module: {other for other, _ in imported(module)} - {module} for module in FILES}
    assert circles(graph) == []


@pytest.mark.parametrize("top", ("shardrun", "speedrun", "strategies"))
def test_no_circle_between_rooms(top: str) -> None:
    """A room: a folder, or a file that lies beside them."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module in FILES:
        parts = module.split(".")
        if parts[0] == top and len(parts) > 1:
            for other, _ in imported(module):
                there = other.split(".")
                if there[0] == top and len(there) > 1 and there[1] != parts[1]:
                    graph[parts[1]].add(there[1])
    assert circles(graph) == []


def test_the_parts_of_the_trainer_know_no_strategy() -> None:
    parts = ("speedrun.model", "speedrun.optim", "speedrun.kernels", "speedrun.data")
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other, _ in imported(module)
        if module.startswith(parts)
        and other.startswith("strategies")
        and other not in ("strategies.errors", "strategies.strict_json")
    ]
    assert not wrong


def test_a_name_that_others_import_means_one_thing() -> None:
    """A class that is imported somewhere exists once; a function that several files define is imported from one."""
    defined: dict[str, set[str]] = defaultdict(set)
    classes = set()
    for module, path in FILES.items():
        if module.startswith(("shardrun", "speedrun", "strategies")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    defined[node.name].add(module)
                    classes |= {node.name} if isinstance(node, ast.ClassDef) else set()
    sources: dict[str, set[str]] = defaultdict(set)
    for module in FILES:
        for source, name in imported(module):
            if source in defined[name]:
                sources[name].add(source)
    found = {name: modules for name, modules in defined.items() if len(modules) > 1}
    assert {name: found[name] for name in found if len(sources[name]) > (0 if name in classes else 1)} == {}


def test_files_and_rooms_stay_small() -> None:
    """400 lines a file outside of lessons, tests too; fourteen rooms in the trainer."""
    tops = ("benchmarks", "shardrun", "speedrun", "strategies", "tests")
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for top in tops for path in (ROOT / top).rglob("*.py")
    }
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > 400} == {}
    rooms = {module.split(".")[1] for module in FILES if module.startswith("speedrun.")}
    assert len(rooms) <= 14, sorted(rooms)
