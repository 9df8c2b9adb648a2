"""The estimator court on real ranks: what estimators say of a model, and what the ranks that train it here hold.

    python -m benchmarks.court                        # tiny on 2 ranks, a minute or two on two cores
    python -m benchmarks.court --processes 4 --out benchmarks/court.md

Launches the real trainer (accelerate launch … -m speedrun.train) under every strategy in bf16 with AdamW, and reads
from its books what the fullest rank's live tensors held in model states just before a step. The estimators are given
the same model and number of ranks (strategies/forecast/court.py). Figures are MiB.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from shardrun.launch import launch, shipped_config, what_went_wrong
from shardrun.plan.court import largest_layer
from speedrun.books.shapes import ledger_groups, shapes_from
from speedrun.config import OptimizerConfig
from speedrun.presets import PRESETS
from strategies import catalogue
from strategies.forecast.court import hear
from strategies.ledger import book
from strategies.ledger.terms import MODEL_STATES

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    config = dataclasses.replace(PRESETS[arguments.preset][1], optimizer=OptimizerConfig(name="adamw"))
    shapes = shapes_from(config.model)
    testimonies = hear(shapes, ledger_groups(config), arguments.processes, largest_layer(shapes))
    rows = [(t.who, t.bytes) for t in testimonies]
    rows.append(
        ("measured", {name: measured(arguments.preset, name, arguments.processes) for name in catalogue.spread()})
    )
    command = f"python -m benchmarks.court --preset {arguments.preset} --processes {arguments.processes}"
    lines = [
        "# The estimator court on real ranks",
        "",
        f"MiB of model states on the fullest of {arguments.processes} ranks, just before a step: {arguments.preset}, "
        f"AdamW, bf16. `{command}`",
        "",
        f"| | {' | '.join(catalogue.spread())} |",
        f"|---|{'---|' * len(catalogue.spread())}",
        *(f"| {who} | {' | '.join(shown(figures[name]) for name in catalogue.spread())} |" for who, figures in rows),
        "",
        *(f"- {t.who}: {t.why}" for t in testimonies),
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


def measured(preset: str, strategy: str, processes: int) -> int:
    """Bytes that the fullest rank held, from the books of a run of five steps."""
    with tempfile.TemporaryDirectory() as folder:
        options = [preset, "--steps", "5", "--eval-every", "0", "--optimizer.name", "adamw"]
        options += ["--data.eval-tokens", "1024", "--data.global-batch", str(4 * processes)]
        log = Path(folder) / "log.txt"
        ranks = ["--num_processes", str(processes)]
        config = shipped_config(f"cpu/{strategy}_bf16")
        if launch(config, "speedrun.train", [*options, "--out", folder, "--name", "run"], ranks, log):
            raise SystemExit(what_went_wrong(log))
        books = book.read(Path(folder) / "run")["ranks"]
    return max(sum(rank["memory"]["after backward"][c]["measured"] for c in MODEL_STATES) for rank in books)


def shown(figure: int | None) -> str:
    return "–" if figure is None else f"{figure / MIB:.2f}"


if __name__ == "__main__":
    main()
