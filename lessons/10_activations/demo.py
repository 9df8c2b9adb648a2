"""Lesson 10: where activations go, what checkpointing and micro-batches change, and how to read a trace.

python demo.py                                                  one process: everything, and a trace to open
accelerate launch --config_file …/cpu/fsdp.yaml demo.py         two ranks: each rank's own activations
"""

import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from lessons.kit import (
    CONFIG,
    build,
    doing,
    headline,
    launched,
    open_text,
    prepare,
    rows_of,
    save_figure,
    table,
    watched_forward,
    with_model,
)
from shardrun.colours import ACCENT, SENT
from shardrun.lesson.guess import guess_first
from shardrun.tables import mib
from speedrun.books.activations import predict_activations
from speedrun.config import ModelConfig
from speedrun.presets import PRESETS
from speedrun.run.ending import guarded
from strategies import catalogue
from strategies.ledger.tracer import Tracer

MODEL = with_model(replace(CONFIG, data=replace(CONFIG.data, sequence_length=128, eval_tokens=128)), layers=4)
"""Four blocks and rows of 128 tokens."""
TRACE = Path("runs/lesson_10_trace.json")
LENGTHS = (64, 256, 1024)


def main() -> None:
    guess = guess_first(10)
    launch, first = launched()
    runs = {how: run(launch, first.settings, how) for how in ("none", "selective", "block")}
    cuts = {count: run(launch, first.settings, "none", count) for count in (1, 2, 4)}
    if launch.rank:
        return
    print(headline(launch, "Activations"))
    checkpointing(launch, runs)
    guess.tell(100 * runs["block"]["book"].total / runs["none"]["book"].total)
    accumulation(launch, cuts)
    wall()
    if launch.world_size > 1:
        print("\n(The timeline, the trace and MLP against attention: python demo.py, one process.)")
        return
    device = first.settings.place.device
    curves = {how: timeline(device, how) for how in ("none", "block")}
    trace(device)
    attention_against_mlp(device)
    snapshot(device)
    print(save_figure("lesson_10_activations", lambda figure: draw(figure, runs["none"]["book"], curves)))


# What a forward pass keeps


def run(launch, settings, how: str, accumulation: int = 1) -> dict:
    """Two steps under the launched strategy, the second one's last micro-batch watched."""
    doing(f"checkpointing {how}, {accumulation} micro-batch" + "es" * (accumulation > 1))
    strategy = catalogue.engine(launch.strategy, settings)
    prepare(strategy, with_model(MODEL, checkpointing=how), accumulation)
    data = open_text(MODEL)
    for step in range(2):
        total = 0.0
        inputs, targets = (tensor.to(settings.place.device) for tensor in rows_of(launch, data, step))
        parts = list(zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True))
        for i, part in enumerate(parts):
            with strategy.micro_batch(last=i == accumulation - 1):
                if step == 1 and i == accumulation - 1:
                    loss, book = watched_forward(strategy, *part)
                else:
                    loss = strategy.model(*part)
                strategy.backward(loss)
            total += loss.item() / accumulation
        strategy.step()
    return {"book": book, "rows": len(parts[0][0]), "loss": total}


def predicted(launch, how: str, rows: int):
    precision = "fp32"
    if launch.precision == "bf16":
        precision = "autocast" if launch.strategy in ("single", "ddp") else "bf16"
    model = replace(MODEL.model, checkpointing=how)
    return predict_activations(model, rows, MODEL.data.sequence_length, precision)


def checkpointing(launch, runs) -> None:
    rows = runs["none"]["rows"]
    print(f"\n{rows} rows of {MODEL.data.sequence_length} tokens on this rank, {MODEL.model.layers} blocks. MiB:")
    lines = []
    for how, one in runs.items():
        book, books = one["book"], predicted(launch, how, one["rows"])
        sizes = [mib(size) for size in (book.total, books.total, book.peak, books.peak)]
        lines.append([how, *sizes, f"{one['loss']:.6f}"])
    print(table(["checkpointing", "kept", "predicted", "peak", "predicted", "loss"], lines))
    print("kept: between forward and backward · peak: the most in the forward pass")
    if not launch.cpu:
        print("(The predictions here are of a CPU's kernels; a run's ledger.json and `shardrun plan` have a GPU's.)")
    parts = {how: one["book"].by_part() for how, one in runs.items()}
    names = sorted(parts["none"], key=lambda name: -parts["none"][name])[:7]
    print("\nBy part (MiB):")
    print(table(["part", *runs], [[name, *(mib(parts[how].get(name, 0)) for how in runs)] for name in names]))


