"""`shardrun compare`: the same training under every strategy on this machine, and what each rank held.

Runs `accelerate launch` once per strategy, prints each command so that it can be run alone, checks that the loss curves
agree, and ends with a table. `make demo` is this verb.
"""

import argparse
import contextlib
import json
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardrun.colours import COLOURS
from shardrun.launch import launch, shipped_config, shown, what_went_wrong
from shardrun.output import write_whole
from shardrun.own import LAUNCHED_BY, capstone_of
from shardrun.tables import mib
from speedrun.run.record import step_times
from strategies import catalogue, strict_json
from strategies.errors import UserError
from strategies.ledger import book
from strategies.ledger.book import (
    before_step,
    collective_name,
    digits,
    fullest_rank,
    host_before_step,
    unexplained,
    verdict,
)
from strategies.ledger.terms import CATEGORIES

AGREEMENT = 1e-3
"""Largest relative difference of a step's loss between two strategies. Rounding differs (sums in another order), and
twenty to forty steps of training amplify it; a wrong strategy differs by far more."""

SHORT = ("params", "masters", "gradients", "optimizer", "buffers")

Entries = dict[str, dict[str, int]]
"""Category → predicted, measured and remainder, in bytes."""


@dataclass(frozen=True)
class ComparedRun:
    """A finished run, as its folder tells it. Books are those of the rank that holds most, just before a step."""

    strategy: str
    folder: Path
    losses: list[float]
    val_loss: float
    step_ms: float
    memory: Entries
    host: Entries
    """The same rank's host memory, where its config file offloads."""
    activations: dict[str, int]
    """What autograd keeps after the last forward pass of a step: predicted, measured and remainder, in bytes."""
    peak: dict[str, int | None]
    """The most that is held in a forward or backward pass, likewise, all categories, activations and temporaries."""
    predicted_for: dict[str, Any]
    """The device, kernels, attention, precision and torch's version that the predictions are of."""
    traffic: list[dict[str, Any]]
    remainders: list[str]
    """Every line of every rank's books whose prediction is not what was measured and that does not say why, in words.
    """

    @property
    def total(self) -> int:
        return sum(entry["measured"] for entry in self.memory.values())

    @property
    def on_host(self) -> int:
        return sum(entry["measured"] for entry in self.host.values())

    @property
    def sent(self) -> float:
        """Bytes on the wire of a ring in one step."""
        return sum(line["ring_bytes"] for line in self.traffic)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strategies",
        default=",".join(catalogue.spread()),
        help="comma-separated (default: those for any number of ranks)",
    )
    parser.add_argument(
        "--with",
        dest="own",
        type=Path,
        metavar="FILE",
        help="a strategy of your own beside them, such as learning/04_ddp/my_ddp.py",
    )
    parser.add_argument("--preset", default="tiny", help="the trainer's preset (default: tiny)")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run (default: 30)")
    parser.add_argument("--configs", default="cpu", help="folder of shipped configs, cpu or . for GPUs (default: cpu)")
    parser.add_argument("--out", default="runs", help="where the runs are written (default: runs)")
    parser.add_argument("--json", action="store_true", help="print compare.json instead of the tables")
    parser.add_argument("trainer", nargs="*", help="further arguments of the trainer, after --")


def run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        with contextlib.redirect_stdout(sys.stderr):  # what it does meanwhile
            runs, agree = _run_all(arguments)
            content = _write(runs, arguments)
        print(content)
    else:
        runs, agree = _run_all(arguments)
        _write(runs, arguments)  # before anything that printing could go wrong with
        _print_books(runs, arguments.processes)
        print(f"Records, outputs and compare.json: {runs[0].folder.parent}")
    return 0 if agree and not any(run.remainders for run in runs) else 1


