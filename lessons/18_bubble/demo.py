"""Lesson 18: what a step computes, what it sends, and for how long it waits; the same bytes over several links.

python demo.py                                                  GPT-2 on 8×H100, from the books alone
python demo.py runs/NAME                                        a run of the trainer, from what it has left
accelerate launch --config_file …/cpu/ddp.yaml demo.py          measured here, with and without communication
"""

import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from lessons.kit import CONFIG, headline, launched, open_text, prepare, rows_of, save_figure, steps, table
from shardrun.colours import ACCENT, SENT
from shardrun.lesson.guess import guess_first
from speedrun.books.shapes import ledger_groups, shapes_from
from speedrun.presets import PRESETS
from speedrun.run.ending import guarded
from strategies.base import Settings
from strategies.catalogue import engine as make
from strategies.forecast.timing import communication
from strategies.forecast.traffic import predict_traffic
from strategies.ledger import book
from strategies.ledger.hardware import GPUS, LATENCY, MFU
from strategies.ledger.terms import Scenario
from strategies.ledger.wire import Meter
from strategies.mesh import Place

LINKS = {"NVLink 4": 450e9, "InfiniBand": 50e9, "PCIe 4 ×16": 32e9, "Ethernet": 1.25e9}
"""Bytes per second each way, of data sheets: H100 SXM, 400 Gb/s, 16 lanes of PCIe 4, 10 Gb/s."""
ENGINES = {
    "ddp": {},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "fsdp": {"reshard_after_forward": True, "wrap": ["Block"]},
}
RANKS, TOKENS = 8, 8 * 1024
"""Ranks, and tokens of a rank's micro-batch."""
STEPS = steps(10)


def main() -> None:
    if len(sys.argv) > 1:
        from_record(Path(sys.argv[1]))
        return
    guess = guess_first(18) if os.environ.get("WORLD_SIZE", "1") == "1" else None
    launch, strategy = launched()
    if launch.world_size == 1:
        books_alone(guess)
    else:
        measured(launch, strategy)


def books_alone(guess) -> None:
    """GPT-2 on 8×H100: no machine is needed to know what it would wait for."""
    _, config = PRESETS["gpt2"]
    shapes, groups = shapes_from(config.model), ledger_groups(config)
    run = Scenario("ddp", shapes, groups, RANKS, "bf16")
    compute = 6 * run.parameters * TOKENS / (GPUS["h100"].flops * MFU)
    print(
        f"GPT-2, {run.parameters / 1e6:.0f}M parameters, on {RANKS} × H100 in bf16, {TOKENS:,} tokens a rank and step."
    )
    print(f"Compute: 6 · Ψ · tokens at {MFU:.0%} of 989 TFLOP/s: {compute * 1e3:.1f} ms.")
    waits, lines = {}, []
    for name, engine in ENGINES.items():
        entries = predict_traffic(replace(run, strategy=name, engine=engine))
        times = [communication(entries, name, compute, 1, link) for link in LINKS.values()]
        waits[name] = [exposed * 1e3 for _, exposed in times]
        sent = sum(entry.ring_bytes for entry in entries)
        lines.append([name, f"{sent / 1e6:,.0f}", *(f"{all_of_it * 1e3:,.1f}" for all_of_it, _ in times)])
    print("\nCommunication of a step, from the books (ms):")
    print(table(["", "MB sent", *LINKS], lines))
    print("\nThe bubble: what of it no computation can hide (ms), and its share of the step:")
    shares = [
        [name, *(f"{ms:,.1f} ({ms / (compute * 1e3 + ms):.0%})" for ms in exposed)] for name, exposed in waits.items()
    ]
    print(table(["", *LINKS], shares))
    waited = waits["ddp"][list(LINKS).index("PCIe 4 ×16")]
    guess.tell(100 * waited / (compute * 1e3 + waited))
    print("\nTokens a rank needs per step until DDP's all-reduce hides behind backward, whatever the model:")
    rate = GPUS["h100"].flops * MFU
    needed = [2 * (RANKS - 1) / RANKS * 4 * rate / (4 * link) for link in LINKS.values()]
    print(table(["", *LINKS], [["tokens", *(f"{tokens:,.0f}" for tokens in needed)]]))
    print(save_figure("lesson_18_bubble", lambda figure: draw(figure.subplots(), compute * 1e3, waits)))


