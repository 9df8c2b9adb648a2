"""The embedded corpus: the same every time, of the promised size, without copies across the split, safely cached."""

import ast
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from speedrun.config import DataConfig
from speedrun.data import corpus, open_data, text


@pytest.fixture(scope="module")
def documents() -> list[bytes]:
    return corpus.build()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_size_and_form(documents: list[bytes]) -> None:
    assert 1_000_000 < sum(map(len, documents)) < 6_000_000
    assert len(set(documents)) == len(documents) > 200
    for document in documents:
        assert len(document.decode("utf-8")) >= corpus.MIN_DOCUMENT


def test_holds_topics_and_docstrings_and_no_code(documents: list[bytes]) -> None:
    whole = b"".join(documents).decode()
    import json

    assert json.dumps.__doc__ is not None
    first_line = json.dumps.__doc__.strip().splitlines()[0]
    assert first_line in whole
    assert "class json.decoder.JSONDecoder" in whole
    assert "Basic customization" in whole  # a topic
    assert "\nimport json.scanner" not in whole  # code of a module


def test_building_again_gives_the_same_and_imports_nothing_it_reads(documents: list[bytes]) -> None:
    before = set(sys.modules)
    again = corpus.build()
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}
    assert again == documents
    assert text.content_hash(again) == text.content_hash(documents)
    assert text.content_hash(again[::-1]) != text.content_hash(documents)


def test_no_paragraph_of_validation_is_in_training(documents: list[bytes]) -> None:
    def paragraphs(some: list[bytes]) -> set[str]:
        blocks = b"\n\n".join(some).decode().split("\n\n")
        return {key for key in (" ".join(block.split()) for block in blocks) if len(key) >= corpus.MIN_PARAGRAPH}

    training, validation = text.hold_out(documents)
    assert len(paragraphs(validation)) > 200
    assert not paragraphs(training) & paragraphs(validation)


def test_validation_share(documents: list[bytes]) -> None:
    training, validation = text.hold_out(documents)
    share = sum(map(len, validation)) / sum(map(len, documents))
    assert 0.05 < share < 0.09
    assert sum(map(len, validation)) >= 100_000


def test_cache_is_used_and_fast(cache: Path, monkeypatch: pytest.MonkeyPatch, documents: list[bytes]) -> None:
    monkeypatch.setattr(corpus, "build", lambda: documents)
    assert corpus.pydocs() == (documents, text.content_hash(documents))
    assert [path.name for path in (cache / "shardrun").iterdir()] == [corpus.cache_path().name]
    assert ".".join(map(str, sys.version_info[:3])) in corpus.cache_path().name

    monkeypatch.setattr(corpus, "build", lambda: pytest.fail("built again"))
    start = time.perf_counter()
    assert corpus.pydocs()[0] == documents
    assert time.perf_counter() - start < 0.5  # measured: some milliseconds; the bound leaves room for a busy machine


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "changed"])
def test_a_damaged_cache_is_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    small = [b"one\n", b"two\n"]
    monkeypatch.setattr(corpus, "build", lambda: small)
    corpus.pydocs()
    path = corpus.cache_path()
    whole = path.read_bytes()
    if damage == "changed":
        np.savez(path, text=np.zeros(8, np.uint8), ends=np.array([4, 8]), sha256=np.array(text.content_hash(small)))
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 300}[damage])
    assert corpus.pydocs() == (small, text.content_hash(small))
    assert path.read_bytes() == whole


def test_an_unwritable_cache_only_costs_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "build", lambda: [b"one\n", b"two\n"])
    (cache / "shardrun").write_text("a file where the folder should be")
    assert corpus.pydocs()[0] == [b"one\n", b"two\n"]


def _save_often(path: Path, documents: list[bytes]) -> None:
    for _ in range(30):
        corpus._save(path, documents, text.content_hash(documents))


def test_a_reader_never_sees_half_a_cache(tmp_path: Path) -> None:
    path, documents = tmp_path / "cache.npz", [b"a" * 300_000, b"b" * 300_000]
    corpus._save(path, documents, text.content_hash(documents))
    writers = [threading.Thread(target=_save_often, args=(path, documents)) for _ in range(2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert corpus._load(path) is not None
        reads += 1
    assert reads > 0
    for writer in writers:
        writer.join()
    assert list(tmp_path.iterdir()) == [path]


def test_docstrings_are_found_in_order() -> None:
    module = ast.parse(
        '"""Module."""\nclass A:\n  """Class."""\n  def f(self, x=1):\n    """Method."""\n'
        '    def g():\n      """Hidden."""\nasync def h(): "Function."\nx = "no docstring"\n'
    )
    assert list(corpus._docstrings(module, "module m", "m")) == [
        ("module m", "Module."),
        ("class m.A", "Class."),
        ("m.A.f(self, x=1)", "Method."),
        ("m.h()", "Function."),
    ]


def test_open_data_on_the_corpus(cache: Path, monkeypatch: pytest.MonkeyPatch, documents: list[bytes]) -> None:
    monkeypatch.setattr(corpus, "build", lambda: documents)
    data = open_data(DataConfig(), vocab_size=257, seed=1)
    assert (data.name, data.document_start) == ("pydocs", 256)
    assert len(data.content_hash) == 64
    assert data.val_tokens > 65_537
    assert data.validation_rows == 256
    inputs, targets = data.batch(1000, 0, 48)
    assert inputs.shape == targets.shape == (48, 256)
    _, validation_targets = data.validation(0, data.validation_rows)
    starts = int((validation_targets == 256).sum())
    assert data.target_bytes() == 65_536 - starts and starts > 0
