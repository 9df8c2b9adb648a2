"""Lesson 16: the zoo. One healthy trainer and twelve sick ones, and what can be seen of each from outside.

python demo.py                                                  all of them, two ranks each, as threads
python demo.py crane                                            one of them, step by step
accelerate launch --config_file …/cpu/ddp.yaml demo.py          all of them, on ranks that are processes
"""

import sys
import textwrap

import torch.distributed as dist
from animals import ANIMALS
from ranks import Launched
from zoo import BATCH, Report, Trainer, run

from lessons.kit import doing, headline, launched, save_figure, steps, table
from shardrun.colours import REFERENCE
from shardrun.lesson.guess import guess_first
from speedrun.run.ending import guarded
from strategies.errors import UserError

STEPS, ACCUMULATION = steps(40), 2
KINDS = {"healthy": Trainer, **ANIMALS}


def main() -> None:
    asked = sys.argv[1:]
    guess = None if asked else guess_first(16)
    launch, strategy = launched()
    if unknown := [name for name in asked if name not in KINDS]:
        raise UserError(f"there is no {unknown[0]} in the zoo; there are {', '.join(KINDS)}.")
    reports, alone = {}, {}
    for name in asked or KINDS:
        doing(name)
        if launch.world_size == 1:
            reports[name] = run(KINDS[name], 2, ACCUMULATION, STEPS)
        else:
            everybody = [None] * launch.world_size
            mine = KINDS[name](Launched(), ACCUMULATION, 0, strategy.settings.place.device).train(STEPS)
            dist.all_gather_object(everybody, mine)
            reports[name] = everybody
        if launch.rank == 0:
            alone[name] = run(KINDS[name], 1, 1, STEPS)[0]
    if launch.rank:
        return
    how = "2 ranks, threads of this process" if launch.world_size == 1 else headline(launch, "real ranks")
    print(f"The zoo, {STEPS} steps of {BATCH} rows in {ACCUMULATION} micro-batches a rank ({how}).")
    print("“Alone” is the same trainer in one process that does not accumulate.")
    if asked:
        for name in asked:
            closely(name, reports[name], alone[name])
        return
    training(reports, alone)
    healthy = reports["healthy"][0].losses[-1]
    guess.tell(sum(abs(reports[name][0].losses[-1] / healthy - 1) <= 0.02 for name in ANIMALS))
    books(reports)
    ends(reports)
    print(save_figure("lesson_16_bug_zoo", lambda figure: draw(figure, reports), size=(10, 6)))


def training(reports: dict[str, list[Report]], alone: dict[str, Report]) -> None:
    print("\nHow they train. Norm: of the gradient, as rank 0 clips by it, over the one alone.")
    lines = []
    for name, ranks in reports.items():
        first, last = ranks[0], ranks[-1]
        ratios = [a / b for a, b in zip(first.grad_norms, alone[name].grad_norms, strict=False)]
        norms = max(abs(a / b - 1) for a, b in zip(first.grad_norms, last.grad_norms, strict=True))
        lines.append([
            name,
            f"{first.losses[0]:.2f}",
            f"{first.losses[-1]:.2f}",
            f"{last.losses[-1]:.2f}",
            f"{first.val_losses[-1]:.2f}" if first.val_losses else "–",
            f"{min(ratios):.2f} … {max(ratios):.2f}",
            f"{norms:.0%}",
            f"{off(first, alone[name]):.0e}",
        ])  # fmt: skip
    headings = ["", "first loss", "last", "on last rank", "val", "norm / alone", "norms apart", "weights off alone"]
    print(table(headings, lines))


def books(reports: dict[str, list[Report]]) -> None:
    print("\nTheir books, rank 0: KiB held, KiB sent in a step; rows of a step; how far ranks are apart at first.")
    lines = []
    for name, ranks in reports.items():
        first, last = ranks[0], ranks[-1]
        rows = {row for report in ranks for row in report.rows[0]}
        held = [first.held["parameters"], first.held["optimizer states"], first.graph[-1]]
        sent = [first.sent.get(kind, 0) for kind in ("reduce_scatter", "all_gather")]
        lines.append([
            name,
            *(f"{amount / 1024:,.0f}" for amount in [*held, *sent]),
            f"{first.sent.get('all_reduce', 0)} B",
            str(len(rows)),
            f"{apart(first.weights[0], last.weights[0]):.1f}",
        ])  # fmt: skip
    headings = ["", "weights", "optimizer", "graph", "reduce_scatter", "all_gather", "all_reduce", "rows", "apart"]
    print(table(headings, lines))


def ends(reports: dict[str, list[Report]]) -> None:
    for name, ranks in reports.items():
        if ranks[0].stuck:
            said = f"{name} hangs (here a roll call before each collective ends it), {ranks[0].stuck}."
            print("\n" + textwrap.fill(said, 98))


def off(report: Report, alone: Report) -> float:
    """How far the weights are from those in one process, after the last step that both have made."""
    steps = min(len(report.weights), len(alone.weights)) - 1
    return apart(report.weights[steps], alone.weights[steps])


def apart(some: dict, others: dict) -> float:
    return max((some[name] - others[name]).abs().max().item() for name in some)


def closely(name: str, ranks: list[Report], alone: Report) -> None:
    """Every fifth step of one trainer: the first rank, the last one, and alone."""
    print(f"\n{name} (graph: KiB that autograd keeps)")
    first, last = ranks[0], ranks[-1]
    lines = []
    for step in range(0, len(first.graph), 5):
        numbers = [r.losses[step] for r in (first, last, alone)] + [r.grad_norms[step] for r in (first, last, alone)]
        lines.append([
            str(step + 1),
            *(f"{number:.3f}" for number in numbers),
            f"{apart(first.weights[step], last.weights[step]):.0e}",
            f"{first.graph[step] / 1024:,.0f}",
        ])  # fmt: skip
    headings = [
        "step",
        "loss, rank 0",
        "last rank",
        "alone",
        "norm, rank 0",
        "last rank",
        "alone",
        "apart",
        "graph",
    ]
    print(table(headings, lines))
    print(f"\nRows of the first step, rank 0: {first.rows[0]}")
    print(f"                     last rank: {last.rows[0]}")
    print("Weights: " + ", ".join(f"{weight} {list(t.shape)}" for weight, t in first.weights[-1].items()))
    print(f"Held (bytes): {first.held}")
    print(f"Sent in a step (bytes): {first.sent}")
    if first.stuck:
        print(textwrap.fill(f"It hangs, {first.stuck}.", 98))


def draw(figure, reports: dict[str, list[Report]]) -> None:
    axes = figure.subplots(3, 4, sharex=True, sharey=True).flatten()
    for ax, name in zip(axes, ANIMALS, strict=True):
        ax.plot(reports["healthy"][0].losses, color=REFERENCE, label="healthy")
        for rank, style in ((0, "-"), (-1, ":")):
            ax.plot(reports[name][rank].losses, style, label="rank 0" if rank == 0 else "last rank")
        ax.set_title(name, loc="left", fontsize=9)
    axes[0].legend(frameon=False, fontsize=7)
    figure.suptitle("Training loss: how little it tells")


if __name__ == "__main__":
    guarded(main)
