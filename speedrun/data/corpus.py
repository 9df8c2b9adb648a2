"""The embedded corpus: the documentation that ships inside Python, so that training needs no download.

About 2 MB of English: the topics of Python's `help()` and the docstrings of the standard library. Docstrings are
read out of the source files with `ast`; no module of the standard library is imported for it. One topic is a document,
and so is one module with all its docstrings.
"""

import ast
import gc
import os
import re
import sys
import sysconfig
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from speedrun.data.text import content_hash

CORPUS_VERSION = 1
"""Part of the cache's file name: raise it when the same Python would give other documents."""

MIN_PARAGRAPH = 64
"""Characters from which a repeated paragraph counts as a copy; shorter ones ("Example:") repeat naturally."""

MIN_DOCUMENT = 200
"""Characters below which a document is dropped: a heading whose text was a copy, a module with one line to say."""

# Not everybody's Python has these (distributions package them separately), they are tests, or they hold no prose.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
    "distutils",
    "ensurepip",
    "encodings",
    "pydoc_data",
}


def pydocs() -> tuple[list[bytes], str]:
    """The documents (UTF-8) and the SHA-256 of them all; from the cache where there is one (a few milliseconds).

    The same Python build always gives the same documents; another version gives slightly others, and another hash.
    Several processes may call this at once: the cache file is put in place in one piece.
    """
    path = cache_path()
    cached = _load(path)
    if cached is not None:
        return cached
    documents = build()
    digest = content_hash(documents)
    _save(path, documents, digest)
    return documents, digest


def build() -> list[bytes]:
    """Read the documents from this Python's own files, in a fixed order (some seconds; `pydocs` caches it).

    pydoc's topics contain each other (`specialnames` holds all of `customization`), and modules repeat inherited
    docstrings. A copy of a training text among the validation documents would make the validation loss a lie, so each
    longer paragraph is kept only where it first appears, in the longest topics first.
    """
    seen: set[str] = set()
    documents = []
    for text in [*_topics(), *_modules()]:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if len(key) >= MIN_PARAGRAPH:
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph.rstrip())
        document = "\n\n".join(kept).strip("\n")
        if len(document) >= MIN_DOCUMENT:
            documents.append(document.encode("utf-8", errors="replace") + b"\n")
    return list(dict.fromkeys(documents))


def cache_path() -> Path:
    """Where this Python's corpus is cached: under $XDG_CACHE_HOME, or ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    python = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return Path(base) / "shardrun" / f"pydocs-{CORPUS_VERSION}-{python}.npz"


def _topics() -> list[str]:
    """The texts behind `help("TOPIC")`, longest first."""
    from pydoc_data.topics import topics

    return sorted((str(text) for text in topics.values()), key=lambda text: (-len(text), text))


def _modules() -> Iterator[str]:
    """One text per module of the standard library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(root):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            module = _parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # a template, or a file that may not be read: not ours to judge
            continue
        sections = [f"{heading}\n\n{docstring}" for heading, docstring in _docstrings(module, f"module {name}", name)]
        if sections:
            yield "\n\n".join(sections)


def _parse(source: bytes) -> ast.Module:
    collects = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no cycles: looking for some doubles the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a few old files hold escapes such as "\d"
            return ast.parse(source)
    finally:
        if collects:
            gc.enable()


def _sources(folder: Path) -> Iterator[Path]:
    """The .py files below `folder`, sorted, without descending into the folders that are skipped."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir() and path.name not in SKIPPED_FOLDERS and not path.is_symlink():
            yield from _sources(path)
        elif path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, heading: str, name: str
) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of `node` and of the classes and functions in it, in the order of the source."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield heading, docstring
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # functions inside functions are nobody's interface
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"class {name}.{child.name}", f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}({ast.unparse(child.args)})", f"{name}.{child.name}")


def _load(path: Path) -> tuple[list[bytes], str] | None:
    """The cached documents and their hash; None where there is no file or its content does not match its hash."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            text, ends, digest = archive["text"].tobytes(), archive["ends"].tolist(), str(archive["sha256"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    documents = [text[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    return (documents, digest) if content_hash(documents) == digest else None


def _save(path: Path, documents: list[bytes], digest: str) -> None:
    """Write the cache in one piece; a folder that cannot be written only costs the next start its seconds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        text = np.frombuffer(b"".join(documents), dtype=np.uint8)
        file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False)
        try:
            with file:
                np.savez(file, text=text, ends=ends, sha256=np.array(digest))
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)  # moved away already, unless something failed
    except OSError:
        pass
