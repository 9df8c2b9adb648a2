"""`shardrun compare`: the same training under every strategy on this machine, and what each rank held.

Runs `accelerate launch` once per strategy, prints each command so that it can be run alone, checks that the loss curves
agree, and ends with a table. `make demo` is this verb.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrun.answers import json_answer
from shardrun.colours import COLOURS
from shardrun.launch import launch, shipped_config, shown, what_went_wrong
from shardrun.output import write_whole
from shardrun.own import LAUNCHED_BY, capstone_of
from shardrun.tables import mib, paragraph, table, wrapped
from speedrun.run.record import step_times
from strategies import catalogue
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
    parser.add_argument("--why", action="store_true", help="add what the columns are")
    parser.add_argument("--json", action="store_true", help="print compare.json instead of the tables (docs/json.md)")
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
        _print_books(runs, arguments.processes, arguments.why)
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
    # Before the first run, not in it.
    arguments.config = parse([arguments.preset, f"--steps={arguments.steps}", *arguments.trainer])[1]
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
    paragraph(f"The loss curves {verdict}: {apart}.")
    print()
    return worst <= AGREEMENT


def _print_books(runs: list[ComparedRun], processes: int, why: bool = False) -> None:
    for said in advice(runs):
        paragraph(said)
    print()
    colours = {short: COLOURS[category] for short, category in zip(SHORT, CATEGORIES, strict=True)}
    lines: list[list[str]] = []

    def line(run: ComparedRun, what: str, entry: dict[str, Any]) -> None:
        strategy = "" if any(row[0] == run.strategy for row in lines) else run.strategy
        lines.append([strategy, what, *(digits(entry[key]) for key in ("predicted", "measured", "remainder"))])

    for run in runs:
        for category in CATEGORIES:
            entry = run.memory[category]
            if entry["predicted"] or entry["measured"]:
                line(run, category, entry)
        for category, entry in run.host.items():
            if entry["predicted"] or entry["measured"]:
                line(run, f"{category}, on the host", entry)
        others: dict[str, Any] = {"activations": run.activations, "peak of the passes": run.peak}
        for what, entry in others.items():
            if entry:
                line(run, what, entry)
        for sent in run.traffic:
            line(run, f"sent: {collective_name(sent)}", sent)
    headings = ["", "", "predicted", "measured", "remainder"]
    table("Double entry: bytes predicted from shapes alone, and measured", headings, lines, left=2)
    for run in runs:
        if run.strategy not in catalogue.names():
            wrapped(f"{run.strategy}:", "a strategy of your own; predicted is what its lesson asks for.")
    for run in runs:
        lines_of = [*run.memory.values(), *run.traffic]
        for reason in dict.fromkeys(line["why"] for line in lines_of if line["predicted"] is None):
            wrapped(f"{run.strategy}:", reason)
    offloads = any(run.on_host for run in runs)
    rows = []
    for run in runs:
        held = [run.memory[category]["measured"] for category in CATEGORIES]
        peak = run.peak.get("measured") or 0
        sizes = [*held, run.total, peak, *([run.on_host] if offloads else [])]
        rows.append([run.strategy, *map(mib, sizes), f"{run.val_loss:.4f}", f"{run.step_ms:.0f}"])
    headings = ["strategy", *SHORT, "total", "peak", *(["host"] if offloads else []), "val loss", "ms/step"]
    title = f"What the fullest of {processes} ranks holds just before a step, measured from its live tensors (MiB)"
    table(title, headings, rows, colours=colours)
    left = [f"{run.strategy}, {remainder}" for run in runs for remainder in run.remainders]
    paragraph(verdict(left, processes))
    if why:
        print()
        for note in _notes(runs):
            wrapped("", note)


def _notes(runs: list[ComparedRun]) -> list[str]:
    """What the columns are, and what the predictions are of."""
    notes = []
    for settings in dict.fromkeys(map(_predicted_for, runs)):
        names = [run.strategy for run in runs if _predicted_for(run) == settings]
        notes.append(f"{', '.join(names)}: predicted for {settings}.")
    notes.append("params: the weights as the model holds them between steps.")
    notes.append("masters: the float32 copy that ZeRO's optimizer updates.")
    notes.append("gradients: just before the step. optimizer: AdamW's moments, Muon's momentum.")
    notes.append("buffers: what an engine keeps allocated for communication.")
    notes.append("peak: the most in a forward or backward pass, activations among it.")
    if any(run.on_host for run in runs):
        notes.append("host: what a config file offloads; it lies in host memory and is not in the total.")
    return notes


def advice(runs: list[ComparedRun]) -> list[str]:
    """Which holds least and which was quickest here."""
    least, quickest = min(runs, key=lambda run: run.total), min(runs, key=lambda run: run.step_ms)
    return [
        f"{least.strategy} holds least before a step, {mib(least.total)} MiB.",
        f"{quickest.strategy} had the shortest step on this machine, {quickest.step_ms:.0f} ms.",
    ]


def _predicted_for(run: ComparedRun) -> str:
    return ", ".join(f"{key} {value}" for key, value in run.predicted_for.items())


def _write(runs: list[ComparedRun], arguments: argparse.Namespace) -> str:
    """compare.json, and the picture where matplotlib is installed, beside the runs. Returns the former's text."""
    folder, processes = runs[0].folder.parent, arguments.processes
    content = [{**vars(run), "folder": str(run.folder), "total": run.total, "ring_bytes": run.sent} for run in runs]
    inputs = {
        "preset": arguments.preset,
        "config": dataclasses.asdict(arguments.config),
        "world_size": processes,
        "strategies": [run.strategy for run in runs],
        "steps": arguments.steps,
        "configs": arguments.configs,
        "trainer": arguments.trainer,
    }
    text = json_answer("compare", inputs, advice(runs), _notes(runs), ranks=processes, runs=content)
    write_whole(folder / "compare.json", text + "\n")
    try:
        from shardrun.picture import draw_comparison
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'shardrun[plots]').")
        return text
    bars = {run.strategy: {category: run.memory[category]["measured"] for category in CATEGORIES} for run in runs}
    draw_comparison(bars, {run.strategy: run.sent for run in runs}, processes, folder / "compare.png")
    return text
