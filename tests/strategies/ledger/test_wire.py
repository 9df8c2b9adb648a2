"""The meter sees every collective, and what is predicted without ranks. (Both against each other: test_books.py.)"""

import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shardrun.certify.equivalence import Case
from strategies.forecast.traffic import explain_volume, paper_volumes, predict_traffic
from strategies.ledger.terms import Group, Scenario, ring_bytes
from strategies.ledger.wire import Meter, SentLine
from tests.ranks import RankPool
from tests.strategies.ledger.test_books import STRATEGIES, Setting
from tests.strategies.small import forward_backward, make, prepared

# The meter itself.


def every_collective() -> dict[str, tuple[list[SentLine], list[tuple[str, str, int, int]]]]:
    """On each of three ranks: what the meter saw of a call, and (collective, purpose, calls, payload) by hand."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def coalesced() -> None:
        for gathered in functional.all_gather_into_tensor_coalesced([zeros(4), zeros(5)], group):
            functional.wait_tensor(gathered)

    def sharded_sum() -> None:
        distribute_tensor(zeros(6, 5), mesh, [Shard(0)]).full_tensor()

    def next_door() -> None:
        send, receive = (
            dist.P2POp(dist.isend, zeros(11), (rank + 1) % 3),
            dist.P2POp(dist.irecv, zeros(11), (rank - 1) % 3),
        )
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    def in_a_thread() -> None:
        thread = threading.Thread(target=lambda: dist.all_reduce(zeros(3)))
        thread.start()
        thread.join()

    def in_backward() -> None:
        weight = zeros(4).requires_grad_()
        weight.register_hook(lambda gradient: dist.all_reduce(gradient))
        weight.sum().backward()

    def without_autograd() -> None:
        with torch.inference_mode():
            dist.all_reduce(zeros(3))

    mesh = init_device_mesh("cpu", (3,))
    alone = dist.new_group([rank], use_local_synchronization=True)
    pair = dist.new_group([0, 1])
    splits = [1, 2, 3]  # rows to rank 0, 1, 2
    half = torch.bfloat16
    calls: dict[str, tuple[Callable[[], Any], list[tuple[str, str, int, int]]]] = {
        "all_reduce": (lambda: dist.all_reduce(zeros(5, 2)), [("all_reduce", "payload", 1, 40)]),
        "asynchronous": (
            lambda: dist.all_reduce(zeros(5), async_op=True).wait(),
            [("all_reduce", "payload", 1, 20)],
        ),
        "a norm": (lambda: dist.all_reduce(zeros()), [("all_reduce", "bookkeeping", 1, 4)]),
        "a barrier": (dist.barrier, [("barrier", "bookkeeping", 1, 0)]),
        "integers": (
            lambda: dist.broadcast(zeros(9, dtype=torch.int64), 0),
            [("broadcast", "bookkeeping", 1, 72)],
        ),
        "broadcast": (lambda: dist.broadcast(zeros(7), 1), [("broadcast", "payload", 1, 28)]),
        "reduce": (lambda: dist.reduce(zeros(7), 1), [("reduce", "payload", 1, 28)]),
        "all_gather": (
            lambda: dist.all_gather([zeros(4, dtype=half) for _ in range(3)], zeros(4, dtype=half)),
            [("all_gather", "payload", 1, 24)],
        ),
        "all_gather_into_tensor": (
            lambda: dist.all_gather_into_tensor(zeros(12), zeros(4)),
            [("all_gather", "payload", 1, 48)],
        ),
        "reduce_scatter": (
            lambda: dist.reduce_scatter(zeros(rank + 1), [zeros(1), zeros(2), zeros(3)]),
            [("reduce_scatter", "payload", 1, 24)],
        ),
        "reduce_scatter_tensor": (
            lambda: dist.reduce_scatter_tensor(zeros(4), zeros(12)),
            [("reduce_scatter", "payload", 1, 48)],
        ),
        "all_to_all_single": (
            lambda: dist.all_to_all_single(zeros(3 * (rank + 1), 2), zeros(6, 2), [rank + 1] * 3, splits),
            [("all_to_all", "payload", 1, 8 * (6 - splits[rank]))],
        ),
        "all_to_all_single, equal": (
            lambda: dist.all_to_all_single(zeros(6, 2), zeros(6, 2)),
            [("all_to_all", "payload", 1, 32)],
        ),
        "gather": (
            lambda: dist.gather(zeros(3), [zeros(3) for _ in range(3)] if rank == 1 else None, dst=1),
            [("gather", "payload", 1, 0 if rank == 1 else 12)],
        ),
        "scatter": (
            lambda: dist.scatter(zeros(3), [zeros(3) for _ in range(3)] if rank == 1 else None, src=1),
            [("scatter", "payload", 1, 24 if rank == 1 else 0)],
        ),
        "send and receive": (next_door, [("send", "payload", 1, 44), ("recv", "payload", 1, 0)]),
        "coalesced": (coalesced, [("all_gather", "payload", 1, 108)]),
        "functional": (
            lambda: functional.wait_tensor(functional.all_gather_tensor(zeros(4), 0, group)),
            [("all_gather", "payload", 1, 48)],
        ),
        "DTensor": (
            sharded_sum,
            [("scatter", "payload", 1, 80 if rank == 0 else 0), ("all_gather", "payload", 1, 120)],
        ),
        "another thread": (in_a_thread, [("all_reduce", "payload", 1, 12)]),
        "a hook of backward": (in_backward, [("all_reduce", "payload", 1, 16)]),
        "inference mode": (without_autograd, [("all_reduce", "payload", 1, 12)]),
        "alone in a group": (lambda: dist.all_reduce(zeros(5), group=alone), []),
        "a pair": (
            lambda: dist.all_reduce(zeros(5), group=pair) if rank < 2 else None,
            [("all_reduce", "payload", 1, 20)] if rank < 2 else [],
        ),
    }
    seen = {}
    for name, (call, expected) in calls.items():
        with Meter() as meter:
            call()
        dist.all_reduce(zeros(3))  # no longer seen
        seen[name] = meter.lines(), expected
    return seen


@pytest.mark.ranks
def test_the_meter_sees_every_kind_of_collective_and_its_payload(ranks: RankPool) -> None:
    for seen in ranks.run(3, every_collective):
        for name, (lines, expected) in seen.items():
            assert sorted((x.collective, x.purpose, x.calls, x.payload_bytes) for x in lines) == sorted(expected), name
        assert seen["all_reduce"][0][0].ring_bytes == pytest.approx(40 * 2 * 2 / 3)
        assert all(line.ring_bytes == 20 for line in seen["a pair"][0])  # 2 · (2−1)/2: the group's size counts


def logged_by_deepspeed(stage: int) -> tuple[dict[str, int], dict[str, int]]:
    """On a rank: bytes by collective of a step, as DeepSpeed's own logger counts them and as the meter does."""
    from deepspeed.comm import comm

    logger = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}
    strategy = prepared(make(f"zero{stage}", "bf16", logger), Case(optimizer="adamw", accumulation=2))
    try:
        for step in range(2):
            comm.comms_logger.reset_data()
            with Meter() as meter:
                for i in range(2):
                    forward_backward(strategy, step, last=i == 1)
                strategy.step()
        logged = {
            name: sum(size * record[0] for size, record in sizes.items())
            for name, sizes in comm.comms_logger.comms_dict.items()
        }
    finally:
        comm.comms_logger.enabled = False
    metered: dict[str, int] = {}
    for line in meter.lines():
        metered[line.collective] = metered.get(line.collective, 0) + line.payload_bytes
    return logged, metered


