"""Lesson 6: ten steps in one process, under ZeRO-2 by hand, and under DeepSpeed; and gradients while backward runs.

accelerate launch --config_file …/cpu/zero2.yaml demo.py        two ranks (--num_processes 4 for more)
python demo.py                                                  one process: the books alone, for more and more ranks
"""

from dataclasses import replace

import torch.distributed as dist

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
from lessons.kit import CONFIG, build, headline, launched, launched_scenario, open_text, prepare, save_figure, table
from shardrun.lesson.guess import guess_first
from shardrun.tables import mib
from speedrun.run.ending import guarded
from strategies.errors import UserError
from strategies.forecast.predict import predict_memory
from strategies.ledger.memory import measure

TO_OWNERS = {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}}
"""The DeepSpeed setting that does what by_hand.py does."""
BUCKETS = {"everything waits": 2**40, "131,072": 2**17, "32,768": 2**15}
"""Elements of a bucket of the hand-written ZeRO-2."""


def main() -> None:
    guess = guess_first(6)
    launch, strategy = launched()
    place = strategy.settings.place
    if launch.world_size == 1:
        print(headline(launch, "ZeRO-2"))
        books_alone(launch, guess)
        return
    if launch.strategy != "zero2":
        raise UserError(f"this demo compares with ZeRO-2, not with {launch.strategy}; launch it with cpu/zero2.yaml.")
    alone = compared.train_alone(place.device)
    hand = compared.train_by_hand(by_hand(place), place)
    alive = {name: on_all_ranks(gradients_alive(by_hand(place, size), place)) for name, size in BUCKETS.items()}
    prepare(strategy, accumulation=ACCUMULATION)
    deepspeeds = compared.train_strategy(strategy)
    if launch.rank == 0:
        report(launch, alone, hand, deepspeeds, alive)
        guess.tell(deepspeeds.held["gradients"] / 2**20)


def by_hand(place, bucket: int = 2**17):
    model = build().to(place.device)
    return load_beside(__file__, "by_hand").HandZero2(model, groups_of(model), bucket)


def gradients_alive(zero, place) -> list[int]:
    """Bytes of gradients that are alive after each parameter's has come, in one backward pass."""
    alive = []
    for p in zero.model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(measure(zero.held())["gradients"]))
    _, inputs, targets = next(iter(compared.micro_batches(open_text(), place, step=0)))
    zero.backward(zero.model(inputs, targets), last=True)
    return [*alive, measure(zero.held())["gradients"]]


def on_all_ranks(mine: list[int]) -> list[list[int]]:
    every: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    return every


def report(launch, alone, hand, deepspeeds, alive) -> None:
    books = launched_scenario(launch, accumulation=ACCUMULATION)
    hands = replace(books, engine=TO_OWNERS, precision="fp32")
    print(headline(launch, "ZeRO-2"))
    print(f"\n{STEPS} steps of {CONFIG.data.global_batch} rows, {ACCUMULATION} micro-batches a rank; bytes of a step:")
    lines = []
    for name, one, run in (("by hand", hand, hands), ("DeepSpeed", deepspeeds, books)):
        gradients = one.payload("reduce", "all_reduce")
        sent = (gradients, one.payload("all_gather"), ring_of(one))
        lines.append(traffic_line(name, one.away_from(alone), *sent))
        predicted = booked(run, "gradients", launch.rank), booked(run, "parameters", launch.rank)
        lines.append(traffic_line("  the books", None, *predicted, on_the_wire(run, launch.rank)))
    print(traffic_table(lines))
    print("\nBy hand gradients are reduced to their owners; DeepSpeed's default all-reduces them.")
    print("\nWhat this rank holds before the update (MiB):")
    rows = {
        "one process": alone.held,
        "by hand": hand.held,
        "DeepSpeed": deepspeeds.held,
        "the books": predict_memory(books)[launch.rank]["after backward"],
    }
    print(states_table(rows))
    print("\nGradients alive at most while a backward pass runs, by hand (MiB), by the elements of a bucket:")
    lines = [[name, *(mib(max(sizes)) for sizes in ranks[:4])] for name, ranks in alive.items()]
    print(table(["bucket", *(f"rank {rank}" for rank in range(min(launch.world_size, 4)))], lines))
    print(save_figure("lesson_06_zero2", lambda figure: draw(figure, rows, alive)))


def books_alone(launch, guess) -> None:
    """No ranks are needed to know what they would hold and send."""
    run = launched_scenario(launch)
    run = replace(run, strategy="zero2", engine={"zero_optimization": {"stage": 2}})
    text, rows = books_by_ranks({f"{n}": replace(run, world_size=n) for n in (1, 2, 4, 8, 64)})
    print(f"\nThe books for {run.parameters:,} parameters under ZeRO-2 in {run.precision} (MiB, rank 0):")
    print(text)
    guess.tell(rows[f"{guess.ranks}"]["gradients"] / 2**20)
    print("\nWhat a rank puts on the wire in a step (MiB), on 8 ranks, by the number of micro-batches:")
    lines = []
    for name, other in {
        "ZeRO-1": {"strategy": "zero1", "engine": {"zero_optimization": {"stage": 1}}},
        "ZeRO-2": {},
        "ZeRO-2, reduced to owners": {"engine": TO_OWNERS},
    }.items():
        runs = [replace(run, world_size=8, accumulation=n, **other) for n in (1, 2, 4, 8)]
        lines.append([name, *(mib(on_the_wire(one)) for one in runs)])
    print(table(["", "1", "2", "4", "8"], lines))
    print("\n(For ZeRO-2 itself launch this on several ranks; README.md has the command.)")
    print(save_figure("lesson_06_books", lambda figure: draw_states(figure.subplots(), rows, "Rank 0 by ranks (MiB)")))


def draw(figure, rows, alive) -> None:
    left, right = figure.subplots(1, 2)
    draw_states(left, rows, "What rank 0 holds (MiB)")
    for name, ranks in alive.items():
        right.plot([size / 2**20 for size in ranks[-1]], label=f"bucket: {name}", drawstyle="steps-post")
    right.set_title("The last rank's gradients while backward runs (MiB)", loc="left")
    right.set_xlabel("gradients that have come")
    right.legend(frameon=False)


if __name__ == "__main__":
    guarded(main)
