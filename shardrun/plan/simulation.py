"""`shardrun plan --simulate`: rank r of N on this machine, the libraries' own engines on tensors without data.

Where plan's formulas add up what does not reach its height at one moment, this gives the exact peak, what was alive at
it and who allocated it, for the same run: its device, kernels, attention functions, precision and torch's version. The
log is played through a model of the GPU's allocator too. It loads torch and takes seconds for each strategy.
"""

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from shardrun.answers import json_answer
from shardrun.plan.estimates import Planned, fullest, inputs, kernels_for, kernels_line, planned
from shardrun.tables import mib, paragraph, table, wrapped
from speedrun.books.shapes import scenario_of
from speedrun.config import Config, Kernels
from speedrun.stages import number_of_steps
from strategies import catalogue
from strategies.errors import UserError
from strategies.forecast.predict import predict_memory
from strategies.ledger.hardware import Gpu, find_gpu
from strategies.ledger.terms import MODEL_STATES

if TYPE_CHECKING:
    from strategies.base import Precision
    from strategies.ledger.allocator import Moment
    from strategies.ledger.replay import Replay

MIB = 2**20

HEADINGS = {
    "parameters": "params",
    "master parameters": "masters",
    "gradients": "grads",
    "optimizer states": "optim",
    "activations": "activ.",
    "communication buffers": "buffers",
    "other": "other",
}
"""Category → heading."""

NOT_SIMULATED = (
    "Not simulated, because fake tensors cannot go there: torch.compile, offload to CPU or NVMe. Stood in for: "
    "attention functions but torch's own, and what the fused loss and FP8 hold inside. Not in the figures: what other "
    "kernels allocate for themselves, the CUDA context, NCCL's buffers. Allocated and reserved: by a model of torch's "
    "caching allocator, cuBLAS's workspaces among it (benchmarks/gpu_books.md compares it with a GPU)."
)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A strategy's rank; `replay` is None where `refused` says why it could not be."""

    planned: Planned
    strategy: str
    replay: "Replay | None"
    refused: str
    seconds: float
    allocated: "dict[str, Moment]"
    """What a GPU's allocator says at the moments of `replay`; nothing on a CPU."""


def run(config: Config, gpu: Gpu, arguments: argparse.Namespace) -> int:
    """Simulate the strategies and print. Raises ValueError for a strategy that there is not."""
    fitting = catalogue.spread(arguments.world)
    names = arguments.strategies.split(",") if arguments.strategies else list(fitting)
    for name in names:
        if name not in fitting:
            there_are = f"on {arguments.world} ranks there are {', '.join(fitting)}"
            raise UserError(f"there is no strategy {name!r} to simulate; {there_are}.")
    stages = planned(config, arguments, arguments.world, kernels=kernels_for(config, gpu, arguments))
    simulated = []
    for name in names:
        stage, _, _ = fullest(stages, name, arguments.world, arguments.precision)
        simulated.append(simulate_one(stage, name, arguments.rank, arguments.world, arguments.precision))
    said = advice(simulated, gpu)
    if arguments.json:
        content = {"rank": arguments.rank, "world_size": arguments.world, "not_simulated": NOT_SIMULATED}
        rows = [_row(s) for s in simulated]
        told = {**inputs(config, gpu, arguments), "rank": arguments.rank}
        print(json_answer("plan", told, said, [NOT_SIMULATED], **content, strategies=rows))
        return 0
    for line in said:
        paragraph(line)
    print()
    _print(simulated, gpu, arguments)
    return 0


def advice(simulated: list[Simulated], gpu: Gpu) -> list[str]:
    """Which fit, and which holds least."""
    held = {s.strategy: s.allocated["peak"].allocated for s in simulated if s.replay and s.allocated}
    if not held:
        return ["Nothing was simulated."]
    fitting = [name for name, size in held.items() if size <= gpu.memory]
    least = min(held, key=held.__getitem__)
    said = f"Of what torch allocates, {', '.join(fitting) or 'nothing'} fits; {least} holds least."
    return [said]


