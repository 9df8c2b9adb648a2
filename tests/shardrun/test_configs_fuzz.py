"""A config comes from anywhere: it resolves, or is refused in one sentence that names it; nothing else."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shardrun.configs import resolve_config
from strategies import catalogue
from strategies.config_file import Asked
from strategies.config_values import MAX_BYTES

ROOT = Path(__file__).parents[2]
GOOD = {path.name: path.read_text() for path in (ROOT / "accelerate_configs").rglob("*.yaml")}
KEYS = sorted({key for text in GOOD.values() for key in yaml.safe_load(text)})
KEYS += ["", "fsdp_config", "deepspeed_config", "parallelism_config"]
TYPES = [folder.DISTRIBUTED_TYPE for folder in catalogue.configs()]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        [
            *(folder.DISTRIBUTED_TYPE for folder in catalogue.configs()),
            "bf16",
            "no",
            "auto",
            "2",
            "TRANSFORMER_BASED_WRAP",
        ]
    ),
)
NESTED_KEYS = st.sampled_from(
    ["fsdp_version", "version", "fsdp_transformer_layer_cls_to_wrap", "fsdp_auto_wrap_policy", "zero_stage"]
    + ["fsdp_reshard_after_forward", "deepspeed_config_file", "gradient_accumulation_steps"]
    + ["parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size", "parallelism_config_tp_size"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(NESTED_KEYS, st.integers(), st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=8,
)


def resolve_or_say(path: Path) -> Asked | None:
    """The only two ways: resolved, or a sentence with the file's name."""
    try:
        resolved = resolve_config(path)
    except (ValueError, FileNotFoundError) as error:
        assert str(path.parent) in str(error) and len(str(error)) < 600 and "\n" not in str(error)
        return None
    assert resolved.strategy in catalogue.names() and resolved.world_size > 0
    assert all(isinstance(text, str) for line in resolved.lines for text in line)
    return resolved


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


quickly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quickly
@given(st.one_of(st.dictionaries(st.one_of(st.sampled_from(KEYS), st.integers()), VALUES, max_size=6), VALUES))
@example({"distributed_type": "FSDP", "fsdp_config": [1]})
@example({"distributed_type": "FSDP", "fsdp_config": {1: 2, "fsdp_version": 2}})
@example({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": True}})
@example({"num_processes": float("inf")})
def test_any_values_under_any_keys(file: Path, config: object) -> None:
    file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    resolve_or_say(file)


@quickly
@given(st.binary(max_size=300))
@example(b"[" * 5000)
@example(b"{a: " * 3000)
@example(b"num_processes: " + b"9" * 6000)
@example(b"num_processes: 2001-99-99")
@example(b"? [a]\n: b")
@example(b"!!python/object/apply:os.system ['true']")
def test_any_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    resolve_or_say(file)


@quickly
@given(st.sampled_from(sorted(GOOD)), st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_a_damaged_config_of_ours(file: Path, name: str, place: int, noise: bytes) -> None:
    content = GOOD[name].encode()
    file.write_bytes(content[:place] + noise + content[place + 1 :])
    resolve_or_say(file)


@quickly
@given(st.one_of(VALUES, st.fixed_dictionaries({"zero_optimization": VALUES})))
@example({"zero_optimization": {"stage": 2}})
def test_any_deepspeed_file(file: Path, engine: object) -> None:
    inner = file.with_name("engine.json")
    inner.write_text(json.dumps(engine))
    file.write_text(
        yaml.safe_dump(
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"deepspeed_config_file": str(inner)},
                "num_processes": 2,
            }
        )
    )
    resolve_or_say(file)


def test_neither_aliases_nor_size_take_memory_or_time(file: Path) -> None:
    """The classic: nine lines of aliases that stand for 10^9 words; and a file that is no config at all."""
    bomb = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    started = time.monotonic()
    tracemalloc.start()
    try:
        for content in (bomb, "x" * (MAX_BYTES + 1)):
            file.write_text(content)
            assert resolve_or_say(file) is None
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 10
    assert resolve_or_say(file.parent) is None and resolve_or_say(file.with_name("nowhere.yaml")) is None