def from_record(folder: Path) -> None:
    """What a run's books would cost on other links. Nothing is trained."""
    try:
        config, books = json.loads((folder / "config.json").read_text()), book.read(folder)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {error.filename}; name a finished run's folder, runs/NAME.") from None
    launch, traffic = config["launch"], books["ranks"][0]["traffic"]
    timed = [line for line in steps if not line.get("counted")] or steps  # a counted step takes longer
    took = statistics.median(line["compute_time_ms"] for line in timed if line.get("compute_time_ms"))
    print(f"{folder}: {launch['strategy']} on {launch['world_size']} ranks, {config['parameters']:,} parameters")
    print("\nWhat rank 0 sent in a step, by its ledger:")
    lines = [
        [f"{line['collective']}, {line['purpose']}", f"{line['calls']}", f"{line['measured']:,}"]
        + [f"{line['ring_bytes']:,.0f}"]
        for line in traffic
    ]
    print(table(["", "calls", "payload bytes", "bytes on a ring"], lines))
    calls, sent = sum(line["calls"] for line in traffic), sum(line["ring_bytes"] for line in traffic)
    print(f"\nA step took {took:.1f} ms (median), communication over this machine's own link included.")
    print_links(took / 1e3, calls, sent)
    tokens = steps[-1]["tokens"] / steps[-1]["step"] / launch["world_size"]
    gpu = 6 * config["parameters"] * tokens / (GPUS["h100"].flops * MFU)
    print(f"\nOn H100s, at {MFU:.0%} of the peak, {tokens:,.0f} tokens a rank take {gpu * 1e3:.3f} ms.")
    print_links(gpu, calls, sent)


def measured(launch, strategy) -> None:
    """The same rows with and without communication, on all ranks at the same time."""
    place = strategy.settings.place
    alone = make("single", Settings(Place(0, 1, place.device), launch.precision, {}))
    prepare(alone)
    compute, _ = seconds_per_step(alone, launch)
    prepare(strategy)
    step, meter = seconds_per_step(strategy, launch)
    if launch.rank:
        return
    sent = sum(line.ring_bytes for line in meter.lines())
    print(headline(launch, "The bubble"))
    rows = CONFIG.data.global_batch // launch.world_size
    print(f"\n{rows} rows a rank and step, median of {STEPS} steps, all ranks at once:")
    print(f"  without communication  {compute * 1e3:8.1f} ms")
    print(f"  with it                {step * 1e3:8.1f} ms")
    print(f"  exposed                {(step - compute) * 1e3:8.1f} ms for {len(meter.sent)} calls, {sent / 1e6:.2f} MB")
    if step > compute:
        print(f"As if nothing were hidden and the link had {sent / (step - compute) / 1e6:,.0f} MB/s.")
    print()
    print_links(compute, len(meter.sent), sent)


def print_links(compute: float, calls: int, sent: float) -> None:
    """The same bytes over several links, beside `compute` seconds."""
    lines = []
    for name, link in LINKS.items():
        seconds = calls * LATENCY + sent / link
        whole, hidden = compute + seconds, max(compute, seconds)
        lines.append([name, f"{seconds * 1e3:,.3f}", f"{seconds / whole:.1%}", f"{(hidden - compute) / hidden:.1%}"])
    print(f"The same bytes over other links, {LATENCY * 1e6:.0f} µs per call; the bubble's share of a step:")
    print(table(["", "communication (ms)", "if nothing is hidden", "if all can be"], lines))


def seconds_per_step(strategy, launch) -> tuple[float, Meter]:
    """The median, and the meter of one more step."""
    data, times = open_text(), []
    for step in range(STEPS + 2):
        inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
        dist.barrier()
        started = time.perf_counter()
        train_step(strategy, inputs, targets)
        times.append(time.perf_counter() - started)
    with Meter() as meter:
        train_step(strategy, inputs, targets)
    return statistics.median(times[2:]), meter


def train_step(strategy, inputs, targets) -> None:
    with strategy.micro_batch(last=True):
        loss = strategy.model(inputs, targets)
        strategy.backward(loss)
    strategy.step()  # returns the gradients' norm as a number, so that a GPU is done as well


def draw(axes, compute: float, waits: dict[str, list[float]]) -> None:
    """Compute and bubble by strategy, over NVLink and over PCIe."""
    places, names = [], []
    for i, (name, exposed) in enumerate(waits.items()):
        for j, link in enumerate(("NVLink 4", "PCIe 4 ×16")):
            wait = exposed[list(LINKS).index(link)]
            first = not i and not j
            axes.barh(3 * i + j, compute, color=ACCENT, label="compute" if first else None)
            axes.barh(3 * i + j, wait, left=compute, color=SENT, label="bubble" if first else None)
            places.append(3 * i + j)
            names.append(f"{name}, {link}")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_title("A step of GPT-2 on 8×H100, predicted (ms)", loc="left")
    axes.legend(frameon=False)


if __name__ == "__main__":
    guarded(main)
