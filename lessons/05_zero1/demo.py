"""Lesson 5: ten steps in one process, under ZeRO-1 by hand, and under DeepSpeed: weights, bytes held, bytes sent.

accelerate launch --config_file …/cpu/zero1.yaml demo.py        two ranks (--num_processes 4 for more)
python demo.py                                                  one process: the books alone, for more and more ranks
"""

from dataclasses import replace

from lessons import compared
from lessons.compared import (
    ACCUMULATION,
    STEPS,
    booked,
    books_by_ranks,
    draw_states,
    groups_of,
    load_beside,
    states_table,
)
from lessons.kit import CONFIG, build, headline, launched, launched_scenario, prepare, save_figure, table
from shardrun.lesson.guess import guess_first
from speedrun.run.ending import guarded
from strategies.errors import UserError
from strategies.forecast.predict import predict_memory

SENT = {"all_reduce": "gradients", "all_gather": "parameters"}
"""Collective → what ZeRO-1 sends with it."""


def main() -> None:
    guess = guess_first(5)
    launch, strategy = launched()
    place = strategy.settings.place
    if launch.world_size == 1:
        print(headline(launch, "ZeRO-1"))
        books_alone(launch, guess)
        return
    if launch.strategy != "zero1":
        raise UserError(f"this demo compares with ZeRO-1, not with {launch.strategy}; launch it with cpu/zero1.yaml.")
    alone = compared.train_alone(place.device)
    hand = compared.train_by_hand(by_hand(place), place)
    prepare(strategy, accumulation=ACCUMULATION)
    deepspeeds = compared.train_strategy(strategy)
    if launch.rank == 0:
        report(launch, alone, hand, deepspeeds)
        guess.tell(deepspeeds.held["optimizer states"] / 2**20)


def by_hand(place):
    model = build().to(place.device)
    return load_beside(__file__, "by_hand").HandZero1(model, groups_of(model))


def report(launch, alone, hand, deepspeeds) -> None:
    run = launched_scenario(launch, accumulation=ACCUMULATION)
    print(headline(launch, "ZeRO-1"))
    print(f"\n{STEPS} steps of {CONFIG.data.global_batch} rows, {ACCUMULATION} micro-batches a rank; bytes sent:")
    lines = []
    for name, one in (("by hand (by_hand.py)", hand), ("DeepSpeed, as strategies/zero/engine.py", deepspeeds)):
        lines.append([name, f"{one.away_from(alone):.1e}", *(f"{one.payload(collective):,}" for collective in SENT)])
    lines.append(["the books", "0", *(f"{booked(run, purpose, launch.rank):,}" for purpose in SENT.values())])
    print(table(["", "off one process", "gradients reduced", "parameters gathered"], lines))
    print("\nWhat this rank holds before the update (MiB):")
    rows = {
        "one process": alone.held,
        "by hand": hand.held,
        "DeepSpeed": deepspeeds.held,
        "the books": predict_memory(run)[launch.rank]["after backward"],
    }
    print(states_table(rows))
    print(
        save_figure("lesson_05_zero1", lambda figure: draw_states(figure.subplots(), rows, "What rank 0 holds (MiB)"))
    )


def books_alone(launch, guess) -> None:
    """No ranks are needed to know what they would hold."""
    run = replace(launched_scenario(launch), strategy="zero1", engine={"zero_optimization": {"stage": 1}})
    text, rows = books_by_ranks({f"{n}": replace(run, world_size=n) for n in (1, 2, 4, 8, 64)})
    print(f"\nThe books for {run.parameters:,} parameters under ZeRO-1 in {run.precision} (MiB on rank 0):")
    print(text)
    guess.tell(rows[f"{guess.ranks}"]["optimizer states"] / 2**20)
    print("\nMaster weights and optimizer states shrink with the ranks; parameters do not.")
    print("(For ZeRO-1 itself launch this on several ranks; README.md has the command.)")
    print(save_figure("lesson_05_books", lambda figure: draw_states(figure.subplots(), rows, "Rank 0 by ranks (MiB)")))


if __name__ == "__main__":
    guarded(main)