def simulate_one(planned: Planned, name: str, rank: int, world_size: int, precision: "Precision") -> Simulated:
    """One strategy, as the trainer runs it: two steps of this model, optimizer and micro-batch on the plan's device."""
    from speedrun.books.stand_ins import stand_ins
    from speedrun.model import GPT
    from speedrun.optim.policy import parameter_groups
    from speedrun.optim.schedule import forward_options
    from strategies.forecast.simulate import simulate
    from strategies.ledger.allocator import allocated

    config, batches, kernels = planned.config, planned.batches, planned.kernels
    chosen: Kernels = "triton" if kernels.triton else "torch"
    model = dataclasses.replace(config.model, kernels=chosen, attention=kernels.asked)
    optimizer = config.optimizer
    if optimizer.orthogonalization_dtype == "auto":  # as on the GPUs of the plan, not as on this host
        optimizer = dataclasses.replace(optimizer, orthogonalization_dtype="bfloat16")
    books = scenario_of(config, name, world_size, precision, batches.accumulation)
    started = time.perf_counter()
    replay, refused, moments = None, "", {}
    try:
        replay = simulate(
            name,
            rank,
            world_size,
            lambda: GPT(model, document_start=0),
            parameter_groups(books.shapes, optimizer, chosen),
            (batches.micro_batch, config.data.sequence_length),
            clip=config.optimizer.clip,
            accumulation=batches.accumulation,
            precision=precision,
            engine=books.engine,
            emulate_gloo=not kernels.cuda,
            options=forward_options(config, 0, number_of_steps(config)),
            stand_ins=stand_ins(kernels) if kernels.cuda else None,
            version=kernels.where.torch,
        )
        if kernels.cuda:
            moments = allocated(replay.events, 1, kernels.where.capability)
    except ValueError as error:  # DeepSpeed is not installed here, or does not do this
        refused = str(error)
    return Simulated(planned, name, replay, refused, time.perf_counter() - started, moments)


def model_states(config: Config, name: str, arguments: argparse.Namespace) -> int | None:
    """Bytes of model states just before a step in bf16, on the rank that should hold most; None if not simulated."""
    ranks = predict_memory(scenario_of(config, name, arguments.world, "bf16", 1))
    held = [sum(rank["after backward"][category] for category in MODEL_STATES) for rank in ranks]
    kernels = kernels_for(config, find_gpu(arguments.gpu), arguments)
    first = planned(config, arguments, arguments.world, kernels=kernels)[0]
    rows = first.batches.micro_batch * arguments.world
    one = dataclasses.replace(first, stage=dataclasses.replace(first.stage, global_batch=rows, micro_batch=0))
    replay = simulate_one(one, name, held.index(max(held)), arguments.world, "bf16").replay
    if replay is None:
        return None
    return sum(replay.moments["after backward"].get(category, 0) for category in MODEL_STATES)


def _row(simulated: Simulated) -> dict[str, Any]:
    row: dict[str, Any] = {"strategy": simulated.strategy, **simulated.planned.as_dict(), "seconds": simulated.seconds}
    if simulated.replay is None:
        return {**row, "refused": simulated.refused}
    replay = simulated.replay
    collectives = [{"collective": k, "calls": v[0], "payload_bytes": v[1]} for k, v in replay.collectives.items()]
    allocator = {moment: dataclasses.asdict(figures) for moment, figures in simulated.allocated.items()}
    largest = [{"what": what, "bytes": size} for what, size in replay.largest]
    books = {"moments": replay.moments, "allocator": allocator}
    return {**row, **books, "largest_at_the_peak": largest, "collectives": collectives}


def _print(simulated: list[Simulated], gpu: Gpu, arguments: argparse.Namespace) -> None:
    paragraph(
        f"Rank {arguments.rank} of {arguments.world}, simulated in {arguments.precision}: the engines' own code on "
        "tensors without data."
    )
    for line in dict.fromkeys(kernels_line(s.planned) for s in simulated):
        paragraph(line)
    print()
    rows = []
    for s in simulated:
        if s.replay:
            most = s.allocated["peak"]
            fits = "yes" if most.reserved <= gpu.memory else "no"
            held = [mib(s.replay.peak.get(category, 0), 1) for category in HEADINGS]
            rows.append(
                [s.strategy, *held, mib(s.replay.peak_total, 1), mib(most.allocated, 1), mib(most.reserved, 1), fits]
            )
    headings = ["", *HEADINGS.values(), "total", "alloc.", "reserved", "fits"]
    table("The peak of forward and backward (MiB)", headings, rows)
    for s in simulated:
        if s.replay is None:
            wrapped(f"{s.strategy}:", s.refused)
            continue
        paragraph(f"{s.strategy}, {s.planned}")
        paragraph(f"At its peak: who allocated what was alive, in MiB (simulated in {s.seconds:.1f} s)")
        for what, size in s.replay.largest[: arguments.largest]:
            wrapped(f"{mib(size, 1):>10} ", what)
        sent = (f"{name} ×{calls} {mib(size, 1)} MiB" for name, (calls, size) in s.replay.collectives.items())
        wrapped("sends per step:", ", ".join(sent) or "nothing")
        print()
    wrapped("", NOT_SIMULATED)
