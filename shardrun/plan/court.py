"""`shardrun plan --court`: what public estimators say of the same model, beside ours."""

import argparse
import dataclasses

from shardrun.answers import json_answer
from shardrun.plan.estimates import inputs
from shardrun.tables import paragraph, table, wrapped
from speedrun.books.shapes import ledger_groups, shapes_from
from speedrun.config import Config, OptimizerConfig
from strategies import catalogue
from strategies.ledger.hardware import GIB, find_gpu

ADVICE = "Take Shardrun's figures: python -m benchmarks.court found them to the byte on real ranks."


def hold_court(config: Config, arguments: argparse.Namespace) -> int:
    from strategies.forecast.court import Testimony, hear

    adamw = dataclasses.replace(config, optimizer=OptimizerConfig(name="adamw"))
    shapes = shapes_from(config.model)
    testimonies = hear(shapes, ledger_groups(adamw), arguments.world, largest_layer(shapes))
    if arguments.simulate:
        from shardrun.plan.simulation import model_states

        testimonies.append(
            Testimony(
                "simulated",
                "shardrun plan --court --simulate",
                {name: model_states(adamw, name, arguments) for name in catalogue.spread()},
                "what the engines themselves hold on the fullest rank, on tensors without data.",
            )
        )
    if arguments.json:
        told, heard = inputs(config, find_gpu(arguments.gpu), arguments), [dataclasses.asdict(t) for t in testimonies]
        print(json_answer("plan", told, [ADVICE], [], testimonies=heard))
        return 0
    paragraph(ADVICE)
    print()
    psi = sum(map(_numel, shapes.values()))
    unit, size = ("GiB", GIB) if psi > 1e8 else ("MiB", 2**20)
    paragraph(f"{psi / 1e6:,.1f}M parameters, AdamW, bf16, {arguments.world} GPUs: model states alone, {unit} per GPU")
    print()
    figures = [[t.bytes[name] for name in catalogue.spread()] for t in testimonies]
    cells = [["–" if figure is None else f"{figure / size:,.2f}" for figure in row] for row in figures]
    rows = [[t.who, *row] for t, row in zip(testimonies, cells, strict=True)]
    table("", ["estimator", *catalogue.spread()], rows)
    for t in testimonies:
        wrapped(f"{t.who}:", f"{t.why} [{t.source}]")
    wrapped("Measured:", "--simulate adds what the engines hold; python -m benchmarks.court asks real ranks.")
    return 0


def largest_layer(shapes: dict[str, tuple[int, ...]]) -> int:
    """Elements of the largest of a block and the embedding, which DeepSpeed's estimator asks for."""
    block = sum(_numel(shape) for name, shape in shapes.items() if name.startswith("blocks.0."))
    return max(block, _numel(shapes["embed.weight"]))


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
