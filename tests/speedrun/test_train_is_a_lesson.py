"""speedrun/train.py stays what a learner can read from top to bottom in one go."""

import ast
import re
from pathlib import Path

import pytest

from tests.speedrun.runs import STRATEGIES

SOURCE = (Path(__file__).parents[2] / "speedrun/train.py").read_text(encoding="utf-8")
LINES, LOOP_LINES, ARGUMENTS = 220, 20, 6
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def faults(source: str) -> list[str]:
    """What makes it hard to read, a sentence each."""
    tree = ast.parse(source)
    found = [f"{count} lines"] if (count := len(source.splitlines())) > LINES else []
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and any(isinstance(n, FUNCTIONS) for n in ast.walk(node) if n is not node):
            found.append(f"a function in the one of line {node.lineno}")
        if isinstance(node, ast.ClassDef):
            found.append(f"a class in line {node.lineno}")
        if isinstance(node, ast.Call):
            if len(node.args) + len(node.keywords) > ARGUMENTS:
                found.append(f"a call with more than {ARGUMENTS} arguments in line {node.lineno}")
            if any(isinstance(a, ast.Starred) and isinstance(a.value, ast.Tuple) for a in node.args):
                found.append(f"a call whose arguments are in a tuple in line {node.lineno}")
    loops = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "loop"]
    if [(node.end_lineno or 0) - node.lineno < LOOP_LINES for node in loops] != [True]:
        found.append(f"no loop of at most {LOOP_LINES} lines")
    names = "|".join(("single", *STRATEGIES, "deepspeed"))
    code = source.replace(ast.get_docstring(tree, clean=False) or "", "")  # where a launch names a config file
    found += [f"the strategy {name}" for name in re.findall(rf"\b(?:{names})\b", code, re.IGNORECASE)]
    return found


def test_it_reads_as_a_lesson() -> None:
    assert faults(SOURCE) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("\n" * LINES, "lines"),
        ("\nf = lambda: lambda: 0\n", "a function in the one of line"),
        ("\nf(1, 2, 3, 4, 5, 6, a=7)\n", "a call with more than 6 arguments"),
        ("\nf(*(1, 2), *(3, 4))\n", "a call whose arguments are in a tuple"),
        ("\ndef loop():\n" + "    pass\n" * LOOP_LINES, "no loop of at most 20 lines"),
        ('\nif launch.strategy == "zero3": pass\n', "the strategy zero3"),
        ("\n# not under DDP\n", "the strategy DDP"),
    ],
)
def test_what_would_spoil_it_is_seen(change: str, fault: str) -> None:
    assert any(fault in found for found in faults(SOURCE + change))
