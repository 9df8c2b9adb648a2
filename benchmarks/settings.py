"""Every setting that changes memory or traffic, over its values: is it predicted to the byte?

    python -m benchmarks.settings [--out benchmarks/settings.md]

Every value of every key of DeepSpeed's JSON and of FSDP2's section that the books follow: alone, with and without
accumulation, in fp32 and bf16; and with every value of every other key, in two of these four ways, in turn. Muon and
AdamW take turns too. Two ranks (four where FSDP2's groups between the passes need them) take three steps, and of the
last one every line is compared: what each rank holds at four moments, and what it sends. A small GPT on the CPU; some
ten minutes.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardrun.certify.equivalence import Case
from speedrun.books.shapes import scenario_of
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from strategies import catalogue, strict_json
from strategies.base import Precision, Settings
from strategies.forecast.predict import predict_after_forward, predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.memory import measure
from strategies.ledger.terms import CATEGORIES, STATE_MOMENTS, Scenario
from strategies.ledger.wire import Meter
from strategies.mesh import Place

ZERO = "zero_optimization."
BOTH_DTYPES = ("fp32", "bf16")
ALL_STAGES: dict[str, tuple[Any, ...]] = {
    ZERO + "reduce_bucket_size": (5000,),
    ZERO + "contiguous_gradients": (False,),
    ZERO + "reduce_scatter": (False,),
    "communication_data_type": (*BOTH_DTYPES, "fp16"),
    "data_types.grad_accum_dtype": ("fp32",),
}
FLAT = ALL_STAGES | {
    ZERO + "overlap_comm": (True,),
    ZERO + "use_multi_rank_bucket_allreduce": (False,),
    ZERO + "round_robin_gradients": (True,),
    ZERO + "parameter_alignment": (True,),
    "bf16.check_grad_overflow": (False,),
}
KEYS: dict[str, dict[str, tuple[Any, ...]]] = {
    "zero1": FLAT,
    "zero2": FLAT,
    "zero3": ALL_STAGES
    | {
        ZERO + "sub_group_size": (0, 3000),
        ZERO + "stage3_max_live_parameters": (0, 15000),
        ZERO + "stage3_max_reuse_distance": (0, 5000),
        ZERO + "stage3_prefetch_bucket_size": (0, 3000),
        ZERO + "stage3_param_persistence_threshold": (2304,),
        ZERO + "stage3_allgather_sequential": (True,),
        ZERO + "stage3_use_all_reduce_for_fetch_params": (True,),
        ZERO + "enable_sanity_checks": (True,),
    },
    "fsdp": {"reshard_after_forward": (False, 1, 2), "wrap": ((), ("MLP",), ("Block", "MLP"), ("Attention", "Head"))},
    "hsdp": {"reshard_after_forward": (False, 1), "wrap": ((), ("Block", "MLP"))},
}
"""Strategy → key → its values beside the one that counts where nothing is said."""

RANKS = {"fsdp": 4, "hsdp": 4}
"""The others take two."""

STEPS = 3
"""In the second one DeepSpeed still records the order of modules."""


@dataclass(frozen=True)
class Run:
    """A run and its settings: (dotted key, value)."""

    strategy: str
    settings: tuple[tuple[str, Any], ...]
    accumulation: int
    precision: Precision
    optimizer: str

    @property
    def case(self) -> Case:
        return Case(optimizer=self.optimizer, accumulation=self.accumulation)

    def engine(self, world_size: int) -> dict[str, Any]:
        """As in strategies.base.Settings."""
        engine = catalogue.books(self.strategy).default_engine(world_size)
        for key, value in self.settings:
            section, _, name = key.rpartition(".")
            (engine.setdefault(section, {}) if section else engine)[name] = value
        return engine

    def scenario(self, world_size: int) -> Scenario:
        about = (world_size, self.precision, self.accumulation)
        return scenario_of(self.case.config(), self.strategy, *about, engine=self.engine(world_size))


Lines = dict[str, tuple[int, ...]]
"""A line of the books → its bytes; of what is sent, the calls too."""


def predicted(run: Run, rank: int, world_size: int) -> Lines:
    """Of a rank, from settings alone."""
    scenario = run.scenario(world_size)
    memory = {**predict_memory(scenario)[rank], "after forward": predict_after_forward(scenario)[rank]}
    sent: dict[str, tuple[int, ...]] = {}
    for entry in predict_traffic(scenario, rank):
        _add(sent, entry.collective, entry.purpose, entry.axis, entry.calls, entry.payload_bytes)
    return _lines(memory, sent)


def measured(run: Run) -> Lines:
    """On a rank. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = run.case.config()
    model = GPT(config.model, document_start=256)
    model.init_weights(config.seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    place = Place(rank, world_size, torch.device("cpu"))
    strategy = catalogue.engine(run.strategy, Settings(place, run.precision, run.engine(world_size)))
    strategy.prepare(
        model, parameter_groups(shapes, config.optimizer), clip=config.optimizer.clip, accumulation=run.accumulation
    )
    held = {"after prepare": measure(strategy.held())}
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    for _ in range(STEPS):
        with Meter(strategy.axes) as meter:
            for i in range(run.accumulation):
                with strategy.micro_batch(last=i == run.accumulation - 1):
                    loss = strategy.model(tokens, tokens)
                    held["after forward"] = measure(strategy.held())
                    strategy.backward(loss)
            held["after backward"] = measure(strategy.held())
            strategy.step()
        held["after step"] = measure(strategy.held())
    sent: dict[str, tuple[int, ...]] = {}
    for line in meter.lines():
        _add(sent, line.collective, line.purpose, line.axis, line.calls, line.payload_bytes)
    return _lines(held, sent)


def _add(sent: dict[str, tuple[int, ...]], collective: str, purpose: str, axis: str, calls: int, payload: int) -> None:
    name = f"{collective} along {axis}{', bookkeeping' if purpose == 'bookkeeping' else ''}"
    before = sent.get(name, (0, 0))
    sent[name] = (before[0] + calls, before[1] + payload)


def _lines(memory: Mapping[str, Mapping[str, int]], sent: dict[str, tuple[int, ...]]) -> Lines:
    moments = itertools.product((*STATE_MOMENTS, "after forward"), CATEGORIES)
    return {f"{moment}, {category}": (memory[moment].get(category, 0),) for moment, category in moments} | sent


def differences(run: Run, rank: int, world_size: int, found: Lines) -> tuple[int, list[str]]:
    """How many lines were compared, and a sentence about each that is not as predicted; those that are not predicted
    left out. found: `measured`.
    """
    unknown = catalogue.books(run.strategy).not_predicted(run.scenario(world_size))
    expected = predicted(run, rank, world_size)
    names = [
        name
        for name in dict.fromkeys([*expected, *found])
        if name.rpartition(", ")[2] not in unknown and name.partition(" along ")[0] not in unknown
    ]
    return len(names), [
        f"rank {rank}, {name}: predicted {expected.get(name)}, measured {found.get(name)}, {run}"
        for name in names
        if expected.get(name) != found.get(name)
    ]


def alone(strategy: str) -> list[tuple[tuple[str, Any], ...]]:
    """Every value of every key, by itself."""
    return [((key, value),) for key, values in KEYS[strategy].items() for value in values]


def product(strategy: str) -> list[Run]:
    """All runs of a strategy: nothing said, every value alone, every two values of two keys together."""
    single = alone(strategy)
    pairs = [a + b for a, b in itertools.combinations(single, 2) if a[0][0] != b[0][0]]
    runs: list[Run] = []
    for settings in [(), *single, *pairs]:
        ways = list(itertools.product((1, 2), BOTH_DTYPES))
        if len(settings) == 2:
            ways = ways[::3] if len(runs) // 2 % 2 else ways[1:3]
        for accumulation, precision in ways:
            optimizer = ("muon", "adamw")[(len(runs) // 4 + len(runs)) % 2]
            run = Run(strategy, settings, accumulation, precision, optimizer)  # type: ignore[arg-type]
            if not catalogue.books(strategy).not_predicted(run.scenario(RANKS.get(strategy, 2))):
                runs.append(run)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    parser.add_argument("--strategies", nargs="+", default=list(KEYS), choices=list(KEYS), help="only these")
    parser.add_argument("--as-a-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_a_rank:
        measure_all(arguments.strategies[0], arguments.as_a_rank)
        return
    table: list[str] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for strategy in arguments.strategies:
            rows, differing = compared(strategy, Path(folder))
            table += rows
            wrong += differing
            print(f"{strategy}: {len(differing)} lines differ", flush=True)
    arguments.out.write_text(report(table, wrong), encoding="utf-8")
    print("\n".join(wrong[:40]))


def measure_all(strategy: str, folder: Path) -> None:
    """On a rank: all runs of a strategy, one after the other."""
    dist.init_process_group("gloo")
    linear = torch.nn.functional.linear
    lines = []
    for run in product(strategy):
        lines.append(measured(run))
        torch.nn.functional.linear = linear  # ZeRO-3 replaces it for the whole process
    (folder / f"{strategy}_{dist.get_rank()}.json").write_text(strict_json.dumps(lines), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # past engines that wait for one another


def compared(strategy: str, folder: Path) -> tuple[list[str], list[str]]:
    """A strategy's rows of the table, and a sentence for each line that differs."""
    world_size, runs = RANKS.get(strategy, 2), product(strategy)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command = [*torchrun, "-m", "benchmarks.settings", "--strategies", strategy, "--as-a-rank", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    counts: dict[str, list[int]] = {}
    wrong: list[str] = []
    for rank in range(world_size):
        found = json.loads((folder / f"{strategy}_{rank}.json").read_text(encoding="utf-8"))
        for run, lines in zip(runs, found, strict=True):
            number, differing = differences(run, rank, world_size, {key: tuple(line) for key, line in lines.items()})
            wrong += differing
            for name in map(_shown, run.settings) if run.settings else ("nothing said",):
                row = counts.setdefault(name, [0, 0, 0])
                row[0] += not rank
                row[1] += number
                row[2] += number - len(differing)
    rows = [
        f"| {strategy} | {name} | {number:,} | {lines:,} | {equal:,} |"
        for name, (number, lines, equal) in counts.items()
    ]
    return rows, wrong


def _shown(setting: tuple[str, Any]) -> str:
    key, value = setting
    return f"`{key.removeprefix(ZERO)}: {strict_json.dumps(value)}`"


def report(rows: list[str], wrong: list[str]) -> str:
    """Markdown. rows: of `compared`; wrong: its sentences."""
    return "\n".join(
        [
            "# The books over keys and values",
            "",
            "Each setting alone and with every value of every other key, without and with accumulation, in fp32 and "
            "bf16. A line is what a rank holds of a category at one of four moments, or what it sends by one "
            "collective, its calls and its bytes. Lines count once for each of the two settings of a run. Where a "
            f"combination is not predicted, it is left out. On a CPU, torch {torch.__version__}, DeepSpeed "
            f"{_deepspeed()}. `python -m benchmarks.settings`",
            "",
            "| strategy | setting | runs | lines compared | equal |",
            "|---|---|---:|---:|---:|",
            *rows,
            "",
            *(f"- {sentence}" for sentence in wrong),
        ]
    )


def _deepspeed() -> str:
    from importlib.metadata import version

    return version("deepspeed")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
