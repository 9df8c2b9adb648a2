"""Steps whose figures are read a step later: decided on the device as on the host, and the run is the same run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speedrun import train as training
from speedrun.config import Config
from speedrun.run.context import Run
from speedrun.run.faults import Faults, Found
from speedrun.run.unread import Allowance
from tests.speedrun.runs import metrics, small, train_here

LOSSES = st.one_of(st.floats(0.5, 20.0, width=32), st.sampled_from((math.nan, math.inf)))


@given(st.lists(LOSSES, max_size=90), st.sampled_from((0.0, 1.2, 2.0)))
def test_the_device_decides_as_the_host_does(losses: list[float], spike: float) -> None:
    allowance = Allowance(spike, torch.device("cpu"))
    faults = Faults(Config(spike=spike, on_nonfinite="skip"), lambda _: None)
    for step, loss in enumerate(losses):
        on_device = torch.tensor(loss)
        allowed = allowance.allows(on_device)
        assert bool(allowed) is not faults.refuses(on_device.item())
        allowance.over(on_device, allowed)
        faults.row.clear()  # many in a row end a run, which is not asked here
        counts = faults.after_step(step + 1, on_device.item(), 1.0, lambda: Found("x"))
        assert counts is bool(allowed)
        assert bool(allowance.allows(on_device.new_ones(()) / 2)) is counts  # after one that does not count: none
        allowance.looked()


def run_of(folder: Path, patch: pytest.MonkeyPatch, devices: tuple[str, ...], factor: float, **fields: Any) -> Any:
    """A run in which some batches have their loss multiplied: its lines without times, or the sentence of its end."""
    accumulate = training.accumulate

    def some_bad(strategy: Any, forward: Callable[..., Tensor], batch: Any, options: Any) -> Tensor:
        bad = int(batch[0][0].sum()) % 4 == 0  # the same batches, whenever they are computed
        return accumulate(strategy, (lambda *a, **o: forward(*a, **o) * factor) if bad else forward, batch, options)

    patch.setattr(Run, "reads_late", devices)
    patch.setattr(training, "accumulate", some_bad)
    config = small(steps=20, eval_every=10, out=str(folder), **fields)
    ended = ""
    try:
        train_here("single", config)
    except FloatingPointError as error:
        ended = str(error)
    lines = [
        {
            key: value
            for key, value in line.items()
            if "time" not in key and key not in ("step_avg_ms", "tokens_per_second")
        }
        for line in metrics(folder / "run")
    ]
    return lines, ended


@pytest.mark.parametrize(
    ("factor", "fields"),
    [(math.inf, {"on_nonfinite": "skip"}), (50.0, {"on_nonfinite": "skip", "spike": 3.0}), (math.inf, {})],
)
def test_a_run_read_late_is_the_same_run(
    factor: float, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for devices in ((), ("cpu",)):
        with monkeypatch.context() as patch:
            found.append(run_of(tmp_path / str(len(devices)), patch, devices, factor, **fields))
    (at_once, ended), (late, ended_late) = found
    assert late == at_once and ended_late == ended
    assert any(line.get("skipped") for line in late) or ended
