"""Mutants of a solution: the solution with one operator, constant, slice or statement changed, at every site of it.

A check that lets one pass either lacks a case, or the mutant is an equal solution: the lesson's mutants.toml says why.
"""

import ast
import copy
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "sub_": "add_", "add_": "sub_", "sorted": "list",
    "tril": "triu", "cos": "sin", "sin": "cos", "mean": "sum", "median": "mean", "stdev": "pstdev", "fmean": "median",
    "round": "int", "floor": "ceil", "isend": "send", "irecv": "recv",
}  # fmt: skip
"""Functions and methods that stand for others."""
OF_RANKS = {"get_world_size": (3, 2), "get_rank": (0,)}
"""What somebody may have written in the place of these calls, who thinks of the ranks that run here."""


Path_ = tuple[tuple[str, int | None], ...]
"""From a statement to a node in it: field and place in a list, step by step."""


@dataclass(frozen=True)
class Mutant:
    """change: what was written → what stands there now, by its line; text: the whole file with it.

    site: a number for the place that is changed; several mutants may have one site.
    """

    line: int
    change: str
    text: str
    site: int


def mutants(solution: Path, exercise: str) -> list[Mutant]:
    """All mutants of an exercise's function, and of the private functions and classes of its file that it uses."""
    source = solution.read_text(encoding="utf-8")
    tree = ast.parse(source)
    found, seen = [], set()
    sites = ((part, path, node) for part in _used(tree, exercise) for path, node in _nodes(part))
    for site, (part, path, node) in enumerate(sites):
        for new in _changes(node):
            text = _with(tree, part, path, new)
            if text in seen or text is None:
                continue
            seen.add(text)
            found.append(Mutant(getattr(node, "lineno", part.lineno), _change(part, path, node, new), text, site))
    return found


def chosen(all_of_them: list[Mutant], most: int = 30) -> list[Mutant]:
    """One of every site; where that is fewer than `most`, a second of every site, a third, up to `most`. In order."""
    by_site: dict[int, list[Mutant]] = {}
    for mutant in all_of_them:
        by_site.setdefault(mutant.site, []).append(mutant)
    taken = [each[0] for each in by_site.values()]
    further = [each[turn] for turn in range(1, len(all_of_them)) for each in by_site.values() if len(each) > turn]
    taken += further[: max(0, most - len(taken))]
    return [mutant for mutant in all_of_them if mutant in taken]