def accumulation(launch, cuts) -> None:
    print(f"\nThe same {cuts[1]['rows']} rows a step, in micro-batches:")
    lines = [
        [f"{count} × {one['rows']} rows", mib(one["book"].total), mib(one["book"].peak), f"{one['loss']:.6f}"]
        for count, one in cuts.items()
    ]
    print(table(["", "kept (MiB)", "peak", "loss"], lines))


def wall() -> None:
    """By the books alone: what share of a real model's activations is logits and loss."""
    seven = ModelConfig(vocab_size=50_257, pad_vocab_to=128, layers=32, heads=32, width=4096, tied_head=True)
    print("\nThe logits wall, by the books: bf16 autocast, 8 rows of 1024 tokens, vocabulary of 50,257 (GiB):")
    lines = []
    for name, model in (("gpt2, 124M", PRESETS["gpt2"][1].model), ("7B", seven)):
        for how in ("none", "block"):
            books = predict_activations(replace(model, checkpointing=how), 8, 1024, "autocast")
            logits = books.by_part(peak=True)["logits and loss"]
            lines.append(
                [f"{name}, {how}", f"{books.total / 2**30:.2f}", f"{books.peak / 2**30:.2f}"]
                + [f"{logits / 2**30:.2f}", f"{logits / books.peak:.0%}"]
            )
    print(table(["checkpointing", "kept", "peak", "of it logits and loss", "share"], lines))


# When it is there: the books' own timeline, the profiler's trace, the CUDA snapshot


def example(device):
    model = build(MODEL).to(device)
    inputs, targets = (tensor.to(device) for tensor in open_text(MODEL).batch(0, 0, 16))
    return model, inputs, targets


def timeline(device, how: str) -> list[tuple[str, int]]:
    """(phase, bytes alive) after every allocation and release of one forward and backward pass. No parameters."""
    model = build(with_model(MODEL, checkpointing=how)).to(device)
    _, inputs, targets = example(device)
    tracer = Tracer({id(module): name for name, module in model.named_modules()})
    with tracer:
        tracer.enter(0, "forward")
        loss = model(inputs, targets)
        tracer.enter(0, "backward")
        loss.backward()
    alive, curve = 0, []
    for event in tracer.events:
        alive += {"alloc": event.bytes, "free": -event.bytes}.get(event.kind, 0)
        curve.append((event.phase, alive))
    phase, peak = max(curve, key=lambda point: point[1])
    again = sum(phase == "recompute" for phase, _ in curve)
    tell = f", {again} lines of recomputation" if again else ""
    if how == "none":
        print("\nOne step's log of allocations and releases (the books' own):")
    print(f"  {how:<6} {len(curve)} lines{tell}; peak {mib(peak)} MiB in {phase}; gradients left {mib(alive)} MiB")
    return curve


@contextmanager
def _silent():
    """The profiler's own code writes "USDT: … profiler_start" to stderr, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def trace(device) -> None:
    """A profiler's trace of one step, written for a viewer, and read by eight lines of Python."""
    model, inputs, targets = example(device)
    model(inputs, targets).backward()  # the first call pays for what is done once
    with _silent(), profile(profile_memory=True) as profiler:
        with record_function("forward"):
            loss = model(inputs, targets)
        with record_function("backward"):
            loss.backward()
    TRACE.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(TRACE))
    events = json.loads(TRACE.read_text())["traceEvents"]
    scopes = {e["name"]: e["dur"] / 1e3 for e in events if e.get("cat") == "user_annotation"}
    own = Counter({e.key: e.self_cpu_time_total / 1e3 for e in profiler.key_averages() if e.key.startswith("aten::")})
    print(f"\nThe profiler's trace of one step, {len(events):,} events: {TRACE}")
    print("Open it at ui.perfetto.dev or chrome://tracing (it stays on your machine). What it says:")
    print("  " + " · ".join(f"{name} {scopes[name]:.0f} ms" for name in ("forward", "backward") if name in scopes))
    total = sum(own.values())
    for name, ms in own.most_common(5):
        short = name if len(name) <= 44 else f"{name[:43]}…"
        print(f"  {short:<44} {ms:7.1f} ms of its own, {ms / total:4.0%} of all operators")
    memory = [e["args"]["Bytes"] for e in events if e["name"] == "[memory]"]
    print(f"  [memory]: {sum(b > 0 for b in memory)} allocations, {sum(b < 0 for b in memory)} releases")