def _run_all(arguments: argparse.Namespace) -> tuple[list[ComparedRun], bool]:
    """Train under every strategy; also whether their losses agree."""
    from speedrun.run.command_line import parse

    names, fitting = arguments.strategies.split(","), catalogue.spread(arguments.processes)
    for name in names:
        if name not in fitting:
            there_are = f"on {arguments.processes} ranks there are {', '.join(fitting)}"
            raise UserError(f"there is no strategy {name!r} to compare; {there_are}.")
    parse([arguments.preset, f"--steps={arguments.steps}", *arguments.trainer])  # before the first run, not in it
    launches = [(name, name, "speedrun.train", list[str]()) for name in names]
    if arguments.own:
        capstone_of(arguments.own)  # raises where it is none
        launches.append((arguments.own.stem, LAUNCHED_BY.removesuffix(".yaml"), "shardrun.own", [str(arguments.own)]))
    together = Path(arguments.out) / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    runs = []
    for number, (name, config_name, module, file) in enumerate(launches, start=1):
        config = shipped_config(config_name if arguments.configs == "." else f"{arguments.configs}/{config_name}")
        folder = together / name
        trainer = [
            *file,
            arguments.preset,
            f"--steps={arguments.steps}",
            "--eval-every=0",
            "--optimizer.orthogonalization-dtype=float32",
            *arguments.trainer,
        ]
        options = ["--num_processes", str(arguments.processes)]
        print(f"[{number}/{len(launches)}] {shown(config, module, trainer, options)}", flush=True)
        log = folder.parent / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        status = launch(config, module, [*trainer, "--out", str(folder.parent), "--name", name], options, log)
        if status:
            raise UserError(f"{name} ended with status {status}: {what_went_wrong(log)} (all its output: {log}).")
        runs.append(read(name, folder))
        if file:  # what it differs from is not our books, but what a lesson asks for
            runs[-1].remainders.clear()
        print(
            f"      final validation loss {runs[-1].val_loss:.4f}, {runs[-1].step_ms:.0f} ms a step, "
            f"{time.perf_counter() - started:.0f} s in all",
            flush=True,
        )
    print()
    return runs, _check_agreement(runs)


