"""Lesson 8: ten steps in one process, under FSDP by hand, and under torch; and FSDP's bytes beside those of ZeRO-3.

accelerate launch --config_file …/cpu/fsdp.yaml demo.py         two ranks (--num_processes 4 for more)
python demo.py                                                  one process: the books alone
"""

from dataclasses import replace

import torch

from lessons import compared
from lessons.compared import (
    ACCUMULATION,
    STEPS,
    booked,
    books_by_ranks,
    draw_states,
    groups_of,
    load_beside,
    on_the_wire,
    ring_of,
    states_table,
    traffic_line,
    traffic_table,
)
from lessons.kit import CONFIG, build, headline, launched, launched_scenario, prepare, save_figure, table
from shardrun.lesson.guess import guess_first
from shardrun.tables import mib
from speedrun.run.ending import guarded
from strategies.errors import UserError
from strategies.forecast.predict import predict_after_forward, predict_memory
from strategies.layout import equal_cuts, row_blocks
from strategies.ledger.terms import MODEL_STATES

FSDP = {"reshard_after_forward": True, "wrap": ["Block"]}
NO_RESHARD = {**FSDP, "reshard_after_forward": False}
ZERO3 = {"zero_optimization": {"stage": 3}}


def main() -> None:
    guess = guess_first(8)
    launch, strategy = launched()
    place = strategy.settings.place
    if launch.world_size == 1:
        print(headline(launch, "FSDP"))
        books_alone(launch, guess)
        return
    if launch.strategy != "fsdp":
        raise UserError(f"this demo compares with FSDP, not with {launch.strategy}; launch it with cpu/fsdp.yaml.")
    dtype = torch.bfloat16 if launch.precision == "bf16" else torch.float32
    alone = compared.train_alone(place.device)
    hand = compared.train_by_hand(by_hand(place, dtype=dtype), place)
    kept = compared.train_by_hand(by_hand(place, dtype=dtype, reshard=False), place)
    prepare(strategy, accumulation=ACCUMULATION)
    torchs = compared.train_strategy(strategy)
    if launch.rank == 0:
        report(launch, alone, hand, kept, torchs)
        guess.tell(sum(torchs.held.get(category, 0) for category in MODEL_STATES) / 2**20)
        show_shards(strategy)


def by_hand(place, **options):
    model = build().to(place.device)
    cls = load_beside(__file__, "by_hand").HandFSDP
    return cls(model, list(model.blocks), groups_of(model), CONFIG.optimizer.clip, **options)


def report(launch, alone, hand, kept, torchs) -> None:
    books = launched_scenario(launch, accumulation=ACCUMULATION)
    print(headline(launch, "FSDP"))
    print(f"\n{STEPS} steps of {CONFIG.data.global_batch} rows, {ACCUMULATION} micro-batches a rank; bytes of a step:")
    lines = []
    for name, one, run in (
        ("by hand", hand, replace(books, engine=FSDP)),
        ("by hand, blocks kept", kept, replace(books, engine=NO_RESHARD)),
        ("torch", torchs, books),
    ):
        sent = (one.payload("reduce_scatter"), one.payload("all_gather"), ring_of(one))
        lines.append(traffic_line(name, one.away_from(alone), *sent))
        predicted = booked(run, "gradients", launch.rank), booked(run, "parameters", launch.rank)
        lines.append(traffic_line("  the books", None, *predicted, on_the_wire(run, launch.rank)))
    print(traffic_table(lines))
    print("\nWhat this rank holds before the update (MiB):")
    zero3 = replace(books, strategy="zero3", engine=ZERO3)
    rows = {
        "one process": alone.held,
        "by hand": hand.held,
        "torch": {"master parameters": 0, **torchs.held},
        "the books": predict_memory(books)[launch.rank]["after backward"],
        "ZeRO-3's books": predict_memory(zero3)[launch.rank]["after backward"],
    }
    print(states_table(rows))
    print(save_figure("lesson_08_fsdp", lambda figure: draw_states(figure.subplots(), rows, "What rank 0 holds (MiB)")))


def show_shards(strategy) -> None:
    """What fully_shard has put in the place of the parameters."""
    print("\nA parameter under torch's FSDP is a DTensor: a whole with a place, of which this rank has a piece.")
    for name, shard in list(zip(dict(strategy.model.named_parameters()), strategy.shards, strict=True))[:2]:
        print(f"  {name}: whole {list(shard.shape)}, here {list(shard.to_local().shape)}, {shard.placements[0]!r}")


def books_alone(launch, guess) -> None:
    """No ranks are needed to know what they would hold and send."""
    run = replace(launched_scenario(launch), strategy="fsdp", engine=FSDP)
    text, rows = books_by_ranks({f"{n}": replace(run, world_size=n) for n in (1, 2, 4, 8, 64)})
    print(f"\nThe books for {run.parameters:,} parameters under FSDP in {run.precision} (MiB, rank 0):")
    print(text)
    guess.tell(sum(rows[f"{guess.ranks}"][category] for category in MODEL_STATES) / 2**20)
    print("\nFSDP against ZeRO-3, the books of 8 ranks by number of micro-batches A (MiB):")
    lines = []
    for precision in ("fp32", "bf16"):
        for accumulation in (1, 4):
            for name, strategy, engine in (("FSDP", "fsdp", FSDP), ("ZeRO-3", "zero3", ZERO3)):
                one = replace(run, strategy=strategy, engine=engine, world_size=8)
                one = replace(one, precision=precision, accumulation=accumulation)
                states = predict_memory(one)[0]["after backward"]
                between = predict_after_forward(one)[0]["gradients"]
                sizes = sum(states[category] for category in MODEL_STATES), between
                sent = booked(one, "parameters"), booked(one, "gradients"), on_the_wire(one)
                lines.append([f"{name}, {precision}, A = {accumulation}", *(mib(size) for size in (*sizes, *sent))])
    headings = ["", "model states", "gradients meanwhile", "gathered", "reduced", "on a ring"]
    print(table(headings, lines))
    print("\nThe embedding, [257, 128], on N ranks: elements of the largest part, and of all with padding.")
    lines = []
    for ranks in (2, 8, 64, 512):
        parts = [max(cut((257, 128), ranks), key=lambda part: part.numel).numel for cut in (row_blocks, equal_cuts)]
        lines.append([f"{ranks}", *(f"{number:,}" for part in parts for number in (part, part * ranks))])
    print(table(["N", "FSDP: part", "all", "ZeRO-3: part", "all"], lines))
    print("\n(For FSDP itself launch this on several ranks; README.md has the command.)")
    print(save_figure("lesson_08_books", lambda figure: draw_states(figure.subplots(), rows, "Rank 0 by ranks (MiB)")))


if __name__ == "__main__":
    guarded(main)
