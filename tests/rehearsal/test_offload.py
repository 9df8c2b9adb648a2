"""On GPUs, what is offloaded lies in host memory and nothing else does; no collective is given what lies there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shardrun.certify.equivalence import Case
from speedrun.books.shapes import ledger_groups
from strategies.base import Precision
from strategies.forecast.predict import predict_host
from strategies.ledger.terms import CATEGORIES, Scenario
from tests.fake_cuda.process import FakeCUDAProcess
from tests.rehearsal.offload import devices
from tests.rehearsal.rehearse import rehearse
from tests.strategies.small import shapes_of

GPUS = 8
CUTS, MASTERS, GRADIENTS, STATES, BUFFERS = CATEGORIES
OPTIMIZER: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
PARAMETERS: dict[str, Any] = {"offload_param": {"device": "cpu"}}
FSDP = {"reshard_after_forward": True, "wrap": ["Block"]}

HOST = {
    "fsdp": ("fsdp", {**FSDP, "offload": True}, {CUTS, GRADIENTS, STATES}, {}),
    "stays": ("fsdp", FSDP, set(), {CUTS: 1}),
    "zero1": ("zero1", {"stage": 1, **OPTIMIZER}, {MASTERS, GRADIENTS, STATES}, {CUTS: 1, BUFFERS: 2}),
    "zero2": ("zero2", {"stage": 2, **OPTIMIZER}, {MASTERS, GRADIENTS, STATES}, {CUTS: 1, BUFFERS: 2}),
    "zero3": ("zero3", {"stage": 3, **OPTIMIZER}, {MASTERS, GRADIENTS, STATES}, {CUTS: 1, BUFFERS: 1}),
    "zero3 all": ("zero3", {"stage": 3, **OPTIMIZER, **PARAMETERS}, {*CATEGORIES[:4]}, {BUFFERS: 1}),
    "zero3 parameters": ("zero3", {"stage": 3, **PARAMETERS}, {CUTS}, {MASTERS: 1, STATES: 1, BUFFERS: 1}),
}
"""Case → strategy, settings, the categories that lie on the host just before a step; and those that do not: 1 on the
device, 2 on either."""


def settings(case: str) -> tuple[str, dict[str, Any]]:
    name, engine = HOST[case][:2]
    return name, {"zero_optimization": engine} if name.startswith("zero") else engine


@pytest.mark.parametrize(
    ("which", "precision"),
    [
        *((which, "fp32") for which in ("fsdp", "zero2", "zero3 all")),
        *((which, "bf16") for which in ("stays", "fsdp", "zero1", "zero3", "zero3 parameters")),
    ],
)
def test_every_state_lies_where_it_should(which: str, precision: Precision, gpus: FakeCUDAProcess) -> None:
    name, engine = settings(which)
    model = Case(record=precision == "fp32", accumulation=2)  # its heads are too small for attention in bf16
    found, bytes = gpus.run(devices, name, engine, precision, model)
    _, _, on_host, others = HOST[which]
    before_step = found["after backward"]
    assert {category for category, where in before_step.items() if where == ["cpu"]} == on_host
    for category, where in others.items():
        assert before_step[category] == (["cuda"] if where == 1 else ["cpu", "cuda"]), category
    # On their way through a pass gathered parameters and whole gradients are on the device.
    if name == "fsdp":
        assert "cuda" in found["after forward 0"][CUTS] and found["after forward 1"][GRADIENTS] == ["cuda"]
    run = Scenario(name, shapes_of(model), ledger_groups(model.config()), GPUS, precision, 2, engine)
    predicted = predict_host(run)[0] if which != "stays" else {}
    for moment, expected in predicted.items():
        measured = bytes["after forward 1" if moment == "after forward" else moment]
        assert measured == {category: size for category, size in expected.items() if size}, moment


def test_a_whole_run_offloads_and_its_ledger_says_so(tmp_path: Path, gpus: FakeCUDAProcess) -> None:
    """From the first step to the checkpoint."""
    gpus.run(rehearse, "tiny", "fsdp", "fp32", str(tmp_path), None, False, {"offload": True})
    rank = json.loads((tmp_path / "run/ledger.json").read_text())["ranks"][0]
    lines = [line for entries in rank["host memory"].values() for line in entries.values()]
    assert sum(line["measured"] for line in lines) > 0
    assert not [line for line in lines if line["remainder"]]
    assert math.isclose(sum(line["predicted"] for line in rank["memory"]["after step"].values()), 0)
