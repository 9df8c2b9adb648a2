"""Config files as people have them (tests/configs): each resolves to what it asks for, or is refused in one sentence
that names where it stands, the key and the value.
"""

import os
import re
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import pytest
import yaml

from shardrun import explain
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


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.accepted], ids=lambda entry: entry.id)
def test_explain_prints_every_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: Entry) -> None:
    """Within 100 columns, and last the command that runs it here. (A path of the test's own may be longer.)"""
    path = entry.write(tmp_path)
    try:
        explain.run(Namespace(config=str(path), path=False, preset="tiny", json=False))
    except ValueError:
        assert entry.refused
        return
    printed = capsys.readouterr().out.replace(str(tmp_path), ".").replace(os.path.relpath(tmp_path), ".")
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    lines = printed.replace(" \\\n    -m ", " -m ").splitlines()  # a long command is typed in two
    assert lines[-1].startswith("  accelerate launch --config_file ") and lines[-1].endswith(" -m speedrun.train tiny")
    parts = printed.split("\n\n")  # what it is; the keys; what decides memory, if there is anything; how to run it
    said = [line.split()[0] for line in parts[1].splitlines() if line[:2] == "  " and line[2:3].strip()]
    assert said == keys_of(path)


def keys_of(path: Path) -> list[str]:
    """Every key of a config and of the JSON that it names, the two read as plain YAML: a section's with the prefix that
    accelerate gives them, the JSON's with dots. What both say is said once.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    found: dict[str, Any] = {}
    for name, value in content.items():
        prefix = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_", "fp8_config": "fp8_"}.get(name, "")
        if name.endswith("_config") and name != "use_parallelism_config":
            found |= {key if key.startswith(prefix[:-1]) else prefix + key: part for key, part in (value or {}).items()}
        else:
            found[name] = value
    engine = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    inside = dotted(yaml.safe_load(Path(engine).read_text(encoding="utf-8"))) if engine not in (None, "none") else []
    if content.get("distributed_type") != "DEEPSPEED":
        inside = []
    return [key for key, value in found.items() if value is not None or key not in inside] + inside


def dotted(tree: dict[str, Any], before: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        names += dotted(value, f"{before}{key}.") if isinstance(value, dict) and value else [f"{before}{key}"]
    return names


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