def read(strategy: str, folder: Path) -> ComparedRun:
    """Read a run's record."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    ranks = book.read(folder)["ranks"]
    fullest = fullest_rank(ranks)
    return ComparedRun(
        strategy=strategy,
        folder=folder,
        losses=[line["train_loss"] for line in steps],
        val_loss=lines[-1]["val_loss"],
        step_ms=statistics.median(step_times(lines)),
        memory=before_step(fullest),
        host=host_before_step(fullest),
        activations=fullest["memory"].get("after forward", {}).get("activations", {}),
        peak=book.added(fullest["memory"].get("peak", {})),
        predicted_for=fullest["predicted for"],
        traffic=fullest["traffic"],
        remainders=unexplained(ranks),
    )


def _check_agreement(runs: list[ComparedRun]) -> bool:
    """Whether every loss of every run is that of the first run, within AGREEMENT. Says so."""
    first = runs[0]
    worst, where = 0.0, ""
    for other in runs[1:]:
        for step, (loss, reference) in enumerate(zip(other.losses, first.losses, strict=True), start=1):
            difference = abs(loss - reference) / reference
            if not difference <= worst:
                worst, where = difference, f"{other.strategy} against {first.strategy} at step {step}"
    if len(runs) < 2:
        return True
    verdict = "agree" if worst <= AGREEMENT else "DO NOT AGREE"
    apart = f"at most {worst:.1e} of the loss apart ({where}); up to {AGREEMENT:.0e} passes"
    print(textwrap.fill(f"The loss curves {verdict}: {apart}.", 98) + "\n")
    return worst <= AGREEMENT


def _print_books(runs: list[ComparedRun], processes: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {short: COLOURS[category] for short, category in zip(SHORT, CATEGORIES, strict=True)}

    def table(title: str, headings: tuple[str, ...]) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for i, heading in enumerate(headings):
            justify: Literal["left", "right"] = "left" if i == 0 or heading == "what" else "right"
            made.add_column(Text(heading, colours.get(heading, "")), justify=justify, no_wrap=True)
        return made

    offloads = any(run.on_host for run in runs)
    books = table(
        f"What the fullest of {processes} ranks holds just before a step, measured from its live tensors (MiB)",
        ("strategy", *SHORT, "total", *(["host"] if offloads else []), "val loss", "ms/step"),
    )
    for run in runs:
        held = [run.memory[category]["measured"] for category in CATEGORIES]
        sizes = [*held, run.total, *([run.on_host] if offloads else [])]
        books.add_row(run.strategy, *map(mib, sizes), f"{run.val_loss:.4f}", f"{run.step_ms:.0f}")
    lines = table(
        "Double entry: bytes predicted from shapes alone, and measured",
        ("strategy", "what", "predicted", "measured", "remainder"),
    )
    for run in runs:
        for category in CATEGORIES:
            entry = run.memory[category]
            if entry["predicted"] or entry["measured"]:
                numbers = [digits(entry[key]) for key in ("predicted", "measured", "remainder")]
                lines.add_row(run.strategy, Text(category, COLOURS[category]), *numbers)
        for category, entry in run.host.items():
            if entry["predicted"] or entry["measured"]:
                numbers = [digits(entry[key]) for key in ("predicted", "measured", "remainder")]
                lines.add_row("", Text(f"{category}, on the host", COLOURS[category]), *numbers)
        others: dict[str, Any] = {"activations": run.activations, "peak of the passes, all together": run.peak}
        for what, entry in others.items():
            if entry:
                lines.add_row("", what, *(digits(entry[key]) for key in ("predicted", "measured", "remainder")))
        for line in run.traffic:
            lines.add_row(
                "",
                f"sent: {collective_name(line)}",
                *(digits(line[key]) for key in ("predicted", "measured", "remainder")),
            )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(lines)
    for settings in dict.fromkeys(map(_predicted_for, runs)):
        names = [run.strategy for run in runs if _predicted_for(run) == settings]
        print(textwrap.fill(f"{', '.join(names)}: predicted for {settings}", 98, subsequent_indent="  "))
    for run in runs:
        if run.strategy not in catalogue.names():
            print(f"{run.strategy}: a strategy of your own; predicted is what its lesson asks for.")
    for run in runs:
        lines_of = [*run.memory.values(), *run.traffic]
        for why in dict.fromkeys(line["why"] for line in lines_of if line["predicted"] is None):
            print(f"{run.strategy}: {why}")
    print()
    console.print(books)
    print(
        "params: the weights as the model holds them between steps · masters: the float32 copy that ZeRO's\n"
        "optimizer updates · gradients: just before the step · optimizer: AdamW's moments, Muon's momentum\n"
        "buffers: what an engine keeps allocated for communication.\n"
    )
    if offloads:
        print("host: what a config file offloads; it lies in host memory and is not in the total.\n")
    left = [f"{run.strategy}, {remainder}" for run in runs for remainder in run.remainders]
    print(textwrap.fill(verdict(left, processes), 98))


def _predicted_for(run: ComparedRun) -> str:
    return ", ".join(f"{key} {value}" for key, value in run.predicted_for.items())


def _write(runs: list[ComparedRun], arguments: argparse.Namespace) -> str:
    """compare.json, and the picture where matplotlib is installed, beside the runs. Returns the former's text."""
    folder, processes = runs[0].folder.parent, arguments.processes
    content = [{**vars(run), "folder": str(run.folder), "total": run.total, "ring_bytes": run.sent} for run in runs]
    text = strict_json.dumps({"schema": 1, "ranks": processes, "runs": content}, indent=2)
    write_whole(folder / "compare.json", text + "\n")
    try:
        from shardrun.picture import draw_comparison
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'shardrun[plots]').")
        return text
    bars = {run.strategy: {category: run.memory[category]["measured"] for category in CATEGORIES} for run in runs}
    draw_comparison(bars, {run.strategy: run.sent for run in runs}, processes, folder / "compare.png")
    return text