@pytest.mark.ranks
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_meter_agrees_with_deepspeeds_own_logger(ranks: RankPool, stage: int) -> None:
    pytest.importorskip("deepspeed")
    for logged, metered in ranks.run(3, logged_by_deepspeed, stage):
        # It files an all-gather under the size of its input, which is this rank's third of the output.
        logged["all_gather"] = 3 * logged.pop("all_gather_into_tensor")
        if stage == 3:
            logged["reduce_scatter"] = logged.pop("reduce_scatter_tensor")
        assert logged == metered and min(metered.values()) > 0


def several_meters() -> list[list[int]]:
    """On a rank: what three meters see, the second inside the first, the third begun in the second and ended after."""
    outer, inner, later = Meter(), Meter(), Meter()
    with outer:
        dist.all_reduce(torch.zeros(1))
        with inner:
            dist.all_reduce(torch.zeros(2))
            later.__enter__()
        dist.all_reduce(torch.zeros(3))
    dist.all_reduce(torch.zeros(4))
    later.__exit__()
    dist.all_reduce(torch.zeros(5))
    return [[sent.payload_bytes for sent in meter.sent] for meter in (outer, inner, later)]


@pytest.mark.ranks
def test_of_several_meters_each_sees_what_is_sent_while_it_is_open(ranks: RankPool) -> None:
    assert ranks.run(2, several_meters) == 2 * [[[4, 8, 12], [8], [12, 16]]]


def ddp_by_hand() -> list[SentLine]:
    """On a rank: DistributedDataParallel without anything of `strategies`, 6 MiB in two buckets, its third step."""
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(6)))
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        with Meter() as meter:
            with ddp.no_sync():
                ddp(torch.ones(1, 512)).sum().backward()
            ddp(torch.ones(1, 512)).sum().backward()
    return meter.lines()


