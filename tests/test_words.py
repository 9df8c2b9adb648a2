"""The words of the project: README files that can be read once, and name only what is there; help without slips.

Read are CONTRIBUTING.md, CHANGELOG.md and every README.md. A sentence, or what a semicolon divides it into, is at most
35 words long, in a lesson 25, code in it counted as one word; code blocks, tables and headings are not sentences.
"""

import argparse
import importlib
import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import speedrun
from shardrun.__main__ import VERBS, main
from shardrun.lesson.course import Lesson, course

ROOT = Path(__file__).parent.parent
FOLDERS = ("accelerate_configs", "benchmarks", "lessons", "scripts", "shardrun", "speedrun", "strategies", "tests")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
DOCUMENTS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *READMES]

LONGEST_README, LONGEST_SENTENCE, LONGEST_IN_A_LESSON = 900, 35, 25
"""In words: the front page, a sentence anywhere, and one for learners, many of whom read in their second language."""

ENDINGS = ("py", "md", "yaml", "yml", "toml", "png", "css", "cpp")
MADE_BY_RUNNING = ("runs/", "data/", "dist/", "~", "/", "http", "--")
PLACEHOLDERS = {"benchmarks/gpu/CARD.md", "my_config.yaml", "strategies/NAME/"}
"""Of files that a reader makes or names."""


LIBRARIES = [
    folder
    for library in ("torch", "deepspeed")
    if (spec := importlib.util.find_spec(library)) and spec.origin
    for folder in (Path(spec.origin).parent, Path(spec.origin).parent.parent)
]
"""Whose files lessons name."""


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> Iterator[str]:
    """Paragraphs and list entries, each in one line, without code blocks, tables, headings and HTML."""
    text = re.sub(r"^ *```.*?^ *```$", "\n", text, flags=re.M | re.S)
    text = re.sub(r"<[^>]+>", "\n\n", text)
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        line = line.strip()
        if not line or line.startswith(("|", "#", "!")) or re.match(r"([-*]|\d+\.) ", line):
            if paragraph:
                yield " ".join(paragraph)
            paragraph = []
        if line and not line.startswith(("|", "#", "!")):
            paragraph.append(re.sub(r"^([-*]|\d+\.) +", "", line))


def sentences(text: str) -> Iterator[str]:
    for paragraph in prose(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "CODE", paragraph))
        yield from re.split(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])[\"')*]*\s+(?=[A-Z0-9\"'(*`])|;\s+", plain)


def words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def test_sentences_are_told_apart() -> None:
    text = (
        "# No sentence\nOne, e.g. `a b c`\nand [two words](x.md). Is it? *Yes.* 3.11 counts; twice\n\n"
        "| a | table |\n```\ncode. Code.\n```\n- an entry\n  of two lines\n1. another"
    )
    assert list(sentences(text)) == [
        "One, e.g. CODE and two words.",
        "Is it?",
        "*Yes.",
        "3.11 counts",
        "twice",
        "an entry of two lines",
        "another",
    ]
    assert words("One, e.g. CODE – and two words.") == 6


def test_the_front_page_is_short_and_counts_the_lessons() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < LONGEST_README
    assert set(re.findall(r"(\d+) lessons", text)) == {str(len(course()))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_no_sentence_is_read_twice(document: Path) -> None:
    found = list(sentences(document.read_text(encoding="utf-8")))
    most = LONGEST_IN_A_LESSON if ROOT / "lessons" in document.parents else LONGEST_SENTENCE
    long = [f"{words(sentence)} words: {sentence}" for sentence in found if words(sentence) > most]
    assert found and not long, "\n\n".join(long)


def without_noun(text: str) -> list[str]:
    """What ends with a genitive whose noun the reader has to guess: "then DeepSpeed's."."""
    plain = " ".join(re.sub(r"`[^`]*`", "CODE", text).split())
    return re.findall(r"(?:\S+ ){0,3}\S*\w's ?(?=[.,;:)|]|$)", plain)


def test_genitives_without_a_noun_are_seen() -> None:
    text = "by hand, then DeepSpeed's.\nThe ring's bytes, torch's\nown. It's `a's`, (as torch's), it is | ours's |"
    assert without_noun(text) == ["by hand, then DeepSpeed's", "It's CODE, (as torch's", "it is | ours's "]


@pytest.mark.parametrize("lesson", course(), ids=lambda lesson: lesson.name)
def test_genitives_of_lessons_have_their_noun(lesson: Lesson) -> None:
    for name in ("README.md", "lesson.toml", "exercise.py"):
        assert without_noun((lesson.folder / name).read_text(encoding="utf-8")) == [], name


def paths(text: str) -> Iterator[str]:
    """What a text names as a file or folder of the project: link targets, code that looks like a path, and names of
    Python files in blocks.
    """
    for block in re.findall(r"^ *```.*?^ *```$", text, flags=re.M | re.S):
        yield from re.findall(r"(?<![\w/.{}*-])\w+\.py\b", block)
    prose_and_tables = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose_and_tables):
        if "://" not in target:
            yield target
    for code in re.findall(r"`([^`\n]+)`", prose_and_tables):
        if re.fullmatch(r"[\w./{},*:…\[\]-]+", code) and code not in PLACEHOLDERS:
            if code.startswith(MADE_BY_RUNNING) or "…/" in code:
                continue
            if "/" in code or code.endswith(tuple(f".{ending}" for ending in ENDINGS)):
                yield code


