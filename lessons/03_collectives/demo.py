"""Lesson 3: a ring all-reduce step by step, then real collectives with their bytes counted and timed.

python demo.py                                                       the ring on paper
accelerate launch --config_file …/cpu/ddp.yaml demo.py               and on real ranks (--num_processes 4 for more)
"""

import time

import torch
import torch.distributed as dist

from lessons.kit import headline, launched, launched_scenario, open_text, prepare, rows_of, save_figure, table
from shardrun.lesson.guess import guess_first
from speedrun.run.ending import guarded
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.terms import ring_bytes
from strategies.ledger.wire import Meter

SIZES = (2**10, 2**14, 2**18, 2**22)
"""Of the tensors that are timed, in bytes."""


def main() -> None:
    guess = guess_first(3)
    launch, strategy = launched()
    times, lines = {}, []
    if launch.world_size > 1:
        times, lines = measure(strategy.settings.place)
    step = one_step(launch, strategy)
    if launch.rank == 0:
        report(launch, times, lines, step, guess)


def ring(world_size: int) -> list[list[list[str]]]:
    """All-reduce on paper: step → rank → chunk → whose parts are added up in it."""
    held = [[{rank} for _ in range(world_size)] for rank in range(world_size)]
    states = [[["".join(map(str, sorted(part))) for part in rank] for rank in held]]
    for step in range(2 * (world_size - 1)):
        before = [[set(part) for part in rank] for rank in held]
        for rank in range(world_size):
            chunk = (rank - 1 - step) % world_size  # what this rank passes on to the right
            right = (rank + 1) % world_size
            adds = step < world_size - 1
            held[right][chunk] = before[rank][chunk] | (before[right][chunk] if adds else set())
        states.append([["".join(map(str, sorted(part))) for part in rank] for rank in held])
    return states


def calls(place, elements: int) -> dict:
    """Name → a function that calls the collective with so many float32 elements of payload."""
    n = place.world_size
    whole = torch.ones(elements // n * n, device=place.device)
    parts = list(whole.chunk(n))  # views: what is gathered into them is in `whole`
    part = parts[0].clone()
    return {
        "broadcast": lambda: dist.broadcast(whole, 0),
        "reduce_scatter": lambda: dist.reduce_scatter(part, parts),
        "all_gather": lambda: dist.all_gather(parts, part),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }


def measure(place) -> tuple[dict[str, list[float]], list[list[str]]]:
    """Milliseconds of each collective by size, and what the meter counted at 1 MiB."""
    times: dict[str, list[float]] = {}
    for size in SIZES:
        for name, call in calls(place, size // 4).items():
            call()
            dist.barrier()
            started = time.perf_counter()
            for _ in range(5):
                call()
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            times.setdefault(name, []).append((time.perf_counter() - started) / 5 * 1e3)
    lines = []
    for name, call in calls(place, 2**18).items():
        with Meter() as meter:
            call()
        sent = next(line for line in meter.lines() if line.collective == name)
        lines.append([name, f"{sent.payload_bytes:,}", f"{sent.ring_bytes:,.0f}", f"{times[name][-1]:.2f}"])
    return times, lines


def one_step(launch, strategy) -> list[list[str]]:
    """What a training step of the launched strategy sends: predicted, and counted by the meter."""
    prepare(strategy)
    data = open_text()
    for step in range(3):  # the first steps send a little more: engines agree on things
        inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
        with Meter() as meter:
            with strategy.micro_batch(last=True):
                strategy.backward(strategy.model(inputs, targets))
            strategy.step()
    predicted: dict[str, int] = {}
    for entry in predict_traffic(launched_scenario(launch), launch.rank):
        if entry.purpose != "bookkeeping":
            predicted[entry.collective] = predicted.get(entry.collective, 0) + entry.payload_bytes
    counted = {line.collective: line for line in meter.lines() if line.purpose == "payload"}
    return [
        [name, f"{counted[name].calls}", f"{predicted.get(name, 0):,}", f"{counted[name].payload_bytes:,}"]
        for name in counted
    ]


def report(launch, times, lines, step, guess) -> None:
    print(headline(launch, "Collectives"))
    print("\nAn all-reduce on a ring of 3, on paper. A rank's three chunks, and whose parts are summed in each:")
    states = ring(3)
    rows = [
        [f"rank {rank}", *("  ".join(f"{part:>3}" for part in state[rank]) for state in states)] for rank in range(3)
    ]
    print(table(["", "start", *(f"step {step}" for step in range(1, 5))], rows))
    print("Steps 1 and 2 are the reduce-scatter: rank r ends with chunk r complete. 3 and 4 are the all-gather.")
    print("In each of the 2 · (3 − 1) steps every rank sends one chunk, a third of the tensor, to the next.")
    if lines:
        print(f"\nReal collectives on {launch.world_size} ranks, 1 MiB of float32; bytes as the meter counts them:")
        print(table(["", "payload", "on a ring, per rank", "ms at 4 MiB"], lines))
    else:
        print("\n(For real collectives launch this on several ranks; README.md has the command.)")
    if step:
        print(f"\nOne training step under {launch.strategy}, payload in bytes:")
        print(table(["", "calls", "predicted", "counted"], step))
    guess.tell(ring_bytes("all_reduce", 100, guess.ranks))
    print()
    print(save_figure("lesson_03_collectives", lambda figure: draw(figure, times)))


def draw(figure, times) -> None:
    left, *right = figure.subplots(1, 2 if times else 1, squeeze=False)[0]
    ranks = [2, 4, 8, 16, 32, 64]
    left.plot(ranks, [ring_bytes("all_reduce", 1, n) for n in ranks], "o-", label="ring: 2 (N − 1)/N")
    left.plot(ranks, [n - 1 for n in ranks], "s--", label="everyone to everyone: N − 1")
    left.set_xscale("log", base=2)
    left.set_xticks(ranks, ranks)
    left.set_yscale("log")
    left.set_title("All-reduce: tensors sent per rank, by N", loc="left")
    left.legend(frameon=False)
    for axes in right:
        for name, values in times.items():
            axes.plot(SIZES, values, "o-", label=name)
        axes.set_title("Milliseconds by bytes", loc="left")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(frameon=False)


if __name__ == "__main__":
    guarded(main)