def attention_against_mlp(device) -> None:
    """Forward time of the two halves of a block, for longer and longer rows of the same number of tokens."""
    print("\nAttention against MLP: forward pass of the four blocks, 2048 tokens in rows of different length:")
    lines = []
    for length in LENGTHS:
        model = build(with_model(MODEL, max_sequence_length=max(LENGTHS))).to(device)
        tokens = torch.randint(256, (2048 // length, length), device=device)
        times = min((halves(model, tokens) for _ in range(3)), key=sum)
        flops = (8 * MODEL.model.width + 2 * length) / (16 * MODEL.model.width)
        ratio = times[0] / times[1]
        lines.append(
            [
                f"{length}",
                f"{times[0]:.1f}",
                f"{times[1]:.1f}",
                f"{ratio:.2f}",
                f"{flops:.2f}",
                f"{0.5 + length / 6144:.2f}",
            ]
        )
    print(table(["length", "attention ms", "MLP ms", "ratio", "by FLOPs", "by FLOPs at width 768"], lines))
    print("By FLOPs: (8h + 2s) / 16h per token; causal attention looks at half of s tokens on average.")


def halves(model, tokens) -> tuple[float, float]:
    """Milliseconds in all attention modules and in all MLPs."""
    spent = {"attention": 0.0, "mlp": 0.0}
    started, hooks = {}, []

    def now() -> float:
        if tokens.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for name, module in model.named_modules():
        if (kind := name.rpartition(".")[2]) in spent:
            hooks.append(module.register_forward_pre_hook(lambda *_, kind=kind: started.update({kind: now()})))

            def leave(*_, kind=kind) -> None:
                spent[kind] += (now() - started[kind]) * 1e3

            hooks.append(module.register_forward_hook(leave))
    model(tokens, tokens)
    for hook in hooks:
        hook.remove()
    return spent["attention"], spent["mlp"]


def snapshot(device) -> None:
    """CUDA's own log of its allocator, with the line of Python that made each block."""
    if device.type != "cuda":
        print("\nNo CUDA memory snapshot here: it is a log of the GPU's allocator. README.md says how to read one.")
        return
    torch.cuda.memory._record_memory_history()
    model, inputs, targets = example(device)
    model(inputs, targets).backward()
    path = TRACE.with_name("lesson_10_snapshot.pickle")
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
    print(f"\nCUDA memory snapshot: {path}; drop it on pytorch.org/memory_viz (it stays in your browser).")


def draw(figure, book, curves) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    parts = list(book.by_part().items())[:7][::-1]
    left.barh([name for name, _ in parts], [size / 2**20 for _, size in parts], color=ACCENT)
    left.set_title("Kept for backward (MiB)", loc="left")
    for (how, curve), colour in zip(curves.items(), (ACCENT, SENT), strict=True):
        share = [i / len(curve) for i in range(len(curve))]
        right.plot(share, [alive / 2**20 for _, alive in curve], label=f"checkpointing {how}", color=colour)
        turn = next(i for i, (phase, _) in enumerate(curve) if phase != "forward") / len(curve)
        right.axvline(turn, color=colour, linestyle=":", linewidth=1)
    right.set_title("Alive during a step (MiB); dotted: backward begins", loc="left")
    right.set_xlabel("share of the log")
    right.legend(frameon=False)


if __name__ == "__main__":
    guarded(main)
