"""Lesson 7: ten steps in one process, under ZeRO-3 by hand, and under DeepSpeed; and what is gathered when.

accelerate launch --config_file …/cpu/zero3.yaml demo.py        two ranks (--num_processes 4 for more)
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
from strategies.forecast.traffic import predict_traffic

LET_GO = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}
"""The DeepSpeed settings that do what by_hand.py does: every module's parameters are let go after it."""
WAYS = {
    "one module at a time": {"prefetch": False},
    "prefetch": {},
    "kept for backward": {"keep": True},
}


def main() -> None:
    guess = guess_first(7)
    launch, strategy = launched()
    place = strategy.settings.place
    if launch.world_size == 1:
        print(headline(launch, "ZeRO-3"))
        books_alone(launch, guess)
        return
    if launch.strategy != "zero3":
        raise UserError(f"this demo compares with ZeRO-3, not with {launch.strategy}; launch it with cpu/zero3.yaml.")
    alone = compared.train_alone(place.device)
    hand = compared.train_by_hand(by_hand(place), place)
    kept = compared.train_by_hand(by_hand(place, keep=True), place)
    gathered = {name: gathered_bytes(by_hand(place, **options), place) for name, options in WAYS.items()}
    prepare(strategy, accumulation=ACCUMULATION)
    deepspeeds = compared.train_strategy(strategy)
    if launch.rank == 0:
        report(launch, alone, hand, kept, deepspeeds, gathered)
        guess.tell(deepspeeds.held["parameters"] / 2**20)


def by_hand(place, **options):
    model = build().to(place.device)
    return load_beside(__file__, "by_hand").HandZero3(model, groups_of(model), **options)


def gathered_bytes(zero, place) -> list[int]:
    """Bytes of whole parameters whenever a module begins, in a forward and a backward pass, the second of two."""
    found: list[int] = []

    def note(phase, module) -> None:
        found.append(sum(cut.whole.untyped_storage().nbytes() for cut in zero.cuts.values()))

    zero.observe = note
    _, inputs, targets = next(iter(compared.micro_batches(open_text(), place, step=0)))
    for _ in range(2):  # in the first pass it learns which module comes next
        found.clear()
        zero.backward(zero.model(inputs, targets), last=True)
    return found


def report(launch, alone, hand, kept, deepspeeds, gathered) -> None:
    books = launched_scenario(launch, accumulation=ACCUMULATION)
    by_hands = replace(books, engine=LET_GO, precision="fp32")
    keeping = replace(by_hands, engine={"zero_optimization": {"stage": 3}})
    print(headline(launch, "ZeRO-3"))
    print(f"\n{STEPS} steps of {CONFIG.data.global_batch} rows, {ACCUMULATION} micro-batches a rank; bytes of a step:")
    lines = []
    for name, one, run in (
        ("by hand, let go after forward", hand, by_hands),
        ("by hand, kept for backward", kept, keeping),
        ("DeepSpeed", deepspeeds, books),
    ):
        sent = (one.payload("reduce_scatter"), one.payload("all_gather"), ring_of(one))
        lines.append(traffic_line(name, one.away_from(alone), *sent))
        predicted = booked(run, "gradients", launch.rank), booked(run, "parameters", launch.rank)
        lines.append(traffic_line("  the books", None, *predicted, on_the_wire(run, launch.rank)))
    print(traffic_table(lines))
    print("\nWhat this rank holds before the update (MiB):")
    rows = {
        "one process": alone.held,
        "by hand": hand.held,
        "DeepSpeed": deepspeeds.held,
        "the books": predict_memory(books)[launch.rank]["after backward"],
    }
    print(states_table(rows))
    print("\nWhole parameters in a forward and a backward pass by hand, beside the cuts (MiB):")
    print(table(["", "at most"], [[name, mib(max(sizes))] for name, sizes in gathered.items()]))
    print(save_figure("lesson_07_zero3", lambda figure: draw(figure, rows, gathered)))


def books_alone(launch, guess) -> None:
    """No ranks are needed to know what they would hold and send."""
    run = launched_scenario(launch)
    run = replace(run, strategy="zero3", engine={"zero_optimization": {"stage": 3}})
    text, rows = books_by_ranks({f"{n}": replace(run, world_size=n) for n in (1, 2, 4, 8, 64)})
    print(f"\nThe books for {run.parameters:,} parameters under ZeRO-3 in {run.precision} (MiB, rank 0):")
    print(text)
    guess.tell(rows[f"{guess.ranks}"]["parameters"] / 2**20)
    print("\nWhat a rank puts on the wire in a step (MiB), on 8 ranks, by the number of micro-batches:")
    lines = []
    for name, other in {
        "ZeRO-1": {"strategy": "zero1", "engine": {"zero_optimization": {"stage": 1}}},
        "ZeRO-2": {"strategy": "zero2", "engine": {"zero_optimization": {"stage": 2}}},
        "ZeRO-3, kept for backward": {},
        "ZeRO-3, let go after forward": {"engine": LET_GO},
    }.items():
        runs = [replace(run, world_size=8, accumulation=n, **other) for n in (1, 2, 4, 8)]
        lines.append([name, *(mib(on_the_wire(one)) for one in runs)])
    print(table(["", "1", "2", "4", "8"], lines))
    print("\nThe persistence threshold, 8 ranks, 4 micro-batches, no prefetch (MiB):")
    lines = []
    for threshold in (0, 20_000, 40_000):
        settings = {"stage3_param_persistence_threshold": threshold, "stage3_prefetch_bucket_size": 0}
        engine = {"zero_optimization": {"stage": 3, **settings}}
        here = replace(run, world_size=8, accumulation=4, engine=engine)
        held = predict_memory(here)[0]["after step"]["parameters"]
        [gathers] = [entry for entry in predict_traffic(here) if entry.collective == "all_gather"]
        lines.append([f"{threshold:,}", mib(held), f"{gathers.calls}", mib(gathers.payload_bytes)])
    headings = ["threshold in elements", "parameters held between steps", "gathers a step", "gathered a step"]
    print(table(headings, lines))
    print("\n(For ZeRO-3 itself launch this on several ranks; README.md has the command.)")
    print(save_figure("lesson_07_books", lambda figure: draw_states(figure.subplots(), rows, "Rank 0 by ranks (MiB)")))


def draw(figure, rows, gathered) -> None:
    left, right = figure.subplots(1, 2)
    draw_states(left, rows, "What rank 0 holds (MiB)")
    for name, sizes in gathered.items():
        right.plot([size / 2**20 for size in sizes], label=name, drawstyle="steps-post")
    right.set_title("Whole parameters through forward and backward (MiB)", loc="left")
    right.set_xlabel("modules that have begun")
    right.set_ylim(0, 1.4 * max(size for sizes in gathered.values() for size in sizes) / 2**20)
    right.legend(frameon=False)


if __name__ == "__main__":
    guarded(main)