@pytest.mark.ranks
def test_ddp_against_arithmetic(ranks: RankPool) -> None:
    """One all-reduce of the model in spite of two backward passes; the first bucket is full at 1 MiB: one matrix."""
    shapes = {f"{i}.weight": (512, 512) for i in range(6)}
    run = Scenario("ddp", shapes, [Group("all", tuple(shapes), False)], 2, "fp32", 2)
    predicted = predict_traffic(run)
    assert [(e.calls, e.payload_bytes) for e in predicted if e.purpose == "gradients"] == [(2, 6 * 2**20)]
    for lines in ranks.run(2, ddp_by_hand):
        (line,) = lines
        assert (line.collective, line.calls, line.payload_bytes) == ("all_reduce", 2, 6 * 2**20)


# The prediction alone.


def volumes(name: str, optimizer: str = "adamw", accumulation: int = 1, **zero: Any) -> dict[str, float]:
    case = Case(optimizer=optimizer, accumulation=accumulation)
    run = Setting(name, case, "bf16", {}, zero).run(3)
    return paper_volumes(predict_traffic(run, 1), run.parameters)


def test_volumes_are_the_papers_or_explained() -> None:
    """ZeRO paper (arXiv 1910.02054), section 7: 2Ψ for data parallelism and for stages 1 and 2, 3Ψ for stage 3."""
    assert volumes("ddp")["total"] == 2
    # A reduce-scatter and an all-gather are an all-reduce, but for places that stay empty: matrices of one size travel
    # together, with as many places for each rank.
    run = Setting("ddp", Case(optimizer="muon"), "bf16").run(3)
    groups = [group.parameters for group in run.matrix_groups]
    empty = 0
    for names in ([name for group in groups for name in group], *groups):  # gradients; then updates, group by group
        for numel, matrices in Counter(math.prod(run.shapes[name]) for name in names).items():
            empty += -matrices % 3 * numel
    assert empty > 0 and volumes("ddp", "muon")["total"] == pytest.approx(2 + empty / run.parameters)
    # DeepSpeed's stages 1 and 2 all-reduce where the paper reduce-scatters, and can be told to reduce instead.
    for name in ("zero1", "zero2"):
        assert volumes(name) == {"gradients": 2, "parameters": 1, "total": 3}
        assert volumes(name, use_multi_rank_bucket_allreduce=False)["total"] == 2
    assert volumes("zero1", accumulation=4)["gradients"] == 2 and volumes("zero2", accumulation=4)["gradients"] == 8
    # Stage 3 gathers twice once it may not keep what it gathered; so does FSDP2, but for what the root holds.
    assert volumes("zero3", stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)["total"] == 3
    assert volumes("zero3") == {"parameters": 1, "gradients": 1, "total": 2}
    root = 2 * 257 * 48 / 62496
    assert volumes("fsdp")["total"] == pytest.approx(3 - root)
    assert volumes("fsdp_no_reshard")["total"] == pytest.approx(2)
    assert "updates" not in volumes("fsdp") and 0 < volumes("fsdp", "muon")["updates"] < 2 / 3
    for name in STRATEGIES:
        text = explain_volume(Setting(name, Case(), "bf16").run(3))
        assert "Ψ" in text or "FSDP2" in text


def test_a_trillion_parameters_on_a_thousand_ranks() -> None:
    """Stage 3 at a size where its limits bind: 3Ψ without the last modules, which backward uses again at once."""
    shapes = {}
    for i in range(128):
        for part in ("q", "k", "v", "out"):
            shapes[f"blocks.{i}.attention.{part}.weight"] = (25600, 25600)
        shapes |= {f"blocks.{i}.mlp.up.weight": (102400, 25600), f"blocks.{i}.mlp.down.weight": (25600, 102400)}
    run = Scenario(
        "zero3", shapes, [Group("all", tuple(shapes), False)], 1024, "bf16", engine={"zero_optimization": {}}
    )
    assert run.parameters > 10**12
    total = paper_volumes(predict_traffic(run), run.parameters)["total"]
    assert 2.99 < total < 3


def test_one_rank_sends_nothing() -> None:
    assert predict_traffic(Setting("zero3", Case(), "bf16").run(1)) == []


def test_rings() -> None:
    assert ring_bytes("all_reduce", 800, 8) == 1400 == 2 * ring_bytes("reduce_scatter", 800, 8)
    assert ring_bytes("all_to_all", 800, 8) == 800


def test_the_prediction_does_not_import_torch() -> None:
    program = "import sys, strategies.forecast.traffic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
