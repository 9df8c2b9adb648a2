"""Every command of the project that its documentation gives: found in the text, with file and line.

Read are Markdown files (fenced blocks, and code in running text), the docstrings of Python files, and the comments of
YAML files. What is found begins with `accelerate launch`, `shardrun`, `python -m shardrun` or
`python -m speedrun.train`.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "speedrun/README.md", "strategies/README.md", "tests/README.md"),
    *("lessons/**/*.md", "benchmarks/*.md", "accelerate_configs/**/*.yaml"),
    *(f"{package}/**/*.py" for package in ("speedrun", "strategies", "shardrun", "lessons", "benchmarks")),
)

PROGRAM = r"(?:accelerate launch|(?:python -m )?shardrun(?= [\w…-])|python -m speedrun\.train) "
ON_A_LINE = re.compile(rf"\s*(?:\$ )?(?={PROGRAM})")
IN_TEXT = re.compile(rf"`(?={PROGRAM})")

PLACEHOLDERS = {
    "N": "1",
    "VERB": "explain",
    "A": "ddp",
    "B": "zero2",
    "CONFIG": "cpu/zero2",
    "my_config.yaml": "cpu/ddp",
    "NAME": "optimizers",
    "RANK": "0",
    "ADDRESS_OF_THE_FIRST": "127.0.0.1",
}
"""What a reader puts in the place of what stands for something of his own, where not every word will do."""

CUT_SHORT = "--config_file accelerate_configs/cpu/ddp.yaml -m speedrun.train tiny --name mine"
"""What a reader puts in the place of `…` within `accelerate launch`."""


@dataclass(frozen=True)
class Command:
    """A command as a reader would type it."""

    file: str
    """Relative to the project's root."""
    line: int
    words: tuple[str, ...]
    mentioned: bool
    """In running text: it may leave out what is required, as in `shardrun checkpoint inspect`."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {shlex.join(self.words)}"


def documented() -> list[Command]:
    """All of them, in the order of files and lines."""
    paths = sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)})
    return [command for path in paths for command in commands_of(path)]


def commands_of(path: Path) -> list[Command]:
    """Those of one file."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    found = []
    for number, line, fenced in _lines(path.suffix, text):
        if fenced and (start := ON_A_LINE.match(line)):
            found.append(Command(name, number, _words(line[start.end() :]), False))
        elif not fenced or path.suffix == ".py":
            found += [
                Command(name, number, _words(line[start.end() :].partition("`")[0]), True)
                for start in IN_TEXT.finditer(line)
            ]
    return found


def _lines(suffix: str, text: str) -> Iterator[tuple[int, str, bool]]:
    """Number, text and whether commands stand there by themselves, of every line that documents something.

    A line that goes on in the next one, by a backslash or within backquotes, comes whole.
    """
    lines = text.splitlines()
    if suffix == ".py":
        numbers = [
            number
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        ]
    else:
        numbers = list(range(1, len(lines) + 1))
    fenced, goes_on, whole, first = suffix != ".md", False, "", 0
    for number in sorted(numbers):
        line = lines[number - 1]
        if suffix == ".yaml":
            if not line.startswith("#"):
                continue
            line = line[1:]
        if suffix == ".md" and line.startswith("```"):
            fenced = not fenced
            continue
        if not goes_on:
            whole, first = "", number
        whole = f"{whole} {line.strip()}" if goes_on else line
        goes_on = whole.endswith("\\") or (whole.count("`") % 2 == 1 and bool(line.strip()))
        whole = whole.removesuffix("\\")
        if not goes_on:
            yield first, whole, fenced
    if goes_on:
        yield first, whole, fenced


def _words(text: str) -> tuple[str, ...]:
    """A command's words, as a shell and a reader make them; what is piped or chained to it is left out."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)  # ${STEPS:-60} is 60 where nobody has set it
    text = re.sub(r"(\.py) {2,}.*", r"\1", text)  # `… demo.py      what it shows`
    text = text.replace("…/", "accelerate_configs/")
    words = shlex.split(text, comments=True)
    ends = [i for i, word in enumerate(words) if word in (">", ">>", "|", "&&", ";")]
    words = words[: ends[0]] if ends else words
    launch = words[:2] == ["accelerate", "launch"]
    filled = [shlex.split(CUT_SHORT) if launch and word == "…" else [PLACEHOLDERS.get(word, word)] for word in words]
    return tuple(word for part in filled for word in part if word != "…")
