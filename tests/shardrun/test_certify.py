"""`shardrun certify` through accelerate launch, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardrun import certify
from shardrun.__main__ import main
from shardrun.certify.equivalence import Trace, compare


def shardrun(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-m", "shardrun", *arguments], capture_output=True, text=True, timeout=200)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_config_of_ones_own_is_certified(tmp_path: Path, warm_python: str) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("distributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: bf16\nnum_processes: 2\n")
    result = shardrun("certify", "--config", str(config), "--steps", "4", "--json", python=warm_python)
    assert result.returncode == 0, result.stderr
    assert "8 of 8 equal the single-process run." in result.stderr
    rows = json.loads(result.stdout)["cases"]
    assert len(rows) == 8 and all(row["equal"] and row["world_size"] == 2 for row in rows)


@pytest.mark.parametrize(("precision", "launched"), [("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_the_precision_is_what_is_launched(monkeypatch: pytest.MonkeyPatch, precision: str, launched: str) -> None:
    options: list[str] = []

    def launch(config: Path, module: str, arguments: list[str], further: list[str], log: Path) -> int:
        options.extend(further)
        log.write_text("")
        return 1

    monkeypatch.setattr(certify, "launch", launch)
    with pytest.raises(SystemExit):
        main(["certify", "--config", "cpu/ddp", "--steps", "1", "--precision", precision])
    assert options == ["--mixed_precision", launched]


def test_tolerances_are_those_of_the_precision() -> None:
    far = Trace([1.001], [1.01], {"a": torch.tensor([0.05])})
    near = Trace([1.0001], [1.001], {"a": torch.tensor([0.01])})
    true = Trace([1.0], [1.0], {"a": torch.zeros(1)})
    assert compare(far, true, "bf16").equal and not compare(far, true, "fp16").equal
    assert compare(near, true, "fp16").equal and not compare(near, true).equal
    for broken in (Trace([1.005], [1.0], true.weights), Trace([1.0], [1.1], true.weights)):
        assert not compare(broken, true, "bf16").equal


def test_an_unknown_config_is_refused_with_the_names_there_are() -> None:
    result = shardrun("certify", "--config", "cpu/zero4")
    assert result.returncode == 2
    assert "there is no accelerate config 'cpu/zero4'" in result.stderr and "cpu/zero3" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.ranks
@pytest.mark.slow
def test_a_comparison_as_json(tmp_path: Path, warm_python: str) -> None:
    small = ["--data.global-batch", "4", "--data.eval-tokens", "256", "--untimed-steps", "0"]
    arguments = ["--strategies", "ddp", "--steps", "3", "--out", str(tmp_path), "--json", "--", *small]
    compared = shardrun("compare", *arguments, python=warm_python)
    assert compared.returncode == 0, compared.stderr
    (run,) = json.loads(compared.stdout)["runs"]
    assert run["peak"]["measured"] > run["activations"]["measured"] == run["activations"]["predicted"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--config", "cpu/ddp", "--processes", "5"), "5 processes do not divide the certificate's batches of 72 rows"),
        (("--config", "cpu/single", "--processes", "2"), "single.yaml is for one process (distributed_type NO), not 2"),
        (("--steps", "0"), "--steps and --processes are at least 1"),
    ],
)
def test_what_cannot_be_certified_is_said_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["certify", *arguments])
    said = capsys.readouterr()
    assert end.value.code == 2 and sentence in said.err and "Reference" not in said.out


def test_traces_of_different_models_or_lengths_are_refused_in_a_sentence() -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for changed in ({"a": torch.zeros(2)}, {**weights, "b": torch.zeros(4)}, {**weights, "c": torch.zeros(1)}):
        with pytest.raises(ValueError, match="of different models: [bc] is .* train both from the same model"):
            compare(Trace([1.0], [1.0], changed), Trace([1.0], [1.0], weights))
    with pytest.raises(ValueError, match="has 1 steps and its reference 2"):
        compare(Trace([1.0], [1.0], weights), Trace([1.0] * 2, [1.0] * 2, weights))


def test_help_names_the_verbs() -> None:
    result = shardrun("--help")
    assert result.returncode == 0 and "certify" in result.stdout and "compare" in result.stdout


def test_a_precision_that_a_config_cannot_have_is_refused_before_anything_trains() -> None:
    done = shardrun("certify", "--config", "cpu/zero2", "--precision", "fp16")
    assert done.returncode == 2 and "Reference" not in done.stdout
    assert "--mixed_precision fp16 is not supported; DeepSpeed computes in fp16 on GPUs alone" in done.stderr
