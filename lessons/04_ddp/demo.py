"""Lesson 4: the same ten steps in one process, under DDP by hand, and under torch's DDP: weights, bytes, overlap.

accelerate launch --config_file …/cpu/ddp.yaml demo.py          two ranks (--num_processes 4 for more)
python demo.py                                                  one process: global = local × ranks × accumulation
"""

import time
from dataclasses import replace

import torch

from lessons import compared
from lessons.compared import ACCUMULATION, STEPS
from lessons.kit import CONFIG, build, headline, launched, launched_scenario, prepare, save_figure, table
from shardrun.colours import ACCENT, COLOURS, SENT
from shardrun.lesson.guess import guess_first
from speedrun.run.ending import guarded
from strategies.errors import UserError
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic

BUCKET = 2**19
"""Bytes of a bucket of the hand-written DDP: small, so that this small model has several."""


def main() -> None:
    guess = guess_first(4)
    launch, strategy = launched()
    device = strategy.settings.place.device
    if launch.world_size == 1:
        print(headline(launch, "DDP"))
        product_of_three(device)
        tell(guess, launch)
        return
    if launch.strategy != "ddp":
        raise UserError(f"this demo compares with DDP, not with {launch.strategy}; launch it with cpu/ddp.yaml.")
    if launch.precision != "fp32":
        raise UserError("this demo compares weights, and bf16 would hide its answer; add --mixed_precision no.")
    alone = compared.train_alone(device)
    model = build().to(device)
    ddp = compared.load_beside(__file__, "by_hand").HandDDP(model, compared.groups_of(model), BUCKET)
    sent_at = watch(ddp)
    hand = compared.train_by_hand(ddp, strategy.settings.place)
    prepare(strategy, accumulation=ACCUMULATION)
    torchs = compared.train_strategy(strategy)
    if launch.rank == 0:
        report(launch, alone, hand, torchs, sent_at)
        tell(guess, launch)


def tell(guess, launch) -> None:
    """Bytes of gradients per parameter in a step, by the books."""
    run = replace(
        launched_scenario(launch, accumulation=ACCUMULATION), strategy="ddp", world_size=guess.ranks, engine={}
    )
    guess.tell(compared.booked(run, "gradients") / run.parameters)


def watch(ddp) -> list[list[float]]:
    """Note when each bucket of a step is sent, in ms since its first gradient's; the last entry is the end."""
    steps: list[list[float]] = []

    def note(event, bucket) -> None:
        if event == "arrived":
            if ddp.last and all(b.work is None and b.missing == len(b.parameters) for b in ddp.buckets):
                steps.append([time.perf_counter()])
            return
        steps[-1].append(time.perf_counter())

    ddp.observe = note
    return steps


def product_of_three(device: torch.device) -> None:
    """One process: accumulation stands in for ranks."""
    print(f"\nA global batch of {CONFIG.data.global_batch} rows = local rows × ranks × accumulation, here on one rank:")
    whole, *others = (compared.train_alone(device, STEPS, accumulation) for accumulation in (1, 2, 4, 8))
    apart = {f"{16 // 2**i} × 1 × {2**i}": other.away_from(whole) for i, other in enumerate(others, start=1)}
    rows = [["16 × 1 × 1", "(the reference)"], *([name, f"{value:.1e}"] for name, value in apart.items())]
    print(table(["local × ranks × accumulation", f"largest difference in a weight after {STEPS} steps"], rows))
    print("\nThe differences are rounding: sums in another order.")
    print("(For DDP itself launch this on several ranks; README.md has the command.)")

    def draw_differences(figure) -> None:
        axes = figure.subplots()
        axes.bar(list(apart), list(apart.values()))
        axes.set_title("Largest difference in a weight from one micro-batch of 16 rows", loc="left")

    print(save_figure("lesson_04_accumulation", draw_differences))


def report(launch, alone, hand, torchs, sent_at) -> None:
    run = launched_scenario(launch, accumulation=ACCUMULATION)
    print(headline(launch, "DDP"))
    print(f"\n{STEPS} steps of the same {CONFIG.data.global_batch} rows, {ACCUMULATION} micro-batches a rank:")
    names = {"by hand (by_hand.py)": hand, "torch's DDP (strategies/ddp)": torchs}
    lines = []
    for name, run_ in names.items():
        sent = [line for line in run_.sent if line.purpose == "payload" and line.collective == "all_reduce"]
        calls, payload = sum(line.calls for line in sent), sum(line.payload_bytes for line in sent)
        lines.append([name, f"{run_.away_from(alone):.1e}", f"{calls}", f"{payload:,}"])
    booked = [entry for entry in predict_traffic(run, launch.rank) if entry.purpose == "gradients"]
    lines.append(["the books", "0", "", f"{sum(entry.payload_bytes for entry in booked):,}"])
    print(table(["", "weights: from one process", "all-reduces", "bytes a step"], lines))
    print("\nWhat each rank holds before the update (bytes): nothing is saved by DDP")
    parts = ("parameters", "gradients", "optimizer states")
    books = predict_memory(run)[launch.rank]["after backward"]
    rows = {"one process": alone.held, "by hand": hand.held, "torch": torchs.held, "the books": books}
    print(table(["", *parts], [[name, *(f"{memory[part]:,}" for part in parts)] for name, memory in rows.items()]))
    first, *buckets, computed, done = sent_at[-1]
    print("\nOverlap in the last step, by hand (ms after the first gradient):")
    print("  buckets sent at " + ", ".join(f"{(t - first) * 1e3:.1f}" for t in buckets), end="; ")
    print(f"backward ended at {(computed - first) * 1e3:.1f}, the last all-reduce at {(done - first) * 1e3:.1f}")
    print(save_figure("lesson_04_ddp", lambda figure: draw(figure, sent_at, hand, torchs, alone)))


def draw(figure, sent_at, hand, torchs, alone) -> None:
    left, right = figure.subplots(1, 2)
    for row, times in enumerate(sent_at[-5:]):
        first, *buckets, computed, done = ((t - times[0]) * 1e3 for t in times)
        left.barh(row, computed, color=ACCENT, height=0.6, label="backward" if not row else None)
        left.barh(row, done - computed, left=computed, color=SENT, height=0.6, label=None if row else "waiting")
        left.plot(buckets, [row] * len(buckets), "k|", markersize=14, label="bucket sent" if not row else None)
    left.set_title("Backward and all-reduce, the last five steps (ms)", loc="left")
    left.set_ylim(-0.6, 5.4)
    left.set_yticks([])
    left.legend(frameon=False, ncols=3, fontsize=8, loc="upper left")
    names, bottom = ["one process", "by hand", "torch's DDP"], [0.0] * 3
    for kind in ("parameters", "gradients", "optimizer states"):
        values = [memory.held[kind] / 2**20 for memory in (alone, hand, torchs)]
        right.bar(names, values, 0.6, bottom=bottom, label=kind, color=COLOURS[kind])
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    right.set_title("What each rank holds (MiB)", loc="left")
    right.set_ylim(0, 1.3 * max(bottom))
    right.legend(frameon=False, ncols=3, fontsize=8)


if __name__ == "__main__":
    guarded(main)
