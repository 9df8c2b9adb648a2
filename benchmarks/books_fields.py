"""Every field of the trainer that may change what a rank holds or sends: is it predicted to the byte?

    python -m benchmarks.books_fields [--out benchmarks/books_fields.md]

Every value below is run under every strategy; precision, checkpointing and micro-batch take turns, so that over the six
strategies it meets each kind of checkpointing in fp32 and in bf16 (`--whole`: everything with everything, for hours).
Then combinations of several values, drawn with a seed. Two ranks (one for `single`) run the trainer itself for three
steps, and every line of the books of the last one is looked at: memory by category at five moments, activations by part
of the model, optimizer states by group, and what is sent. Some twenty minutes on a CPU.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from speedrun.config import Config, DataConfig, ModelConfig, StageConfig
from speedrun.run.checks import check
from speedrun.train import train
from strategies import catalogue
from strategies.base import Precision
from strategies.ledger import book
from strategies.select import Launch
from strategies.strict_json import dumps

BASE = Config(
    model=ModelConfig(layers=3, heads=4, width=48, mlp_width=101, max_sequence_length=64),
    data=DataConfig(sequence_length=24, global_batch=8, eval_tokens=48),
    steps=3,
    eval_every=0,
    untimed_steps=0,
    progress="none",
)
"""What every run has beside the fields that it is about."""

Fields = dict[str, Any]
"""Dotted name of a field → its value."""

LONG: Fields = {"model.long_layers": (1,)}
NGRAMS: Fields = {"model.bigram_rows": 83}

FIELDS: dict[str, tuple[Any, ...]] = {
    "model.vocab_size": (300,),
    "model.pad_vocab_to": (16, 128),
    "model.layers": (1, 4),
    "model.heads": (2, 6),
    "model.width": (64,),
    "model.mlp_width": (0, 24),
    "model.max_sequence_length": (32, {"model.positions": "learned", "model.max_sequence_length": 100}),
    "model.positions": ("rope", "learned"),
    "model.rope_base": (500.0,),
    "model.mlp": ("gelu",),
    "model.norm": ("layer",),
    "model.qk_norm": (False,),
    "model.bias": (True,),
    "model.tied_head": (True,),
    "model.untie_at": tuple({"model.tied_head": True, "model.untie_at": share} for share in (0.5, 1.0)),
    "model.softcap": (0.0, 30.0),
    "model.softcap_form": ("sigmoid",),
    "model.zero_init_projections": (False,),
    "model.bigram_rows": (83,),
    "model.trigram_rows": (101,),
    "model.fourgram_rows": (97,),
    "model.ngram_width": (NGRAMS | {"model.ngram_width": 10},),
    "model.smear": (True,),
    "model.value_embeddings": ((1,), (0, 2)),
    "model.embedding_skip": (True,),
    "model.unet_skips": (True,),
    "model.block_skip": ((0, 2),),
    "model.backout": (1, 2),
    "model.window_short": (7,),
    "model.window_long": (LONG | {"model.window_long": 20},),
    "model.long_layers": (LONG | {"model.window_short": 7},),
    "model.yarn": (LONG | {"model.window_long": 20, "model.yarn": True},),
    "model.attention_scale": (0.1,),
    "model.paired_head_layers": ((0,), (0, 2)),
    "model.attention_gate": (True,),
    "model.partial_key_offset": (LONG | {"model.partial_key_offset": True},),
    "model.attention": ("sdpa",),
    "model.checkpointing": ("block", "selective"),
    "model.kernels": ("torch",),
    "model.fp8": (True, {"model.fp8": True, "model.mlp": "gelu"}),
    "optimizer.name": ("adamw",),
    "optimizer.normuon": (True,),
    "optimizer.orthogonalization": ("newton_schulz",),
    "optimizer.orthogonalization_dtype": ("bfloat16",),
    "optimizer.adamw_every": (2,),
    "optimizer.sharded_adam": (True,),
    "optimizer.cautious_weight_decay": (True,),
    "optimizer.clip": (0.0,),
    "schedule.future_weights": ((0.5, 0.25), (0.5, 0.25, 0.1)),
    "schedule.stages": (
        (StageConfig(0.3, sequence_length=16, window_short=7), StageConfig(1.0, global_batch=4, micro_batch=1)),
    ),
    "data.sequence_length": (33,),
    "data.global_batch": (4,),
    "data.micro_batch": (3,),
    "data.eval_sequence_length": (16,),
    "data.eval_tokens": (640,),
    "checkpoint.every": (1,),
    "on_nonfinite": ("skip",),
    "spike": (3.0,),
    "untimed_steps": (1,),
    "eval_every": (1, 3),
}
"""Field → its values beside the one of `BASE`, each alone or with those of the fields that it needs."""

SAME_BYTES = {
    *(f"optimizer.{name}_lr" for name in ("muon", "embedding", "head", "vector", "table", "gate", "adamw")),
    *(f"optimizer.muon_{name}" for name in ("momentum", "momentum_start", "momentum_warmup", "momentum_cooldown")),
    *(f"optimizer.{name}" for name in ("muon_weight_decay", "weight_decay", "betas", "eps", "normuon_beta2")),
    "optimizer.orthogonalization_steps",
    *(f"schedule.{name}" for name in ("name", "warmup", "decay", "final")),
    *(f"data.{name}" for name in ("source", "encoding", "text_field")),
    *(f"checkpoint.{name}" for name in ("keep", "keep_best", "on_failure")),
    *("resume", "steps", "tokens", "target_val_loss", "books_every", "collective_timeout", "seed"),
    *("name", "out", "log", "progress"),
}
"""Fields that say numbers, names, places or times, and no shape."""

COMPILED = "compile"
"""Where it is on, the counted step runs uncompiled: `speedrun.books.measured`. A compilation takes half a minute."""

COMBINED = "combinations"
STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
CHECKPOINTING = ("none", "block", "selective")


@dataclass(frozen=True)
class Run:
    """A run of the trainer that is about some fields."""

    strategy: str
    precision: Precision
    checkpointing: str
    micro_batch: int
    about: str
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> Config:
        """What the trainer is given, but for its folder."""
        ways = {"model.checkpointing": self.checkpointing, "data.micro_batch": self.micro_batch}
        config = BASE
        for name, value in {**ways, **dict(self.fields)}.items():
            config = changed(config, name, value)
        return config

    def __str__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self.fields)
        way = f"checkpointing {self.checkpointing}, micro_batch {self.micro_batch}"
        return f"{self.strategy} in {self.precision}, {way}, {fields or 'nothing else'}"


def changed(config: Config, name: str, value: Any) -> Config:
    """With one field, named as on the command line with underscores, at a value."""
    section, _, field = name.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{field: value})
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})


def all_fields(config: Any = BASE, prefix: str = "") -> Iterator[str]:
    """Dotted names of a configuration's fields, those of its sections among them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from all_fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def alone() -> list[tuple[str, Fields]]:
    """(field, every value of it with what it needs); and nothing."""
    values = [(name, value) for name, values in FIELDS.items() for value in values]
    return [("nothing", {}), *((name, value if isinstance(value, dict) else {name: value}) for name, value in values)]


