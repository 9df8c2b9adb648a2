"""Variables of another launcher: named before anything waits; ranks that somebody has started are left alone."""

import re

import pytest
import torch

from strategies import left_over, select
from strategies.select import Launch

MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
RANK_0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", **MEETING}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", **RANK_0}


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE=4 is set in this shell, but no launcher started this process .* `unset WORLD_S",
        ),
        ({"WORLD_SIZE": "4", **MEETING}, "`unset WORLD_SIZE MASTER_ADDR MASTER_PORT`, or start the ranks with acc"),
        (
            {"LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            "LOCAL_RANK=0 is set in .*, but no launcher .*`unset LOCAL_RANK",
        ),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE=4 is set in this shell, but no launcher .*`unset PMI_SIZE`, or"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 is set .*`unset OMPI_COMM_WORLD_SIZE`"),
        ({"MV2_COMM_WORLD_SIZE": "x"}, "MV2_COMM_WORLD_SIZE is 'x' in this shell, which is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING}, "but not LOCAL_RANK, so no launcher started this process"),
        ({**RANK_0, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999', which is no port"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four' in this shell, which is no whole number from 1 on"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is '' in this shell, which is no whole number from 0 on"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "3"}, "RANK=3 and WORLD_SIZE=1 are set in this shell, but ranks count from 0: `unset RANK`"),
        ({**RANK_0, "RANK": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({**RANK_0, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "not MASTER_ADDR and MASTER_PORT, so no launcher started this process"),
        ({**RANK_0, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', which is no port"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true is set in this shell, but no launcher"),
        ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1 is set .*`unset ACCELERATE_USE_FSDP`"),
    ],
)
def test_what_cannot_be_a_ranks_is_named(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        left_over.check(environ, launched=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("environ", "launched"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "MASTER_PORT": "abc"}, False),  # held, and is held
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **MEETING}, False),
        (TORCHRUN, False),
        (RANK_0, False),  # by hand, perhaps: the others may come
        ({"RANK": "0", "WORLD_SIZE": "4"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, True),  # the config file is for one process
    ],
)
def test_what_may_be_a_ranks_is_left_alone(environ: dict[str, str], launched: bool) -> None:
    left_over.check(environ, launched)


def test_who_has_started_a_rank_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # a shell that a rank of torchrun has started has its variables too
        patch.setattr(left_over, "_has_launcher", lambda: False)
        assert left_over.unknown(TORCHRUN, launched=False)
    monkeypatch.setattr(left_over, "_has_launcher", lambda: True)
    assert left_over.unknown(RANK_0, launched=False) and not left_over.unknown(RANK_0, launched=True)
    assert not left_over.unknown({}, launched=False) and not left_over.unknown(TORCHRUN, launched=False)
    assert not left_over.unknown({**RANK_0, "OMPI_COMM_WORLD_SIZE": "4"}, launched=False)
    assert not left_over.unknown({**RANK_0, "SLURM_STEP_NUM_TASKS": "4"}, launched=False)
    assert left_over.unknown({**RANK_0, "SLURM_STEP_NUM_TASKS": "1"}, launched=False)


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said before it is waited for, and ends in a sentence; in life after 30 s."""
    monkeypatch.setattr(left_over, "MEET", 1.0)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {**RANK_0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    if torch.distributed.is_initialized():
        pytest.skip("a process group is there already")
    expected = (
        "RANK=0 and WORLD_SIZE=4 are set in this shell, but the other ranks have not come .*: `unset RANK LOCAL_R"
    )
    with pytest.raises(ValueError, match=expected):
        select.start(Launch("ddp", 0, 0, 4, 4, "fp32", True))
    assert re.match("shardrun: RANK=0 and WORLD_SIZE=4 .*waiting 1 s for the other ranks", capsys.readouterr().err)


def test_accelerates_own_variables_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    left_over.name(["ACCELERATE_DYNAMO_BACKEND"], {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    left_over.name([], {})
    said = capsys.readouterr().err
    assert said == "shardrun: of this shell's variables this run goes by ACCELERATE_DYNAMO_BACKEND=INDUCTOR.\n"