def sample(all_of_them: list[Mutant], count: int) -> list[Mutant]:
    """So many of them, evenly spread."""
    if len(all_of_them) <= count:
        return all_of_them
    return [all_of_them[i * len(all_of_them) // count] for i in range(count)]


def equal_ones(lesson: Path) -> dict[str, dict[str, str]]:
    """Exercise → change → why it is a solution too, from the lesson's mutants.toml."""
    path = lesson / "mutants.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _change(part: ast.stmt, path: Path_, node: ast.AST, new: ast.AST | None) -> str:
    """What was written → what stands there now; of a constant or an end of a slice the expression around it."""
    if isinstance(node, (ast.Constant, ast.Slice)) and new is not None:
        before: ast.AST = copy.deepcopy(part)
        around = None
        for name, i in path[:-1]:
            value = getattr(before, name)
            before = value if i is None else value[i]
            around = before if isinstance(before, ast.expr) else around
        if around is not None:
            old, (name, i) = ast.unparse(around), path[-1]
            if i is None:
                setattr(before, name, new)
            else:
                getattr(before, name)[i] = new
            return _both(old, ast.unparse(around))
    return _both(ast.unparse(node), ast.unparse(new) if new is not None else "nothing")


def _used(tree: ast.Module, exercise: str) -> list[ast.stmt]:
    """The exercise's function, and what it uses of the file, in order; what an earlier one uses is judged with that."""
    public = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    earlier = {name for before in public[: public.index(exercise)] for name in _reached(tree, before)}
    named = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return [named[name] for name in named if name in _reached(tree, exercise) - earlier]


def _reached(tree: ast.Module, exercise: str) -> set[str]:
    named = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    wanted, left = {exercise}, [exercise]
    while left:
        part = named[left.pop()]
        own = {
            node.arg for node in ast.walk(part) if isinstance(node, ast.arg)
        }  # a parameter may be called as a function
        for node in ast.walk(part):
            if isinstance(node, ast.Name) and node.id in named and node.id not in wanted | own:
                wanted.add(node.id)
                left.append(node.id)
    return wanted


def _nodes(part: ast.stmt) -> Iterator[tuple[Path_, ast.AST]]:
    """Every node that can be changed, with the way to it.

    No annotations, docstrings, decorators; no words of an error; not zip's strict, which changes nothing that is right.
    """

    def walk(node: ast.AST, path: Path_) -> Iterator[tuple[Path_, ast.AST]]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
                continue
            for i, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(each, ast.keyword) and each.arg == "strict":
                    continue
                if isinstance(each, ast.AST) and not _is_docstring(node, name, i):
                    yield (*path, (name, i)), each
                    if isinstance(each, ast.Raise):
                        continue
                    yield from walk(each, (*path, (name, i)))

    yield from walk(part, ())


def _is_docstring(node: ast.AST, field: str, index: int | None) -> bool:
    if field != "body" or index != 0 or not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return False
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _with(tree: ast.Module, part: ast.stmt, path: Path_, new: ast.AST | None) -> str | None:
    """The file with another node at the end of the path; None drops a statement."""
    number = tree.body.index(part)
    changed = copy.deepcopy(tree)
    node: ast.AST = changed.body[number]
    for name, i in path[:-1]:
        value = getattr(node, name)
        node = value if i is None else value[i]
    name, i = path[-1]
    if i is None:
        setattr(node, name, new)
    elif new is None:
        block = getattr(node, name)
        block[i : i + 1] = [ast.Pass()] if len(block) == 1 else []
    else:
        getattr(node, name)[i] = new
    try:
        text = ast.unparse(ast.fix_missing_locations(changed))
        compile(text, "mutant", "exec")
    except (ValueError, SyntaxError, AttributeError):
        return None
    return text if text != ast.unparse(tree) else None


def _changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of a node; None: nothing."""
    if isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise)):
        yield None
    if isinstance(node, ast.If):
        for test in (True, False):
            yield ast.If(ast.Constant(test), node.body, node.orelse)
    if isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        other = copy.copy(node)
        other.op = OPERATORS[type(node.op)]()
        yield other
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult, ast.FloorDiv)):
            yield ast.BinOp(node.right, node.op, node.left)
        yield node.left
        yield node.right
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        yield from node.values
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        yield node.operand
    if isinstance(node, ast.Constant):
        yield from (ast.Constant(other) for other in _constants(node.value))
    if isinstance(node, ast.Slice):
        for field in ("lower", "upper", "step"):
            if (end := getattr(node, field)) is not None:
                yield _replaced(node, field, None)
                if field != "step":
                    yield _replaced(node, field, ast.BinOp(end, ast.Add(), ast.Constant(1)))
                    yield _replaced(node, field, ast.BinOp(end, ast.Sub(), ast.Constant(1)))
    if isinstance(node, ast.Call):
        yield from _calls(node)
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) == 2:
        yield ast.Tuple(node.elts[::-1], node.ctx)
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    if isinstance(node, ast.comprehension) and node.ifs:
        yield _replaced(node, "ifs", [])


def _constants(value: object) -> list[int | float]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 2, value * 0.9] if value else [1.0]
    return []


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    """Other functions, other orders of arguments, arguments and calls left out."""
    if isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
    if isinstance(node.func, ast.Attribute):
        yield from (ast.Constant(number) for number in OF_RANKS.get(node.func.attr, ()))
        if node.func.attr in NAMES:
            yield ast.Call(ast.Attribute(node.func.value, NAMES[node.func.attr], ast.Load()), node.args, node.keywords)
        if not isinstance(node.func.value, ast.Name) or node.func.value.id not in ("torch", "dist", "np", "math", "F"):
            yield node.func.value  # x.clone() → x
    if len(node.args) >= 2 and not any(isinstance(each, ast.Starred) for each in node.args[:2]):
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    if len(node.args) == 1 and not isinstance(node.args[0], ast.Starred):
        yield node.args[0]
    if len(node.args) >= 2:
        yield ast.Call(node.func, node.args[:-1], node.keywords)
    for i in [i for i, each in enumerate(node.keywords) if each.arg != "strict"]:
        yield ast.Call(node.func, node.args, [*node.keywords[:i], *node.keywords[i + 1 :]])


def _replaced(node: ast.AST, field: str, value: object) -> ast.AST:
    other = copy.copy(node)
    setattr(other, field, value)
    return other


def _both(old: str, new: str, most: int = 70) -> str:
    """old → new, each in one line; of long ones the part where they begin to differ."""
    texts = [" ".join(text.split()) for text in (old, new)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - most // 2) if max(map(len, texts)) > most else 0
    cut = [f"{'… ' * (start > 0)}{text[start : start + most]}{' …' * (len(text) > start + most)}" for text in texts]
    return " → ".join(cut)
