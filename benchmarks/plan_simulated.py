"""How far `shardrun plan` is from `shardrun plan --simulate`: strategies, accumulation, checkpointing, three models.

    python -m benchmarks.plan_simulated            # what is missing in benchmarks/plan_simulated.json, then the table
    python -m benchmarks.plan_simulated --table    # the table alone, with plan's figures of today's code

Needs no GPU. A row takes some seconds. Of both it is the rank that holds most by plan: gradients and padding differ.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shardrun import plan
from shardrun.plan.estimates import OTHER, Planned, configure, fullest, kernels_for, planned
from shardrun.plan.simulation import simulate_one
from speedrun.books.shapes import scenario_of
from strategies import catalogue, strict_json
from strategies.ledger.hardware import find_gpu

RESULTS = Path("benchmarks/plan_simulated.json")
TABLE = Path("benchmarks/plan_simulated.md")
MODELS = {
    "gpt2": ("gpt2", "--layers", "3", "--micro-batch", "8"),
    "modern": ("modern", "--layers", "3", "--vocab", "16384", "--micro-batch", "4"),
    "wide": ("--layers", "2", "--width", "2048", "--vocab", "16384", "--optimizer", "adamw", "--micro-batch", "2"),
}
"""Name → words for plan, on 8 H100 in bf16: GPT-2's block, this project's with Muon, and one of 50M parameters. A few
blocks each: what one more adds is the same for both. With --accumulation they are micro-batches of that size."""
WITHIN = 0.03
MIB = 2**20


class Case(NamedTuple):
    model: str
    accumulation: int
    checkpointing: str
    strategy: str

    @property
    def key(self) -> str:
        return ", ".join(map(str, self))


def cases() -> Iterator[Case]:
    for each in itertools.product(MODELS, (1, 4), ("none", "block"), catalogue.spread(8)):
        yield Case(*each)


def stage_of(case: Case) -> tuple[Planned, dict[str, int]]:
    """The stage that is planned, and plan's bytes by category."""
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    words = (*MODELS[case.model], "--accumulation", str(case.accumulation), "--checkpointing", case.checkpointing)
    arguments = parser.parse_args([*words, "--torch", "2.11"])
    config = configure(arguments)
    kernels = kernels_for(config, find_gpu(arguments.gpu), arguments)
    stage, _, memory = fullest(planned(config, arguments, 8, kernels), case.strategy, 8, "bf16")
    return stage, memory


def rank_of(case: Case) -> int:
    """The rank that holds most by plan."""
    stage = stage_of(case)[0]
    books = scenario_of(stage.config, case.strategy, 8, "bf16", stage.batches.accumulation)
    peaks = [sum(held.values()) for held in stage.forward_pass.predict_peak(books)]
    return peaks.index(max(peaks))


def simulated(case: Case) -> dict[str, Any]:
    """Bytes of tensors at the peak, and what the allocator has then."""
    found = simulate_one(stage_of(case)[0], case.strategy, rank_of(case), 8, "bf16")
    assert found.replay is not None, found.refused
    peak = found.allocated["peak"]
    return {"tensors": found.replay.peak_total, "allocated": peak.allocated, "reserved": peak.reserved}


def off(case: Case, results: dict[str, Any]) -> tuple[float, float]:
    """How far plan is off, as shares: of the tensors, and with its overhead of what is allocated."""
    _, memory = stage_of(case)
    found, tensors = results[case.key], tensors_of(memory)
    return tensors / found["tensors"] - 1, (tensors + memory["overhead"]) / found["allocated"] - 1


def tensors_of(memory: dict[str, int]) -> int:
    """Plan's bytes without what lies beside the tensors."""
    return sum(bytes for category, bytes in memory.items() if category not in OTHER)


def render(results: dict[str, Any]) -> str:
    lines = [
        "# Plan against its simulation\n",
        "`python -m benchmarks.plan_simulated`. 8 H100 in bf16, torch 2.11. Models: see the script.",
        "Simulated: the engine's own code on tensors without data. MiB of all tensors at the peak of a step's",
        "passes, and how far plan is off. Allocated: with the allocator's rounding and cuBLAS's workspaces.",
        "Plan adds those as its overhead.\n",
        "| model | micro-batches | checkpointing | strategy | plan | simulated | off | allocated | off |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    worst = [0.0, 0.0]
    for case in cases():
        if case.key not in results:
            continue
        _, memory = stage_of(case)
        found, apart = results[case.key], off(case, results)
        worst = [max(pair, key=abs) for pair in zip(worst, apart, strict=True)]
        lines.append(
            f"| {case.model} | {case.accumulation} | {case.checkpointing} | {case.strategy} | "
            f"{tensors_of(memory) / MIB:,.1f} | "
            f"{found['tensors'] / MIB:,.1f} | {apart[0]:+.2%} | {found['allocated'] / MIB:,.1f} | {apart[1]:+.2%} |"
        )
    missing = sum(case.key not in results for case in cases())
    if missing:
        lines.append(f"\nNot simulated yet: {missing} of {len(results) + missing} rows.")
    lines.append(f"\nFarthest off: {worst[0]:+.2%} of the tensors, {worst[1]:+.2%} of what is allocated.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="simulate nothing")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in [] if arguments.table else [case for case in cases() if case.key not in results]:
        results[case.key] = simulated(case)
        print(f"{case.key}: {off(case, results)[0]:+.2%}", flush=True)
        RESULTS.write_text(strict_json.dumps(results, indent=1) + "\n")
    TABLE.write_text(render(results))


if __name__ == "__main__":
    main()