def drawn(count: int, seed: int = 1) -> list[tuple[str, Fields]]:
    """So many combinations of three to ten fields that the trainer takes together."""
    generator, single, found = random.Random(seed), alone()[1:], list[tuple[str, Fields]]()
    while len(found) < count:
        fields: Fields = {}
        for _, chosen in generator.sample(single, generator.randint(3, 10)):
            fields |= chosen
        with contextlib.suppress(ValueError):
            check(Run("ddp", "fp32", "none", 0, COMBINED, tuple(fields.items())).config, launch_of("ddp", "fp32", 0))
            found.append((COMBINED, fields))
    return found


def launch_of(strategy: str, precision: Precision, rank: int) -> Launch:
    """What the trainer is told of the shipped config for a CPU, on two ranks."""
    world_size = 1 if strategy == "single" else 2
    engine = catalogue.books(strategy).default_engine(world_size)
    return Launch(strategy, rank, rank, world_size, world_size, precision, True, engine)


def books_of(run: Run, folder: Path) -> dict[str, Any]:
    """On a rank: train as the run says, into `folder`; its ledger.json. Collective, but for `single`."""
    rank = 0 if run.strategy == "single" else dist.get_rank()
    config = dataclasses.replace(run.config, out=str(folder), name="run")
    train("fields", config, launch_of(run.strategy, run.precision, rank))
    if run.strategy != "single":
        dist.barrier()
    return book.read(folder / "run")


