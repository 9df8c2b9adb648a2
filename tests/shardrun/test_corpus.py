"""Config files as people have them (tests/configs): each resolves to what it asks for, or is refused in one sentence
that names where it stands, the key and the value.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import pytest

from shardrun.configs import resolve_config
from strategies import catalogue
from strategies.config_file import Asked
from strategies.zero.settings import unpredicted
from tests.configs import Entry, Refused, entries
from tests.configs.by_accelerate import refusal

ENTRIES = entries()
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)


def test_the_corpus_is_whole() -> None:
    """Every name once, every outcome said; strategies, precisions and tables all there; forty to launch on a CPU."""
    assert [id for id, count in Counter(entry.id for entry in ENTRIES).items() if count > 1] == []
    assert [entry.id for entry in ENTRIES if not (entry.accepted or entry.refused)] == []
    assert [entry.id for entry in ENTRIES if entry.accelerate_refuses and entry.accepted] == []
    assert [
        entry.id
        for entry in ENTRIES
        if "engine.json" in entry.yaml or ("ENGINE" in entry.yaml) != (entry.engine is not None)
    ] == []
    accepted = [entry.accepted for entry in ENTRIES if entry.accepted]
    assert {one.strategy for one in accepted} == set(catalogue.names())
    assert {one.precision for one in accepted} == {"fp32", "bf16", "fp16"}
    launched = [entry for entry in ENTRIES if entry.launch]
    assert len(launched) == 40
    assert all("use_cpu: true" in entry.yaml or '"use_cpu": true' in entry.yaml for entry in launched)
    assert all(entry.accepted.cpu and entry.accepted.world_size <= 2 for entry in launched if entry.accepted)


@every_entry
def test_a_config_resolves_to_what_it_says(tmp_path: Path, entry: Entry) -> None:
    path = entry.write(tmp_path)
    try:
        resolved = resolve_config(path)
    except (ValueError, FileNotFoundError) as error:
        assert entry.refused, f"refused: {error}"
        check_sentence(str(error), entry.refused, path)
        return
    assert entry.accepted, f"accepted as {resolved.strategy}, {resolved.precision}"
    for fact in ("strategy", "world_size", "precision", "cpu"):
        assert getattr(resolved, fact) == getattr(entry.accepted, fact), fact
    said = asked(resolved)
    assert {key: said.get(key) for key in entry.asks} == entry.asks


@every_entry
def test_accelerate_launches_what_is_accepted(tmp_path: Path, entry: Entry) -> None:
    """And refuses what the table says it refuses: the table was not made from Shardrun's own reading."""
    if not accelerate.__version__.startswith("1.15."):
        pytest.skip("the table says what accelerate 1.15 refuses")
    found = refusal(entry.write(tmp_path))
    assert (found is not None) == entry.accelerate_refuses, found


def check_sentence(sentence: str, refused: Refused, path: Path) -> None:
    """One sentence: the file, the key as written there, the value, the way out."""
    assert "\n" not in sentence and len(sentence) < 600 and re.search(r"[^.]\.$", sentence), sentence
    file = str(path.with_name("engine.json") if refused.engine else path)
    assert file in sentence, sentence
    rest = sentence.replace(file, "FILE").replace(str(path), "FILE")
    if refused.keys:
        assert any(all(names(part, rest) for part in key.split(".")) for key in refused.keys), sentence
    if refused.values:
        assert any(names(value.lower(), rest.lower()) for value in refused.values), sentence
    assert refused.says in sentence, sentence


def names(word: str, sentence: str) -> bool:
    """Whether a sentence has the word by itself, not as a part of another."""
    return re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", sentence) is not None


def asked(resolved: Asked) -> dict[str, Any]:
    """What a config asks for beyond strategy and precision, in the words of `Entry.asks`."""
    engine = dict(resolved.engine)
    found = {key: engine[key] for key in ("wrap", "replicas") if key in engine}
    found |= {name: said.value for name, said in resolved.asks.items()}
    zero = engine.get("zero_optimization") or {}
    for name, key in (("reshard", "reshard_after_forward"), ("communication", "communication_data_type")):
        if key in engine:
            found[name] = engine[key]
    if engine.get("offload"):
        found["offload_params"] = "cpu"
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_params", "offload_param")):
        if zero.get(key):
            found[name] = zero[key]["device"]
    if zero and (keys := sorted(set(unpredicted(zero["stage"], resolved.precision, engine).values()))):
        found["not_predicted"] = keys
    return found