def expand(path: str) -> Iterator[str]:
    """`a/{b,c}.py` → a/b.py, a/c.py."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    alternatives = [part if i % 2 else [",".join(part)] for i, part in enumerate(parts)]
    return map("".join, itertools.product(*alternatives))


def missing(path: str, document: Path) -> bool:
    """Whether a path is there neither beside the document nor from the root; a bare name may be anywhere."""
    path, _, test = path.partition("::")
    path = re.sub(r"^learning/", "lessons/", path)
    for one in expand(path):
        found = [path for folder in (document.parent, ROOT, *LIBRARIES) for path in folder.glob(one)]
        if "/" not in one:
            found += [file for folder in FOLDERS for file in (ROOT / folder).rglob(one)]
        if not found:
            return True
        function = re.split(r"[…\[]", test)[0]
        if function and f"def {function}" not in found[0].read_text(encoding="utf-8"):
            return True
    return False


def test_missing_paths_are_seen() -> None:
    text = (
        "```\nnone.py train.py\n```\n[a](tests/nothing.md) `speedrun/{train,no}.py` `tests/test_words.py::test_none` "
        "`README.md` `--a/b` `x/…/y` `runs/a.json` `two words/`"
    )
    found = list(paths(text))
    due = "none.py train.py tests/nothing.md speedrun/{train,no}.py tests/test_words.py::test_none README.md"
    assert found == due.split()
    assert [missing(path, ROOT / "README.md") for path in found] == [True, False, True, True, True, False]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_path_that_is_named_is_there(document: Path) -> None:
    named = list(paths(document.read_text(encoding="utf-8")))
    assert [path for path in named if missing(path, document)] == []


def unknown(text: str) -> list[str]:
    """Verbs of shardrun, targets of make and modules of Python that a text names and that there are not."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    known = [*VERBS, "VERB", "--version", "--help"]
    code = "\n".join([*re.findall(r"`[^`\n]+`", text), *re.findall(r"^ *```.*?^ *```$", text, flags=re.M | re.S)])
    verbs = re.findall(r"(?:^|[`$;]|python -m) *shardrun +([\w-]+)", code, flags=re.M)
    made = re.findall(r"(?:^|[`$;]) *make +(?:[A-Z]+=\S+ +)*([\w-]+)", code, flags=re.M)
    modules = re.findall(r"python[\d.]* -m ([\w.]+)", code)
    wrong = [f"shardrun {verb}" for verb in verbs if verb not in known]
    wrong += [f"make {target}" for target in made if target not in targets]
    return wrong + [f"python -m {module}" for module in modules if importlib.util.find_spec(module) is None]


def test_unknown_commands_are_seen() -> None:
    text = "make sure of `make demo`, `make nothing`, `shardrun plan`\n```\nshardrun demo 5\npython -m lessons.no\n```"
    assert unknown(text) == ["shardrun demo", "make nothing", "python -m lessons.no"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_command_that_is_named_is_there(document: Path) -> None:
    assert unknown(document.read_text(encoding="utf-8")) == []


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_no_slips(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not `what fits?.`, not `6 %% of it`, and every option says what it is for."""
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    top = argparse.ArgumentParser(prog=f"shardrun {verb}")
    importlib.import_module(f"shardrun.{verb}").add_arguments(top)
    for parser in parsers(top):
        shown += parser.format_help()
        assert [action.dest for action in parser._actions if not action.help and action.dest != "action"] == []
    assert not re.search(r"[?!]\.|(?<!\.)\.\.(?!\.)|%%|%\(|\bNone\b", shown)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"shardrun {speedrun.__version__}\n"
