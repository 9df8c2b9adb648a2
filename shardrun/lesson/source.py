"""Reading lesson files as text: the functions of a Python file, the commands of a README. Nothing is imported."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from strategies.errors import UserError


def functions(path: Path) -> list[str]:
    """The names of a file's public functions, in order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def function_source(path: Path, name: str) -> str:
    """A function as it stands in a file, after the private functions that it calls.

    Raises ValueError where there is none of that name.
    """
    text = path.read_text(encoding="utf-8")
    found = {
        node.name: ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }
    if name not in found:
        raise UserError(f"{path} has no function {name!r}.")
    helpers = [other for other in found if other.startswith("_") and f"{other}(" in found[name]]
    return "\n\n\n".join(found[part] for part in (*helpers, name))


def parameters(path: Path, name: str) -> tuple[str, ...]:
    """The names of a function's parameters, in order; none where the file has no such function."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return tuple(each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
    return ()


def unwritten(path: Path) -> dict[str, int]:
    """Method → line, of those in a file's classes that only raise NotImplementedError; none where it is not Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return {}
    methods = [
        node
        for each in tree.body
        if isinstance(each, ast.ClassDef)
        for node in each.body
        if isinstance(node, ast.FunctionDef)
    ]
    return {m.name: m.lineno for m in methods if ast.unparse(m.body[-1]) == "raise NotImplementedError"}


def wrong_attempts(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Exercise → (function, what its message must say) for everything marked `@wrong_attempt(exercise, says=…)`."""
    found: dict[str, list[tuple[str, str]]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "wrong_attempt":
                arguments = [*mark.args, *(keyword.value for keyword in mark.keywords)]
                exercise, says = (ast.literal_eval(argument) for argument in arguments)
                found.setdefault(exercise, []).append((node.name, says))
    return found


def right_attempts(path: Path) -> dict[str, list[str]]:
    """Exercise → functions marked `@right_attempt(exercise)`; empty where there is no such file."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "right_attempt":
                found.setdefault(ast.literal_eval(mark.args[0]), []).append(node.name)
    return found


@dataclass(frozen=True)
class Command:
    """A line of a README's ```sh block; `gpu` where the block is marked ```sh gpu and needs GPUs."""

    text: str
    gpu: bool


def commands(readme: Path) -> list[Command]:
    """All commands of a README, in order; a line that ends with a backslash goes on."""
    found = []
    for label, block in re.findall(r"^```sh( gpu)?\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if text := line.partition("  #")[0].strip():
                found.append(Command(text, bool(label)))
    return found