def lines(books: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a run's books, and its name."""
    for rank in books["ranks"]:
        name = f"rank {rank['rank']}"
        for moments in (rank["memory"], rank.get("host memory", {})):
            for moment, categories in moments.items():
                for category, line in categories.items():
                    yield f"{name}, {moment}, {category}", line
        for part, line in rank["activations"].items():
            yield f"{name}, activations after forward, {part}", line
        for group, line in rank["optimizer states by group"].items():
            yield f"{name}, optimizer states, {group}", line
        for line in rank["traffic"]:
            yield f"{name}, sent, {line['collective']} along {line['axis']}, {line['purpose']}", line


def unexplained(books: dict[str, Any]) -> list[str]:
    """Lines whose prediction is not what was measured, and that do not say why."""
    return [
        f"{name}: {line['remainder']:+,} bytes"
        for name, line in lines(books)
        if line["remainder"] and "why" not in line
    ]


def runs_of(strategy: str, whole: bool = False, combinations: int = 30) -> list[Run]:
    """All runs of a strategy."""
    ways = list(itertools.product(PRECISIONS, CHECKPOINTING))
    runs = []
    for number, (about, fields) in enumerate([*alone(), *drawn(combinations)]):
        turn = ways[(number + STRATEGIES.index(strategy)) % len(ways)]
        for precision, checkpointing in ways if whole else [turn]:
            micro_batch = (len(runs) + len(runs) // len(ways)) % 2
            runs.append(Run(strategy, precision, checkpointing, micro_batch, about, tuple(fields.items())))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES, help="only these")
    parser.add_argument("--whole", action="store_true", help="every value in every way")
    parser.add_argument("--as-a-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_a_rank:
        measure_all(arguments.strategies[0], arguments.whole, arguments.as_a_rank)
        return
    found: dict[str, list[Found]] = {}
    for strategy in arguments.strategies:
        found[strategy] = measured(strategy, arguments.whole)
        print(f"{strategy}: {sum(len(one.left) for one in found[strategy])} lines unexplained", flush=True)
    arguments.out.write_text(report(found), encoding="utf-8")


@dataclass(frozen=True)
class Found:
    """What a run's books say: numbers of lines."""

    about: str
    """A field, or `COMBINED`."""
    lines: int
    equal: int
    why: int
    """Lines with a remainder that say why; all of the peak."""
    peak: float
    """The largest relative error of the peak as a whole, of which the prediction is an estimate."""
    left: list[str]
    """Sentences about what is left, and of what was refused."""


def look_at(run: Run, folder: Path) -> Found:
    """On a rank: the run, and what its books say. Collective, but for `single`."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            books = books_of(run, folder)
    except ValueError as error:
        return Found(run.about, 0, 0, 0, 0.0, [f"{run}: {error}"])
    all_lines = list(lines(books))
    equal = sum(not line["remainder"] for _, line in all_lines)
    left = unexplained(books)
    peaks = [book.added(rank["memory"]["peak"]) for rank in books["ranks"]]
    off = max(abs(peak["remainder"] or 0) / (peak["measured"] or 1) for peak in peaks)
    why = len(all_lines) - equal - len(left)
    return Found(run.about, len(all_lines), equal, why, off, [f"{run}: {line}" for line in left])


def measure_all(strategy: str, whole: bool, folder: Path) -> None:
    """On a rank: all runs of a strategy, one after the other."""
    if strategy != "single":
        dist.init_process_group("gloo")
    linear = torch.nn.functional.linear
    rank = os.environ.get("RANK", "0")
    with open(folder / f"{strategy}_{rank}.jsonl", "w", encoding="utf-8") as file:
        for number, run in enumerate(runs_of(strategy, whole)):
            found = look_at(run, folder / f"{strategy}_{number}")
            file.write(dumps(dataclasses.asdict(found)) + "\n")
            file.flush()
            torch.nn.functional.linear = linear  # ZeRO-3 replaces it for the whole process
    os._exit(0)  # past engines that wait for one another


def measured(strategy: str, whole: bool) -> list[Found]:
    """A strategy's runs, on ranks of their own."""
    ranks = "1" if strategy == "single" else "2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    if strategy == "single":
        command = [sys.executable]
    options = ["--strategies", strategy, *(["--whole"] if whole else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        command += ["-m", "benchmarks.books_fields", *options, "--as-a-rank", folder]
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
        lines_of_file = (Path(folder) / f"{strategy}_0.jsonl").read_text(encoding="utf-8").splitlines()
    return [Found(**json.loads(line)) for line in lines_of_file]


def report(found: dict[str, list[Found]]) -> str:
    """Markdown: a row per field, over all strategies."""
    rows: dict[str, list[Found]] = {}
    for one in itertools.chain(*found.values()):
        rows.setdefault(one.about, []).append(one)
    table = []
    for name, runs in rows.items():
        numbers = [sum(getattr(one, what) for one in runs) for what in ("lines", "equal", "why")]
        left = sum(len(one.left) for one in runs)
        shown = " | ".join(f"{number:,}" for number in numbers)
        table.append(f"| `{name}` | {len(runs)} | {shown} | {max(one.peak for one in runs):.1%} | {left} |")
    return "\n".join(
        [
            "# The books over the trainer's fields",
            "",
            f"Under {', '.join(found)}; two ranks, one for single. A line is a category at one of five moments, a part "
            "of the model's activations, a group's optimizer states, or a collective. With a `why`: the peak, an "
            "estimate in closed form (the largest error of the whole peak stands beside it), and DDP's buckets before "
            "the first backward pass. On a CPU, torch "
            f"{torch.__version__}; FP8 is emulated there. `python -m benchmarks.books_fields`",
            "",
            "| field | runs | lines | equal | say why | peak off by at most | unexplained |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *table,
            "",
            *(f"- {sentence}" for runs in found.values() for one in runs for sentence in one.left),
        ]
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
