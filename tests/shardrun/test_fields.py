"""`plan` and `diff` take the trainer's fields, all of them, and come to the run that the trainer comes to."""

import argparse
import json
from typing import Any

import pytest

from benchmarks.books_fields import BASE, all_fields, alone, changed
from shardrun import diff, plan
from shardrun.fields import OURS, field_types
from shardrun.plan.estimates import configure
from speedrun.config import Config
from speedrun.presets import PRESETS
from speedrun.run.command_line import parse
from tests.shardrun.test_plan import shardrun

SMALL = {"model.layers": 3, "model.heads": 4, "model.width": 48, "model.positions": "half_rope"}
SMALL |= {"model.mlp_width": 101, "data.global_batch": 8}
"""As in `BASE`, where the values are from."""


def words(fields: dict[str, Any]) -> list[str]:
    """As one types them."""
    said = []
    for name, value in fields.items():
        section, _, last = name.replace("_", "-").rpartition(".")
        option = f"{section}.{last}" if section else last
        if isinstance(value, bool):
            said.append(f"--{option}" if value else "--" + (f"{section}." if section else "") + f"no-{last}")
        else:
            said += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return said


def planned(arguments: list[str]) -> Config:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return configure(parser.parse_args(arguments))


VALUES = [{**SMALL, **fields} for _, fields in alone() if "schedule.stages" not in fields]


@pytest.mark.parametrize("fields", VALUES, ids=lambda fields: " ".join(words(fields)[-2:]))
def test_every_value_of_every_field_is_planned_as_it_is_trained(fields: dict[str, Any]) -> None:
    said = ["tiny", *words(fields)]
    assert planned(said) == parse(said)[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_planned_as_it_is_trained(preset: str) -> None:
    assert planned([preset]) == parse([preset])[1]


def test_a_stage_of_a_preset_is_a_field_too() -> None:
    said = ["speedrun", "--schedule.stages.1.micro-batch", "4", "--schedule.stages.0.window-short", "64"]
    assert planned(said) == parse(said)[1] != PRESETS["speedrun"][1]


def test_no_field_is_left_out() -> None:
    """Each is an option of both verbs; its own value, said, changes nothing."""
    fields = dict(field_types())
    assert {*fields, "schedule.stages"} == set(all_fields(Config())) and set(OURS.values()) <= set(fields)
    for verb in (plan, diff):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        known = {option for action in parser._actions for option in action.option_strings}
        assert {"--" + name.replace("_", "-") for name in fields} <= known
    for name in fields:
        value: Any = BASE
        for part in name.split("."):
            value = getattr(value, part)
        value = () if value == "" else value
        if value not in (None, ()):
            assert planned(["tiny", *words({name: value})]) == changed(PRESETS["tiny"][1], name, value)


def test_fields_move_the_figures() -> None:
    def memory(*options: str) -> dict[str, int]:
        found: dict[str, int] = json.loads(shardrun("plan", "modern", "--json", *options)[1])["estimates"][0]["memory"]
        return found

    plain = memory()
    assert memory("--model.fp8")["activations"] > plain["activations"]  # the fused loss quantises blocks of logits
    assert memory("--optimizer.adamw-every", "2")["optimizer states"] > plain["optimizer states"]
    assert memory("--model.bigram-rows", "65536")["parameters"] > plain["parameters"]
    assert memory("--data.micro-batch", "4")["activations"] < plain["activations"]
    assert memory("--seed", "7") == plain
    sides = [
        json.loads(shardrun("diff", "ddp", "zero3", "--json", *options)[1])["sides"][1]["memory"]["activations"]
        for options in ((), ("--model.checkpointing", "block"))
    ]
    assert sides[0] > sides[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--compile",), "--compile is not planned"),
        (("--model.fp8", "--gpu", "a100"), "this GPU has compute capability 8.0, and GPUs multiply in FP8 from 8.9 on"),
        (("--model.fp8", "--precision", "fp16"), "model.fp8 is on and mixed_precision is fp16"),
        (("--model.fp8", "--model.bias"), "FP8 layers have no biases"),
        (("--model.kernels", "triton", "--precision", "fp16"), "model.kernels is triton, but the run computes in fp16"),
        (("--model.attention", "flash", "--gpu", "a100"), "model.attention = flash cannot run"),
        (("--layers", "4", "--model.layers", "5"), "--layers and --model.layers are two names of one thing"),
        (("--model.heads", "3"), "model.heads = 3 does not divide model.width = 128"),
        (("--model.layers", "many"), "--model.layers many is not what the trainer takes"),
        (("--data.eval-sequence-length", "4096"), "rows of 4096 tokens"),
        (("--optimizer.clip", "-1"), "optimizer.clip is -1.0, but must be 0 (off) or above"),
        (("--optimizer.normuon", "--optimizer.name", "adamw"), "optimizer.normuon changes Muon's update"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(options: tuple[str, ...], sentence: str) -> None:
    status, _, err = shardrun("plan", "tiny", *options)
    assert status == 2 and sentence in err and err.count("\n") == 1
