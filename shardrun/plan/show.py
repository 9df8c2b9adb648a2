"""How a plan is printed: what it is of, memory, moments, traffic and times, and where the figures come from."""

import argparse

from shardrun.plan.estimates import OTHER, OVERHEAD, TENSORS, Estimate, kernels_line
from shardrun.tables import gib, paragraph, table, wrapped
from speedrun.books.forward_pass import compute_precision
from speedrun.books.shapes import scenario_of
from speedrun.config import Config
from strategies import catalogue
from strategies.forecast.traffic import explain_volume
from strategies.ledger.hardware import GIB, LATENCY, LESS, MARGIN, MORE, NODE, OUTSIDE, Gpu
from strategies.ledger.terms import FP32, Scenario


def headline(config: Config, gpu: Gpu, arguments: argparse.Namespace, estimates: list[Estimate]) -> None:
    """estimates: none for a sweep."""
    model = config.model
    psi = scenario_of(config, "single", 1, arguments.precision).parameters
    ranks = str(arguments.world) if estimates else "1 … 1024"
    paragraph(
        f"{psi / 1e6:,.1f}M parameters ({model.layers} layers, width {model.width}, {model.heads} heads, "
        f"{config.optimizer.name}) in {arguments.precision}"
    )
    paragraph(f"{ranks} × {gpu.name}, {gpu.memory / GIB:.1f} GiB each, checkpointing {model.checkpointing}")
    by_stage: dict[str, list[str]] = {}
    for e in estimates:
        by_stage.setdefault(str(e.planned), []).append(e.strategy)
    for stage, names in by_stage.items():
        under = f", under {', '.join(names)}" if len(by_stage) > 1 else ""
        most = f" (of {len(config.schedule.stages)} stages the one that needs most memory{under})"
        paragraph(stage + (most if config.schedule.stages else ""))
    for line in dict.fromkeys(kernels_line(e.planned) for e in estimates):
        paragraph(line)
    print()


def total_range(e: Estimate) -> list[int]:
    """The least and the most bytes that the total may be in truth."""
    return [round(e.total * (1 - LESS)), round(e.total * (1 + MORE))]


def memory(estimates: list[Estimate]) -> None:
    headings = [
        "strategy",
        "params",
        "masters",
        "grads",
        "optim",
        "activ.",
        "buffers",
        "other",
        "total",
        "spare",
        "fits",
    ]
    offloads = any(e.host for e in estimates)
    rows = []
    for e in estimates:
        other = sum(e.memory.get(category, 0) for category in OTHER)
        fits = ("tight" if e.tight else "yes") if e.fits else "no"
        host = [gib(sum(e.host.values()))] if offloads else []
        held = [gib(e.memory.get(category, 0)) for category in TENSORS]
        rows.append([e.strategy, *held, gib(other), gib(e.total), f"{e.spare / GIB:+,.1f}", fits, *host])
    title = f"What the fullest GPU holds at its peak (GiB, predicted; totals −{LESS:.0%} to +{MORE:.0%})"
    table(title, [*headings, *(["host"] if offloads else [])], rows)
    beside: dict[tuple[int, ...], list[str]] = {}
    for e in estimates:
        beside.setdefault(tuple(e.memory.get(category, 0) for category in OTHER), []).append(e.strategy)
    for sizes, names in beside.items():
        allocator, context, nccl = map(gib, sizes)
        under = f" ({', '.join(names)})" if len(beside) > 1 else ""
        wrapped("Other:", f"allocator {allocator}, CUDA context {context}, NCCL {nccl}{under}.")
    print()


MOMENTS = ("after forward", "first block", "before step", "after step", "peak")
"""Of `Estimate.moments`. First block: the last one of the backward pass."""


def moments(estimates: list[Estimate]) -> None:
    rows = [[e.strategy, *(gib(e.moments[moment]) for moment in MOMENTS)] for e in estimates]
    title = "When it holds how much (GiB). First block: in its backward pass, which comes last"
    table(title, ["strategy", *MOMENTS], rows)
    found = {e.strategy: e for e in estimates}
    pair = [found[name] for name in catalogue.ALIKE if name in found]
    if len(pair) == 2 and (said := alike(*pair)):
        wrapped("", said)
        print()


def alike(one: Estimate, two: Estimate) -> str:
    """Why zero1 and zero2 hold the same at their peak, and where they do not; nothing where their peaks differ."""
    if gib(one.total) != gib(two.total):
        return ""
    apart = {moment: one.moments[moment] - two.moments[moment] for moment in MOMENTS}
    moment = max(apart, key=lambda each: abs(apart[each]))
    why = (
        "zero1 and zero2 are equal at their peak: no gradient of this micro-batch is there yet. ZeRO-1 keeps whole "
        "gradients till the backward pass ends, ZeRO-2 what its slice needs"
    )
    if gib(one.moments[moment]) == gib(two.moments[moment]):
        return f"{why}; here that is less than 0.01 GiB at every moment."
    return (
        f"{why}: at the moment “{moment}” zero1 holds {gib(abs(apart[moment]))} GiB "
        f"{'more' if apart[moment] > 0 else 'less'}. With --accumulation 2 zero1 keeps them between micro-batches too."
    )


def traffic(estimates: list[Estimate]) -> None:
    slow = max(e.step_range_s[1] for e in estimates) >= 10
    unit, factor = ("s", 1) if slow else ("ms", 1e3)
    headings = ["strategy", "wire", "in Ψ", "compute", "comm.", "exposed", "step", "from", "to", "tokens/s"]
    rows = []
    for e in estimates:
        wire = sum(entry.ring_bytes for entry in e.traffic)
        times = (e.compute_s, e.communication_s, e.exposed_s, e.step_s, *e.step_range_s)
        shown = [f"{seconds * factor:,.1f}" for seconds in times]
        rows.append([e.strategy, gib(wire), f"{e.volumes.get('total', 0):.2f}", *shown, f"{e.tokens_per_s:,.0f}"])
    table(f"What a rank sends in a step (GiB on the wire of a ring), and the time ({unit})", headings, rows)


def beside(estimates: list[Estimate]) -> None:
    """What a run needs beside the GPU's memory."""
    books = estimates[0].books
    node = min(books.world_size, NODE)
    wrapped("Checkpoint:", f"{gib(checkpoint_bytes(books))} GiB: float32 weights and optimizer states, once in all.")
    wrapped(
        "Host memory:",
        f"{gib(host_at_start(books))} GiB a node at the start: {node} process{'es' * (node > 1)}, each of which makes "
        "the model whole in float32, without Python and libraries.",
    )
    print()


def checkpoint_bytes(books: Scenario) -> int:
    """Of one checkpoint, whatever the strategy, without its index (strategies/checkpoint/format.py)."""
    states = sum(group.state_bytes * books.elements(group.parameters) for group in books.groups)
    second = sum(
        FP32 * max(books.shapes[name]) for group in books.groups if group.second_moments for name in group.parameters
    )
    return FP32 * books.parameters + states + second


def host_at_start(books: Scenario) -> int:
    """Bytes of a node's memory before training, as `speedrun.run.checks.check_memory` counts them."""
    return FP32 * books.parameters * min(books.world_size, NODE)


def notes(estimates: list[Estimate]) -> list[str]:
    """Where the figures come from, in sentences."""
    lines = []
    for precision in dict.fromkeys(compute_precision(e.books) for e in estimates):
        names = [e.strategy for e in estimates if compute_precision(e.books) == precision]
        lines.append(f"Activations {'in' if precision != 'autocast' else 'under'} {precision}: {', '.join(names)}.")
    lines.append(MARGIN)
    lines.append(OVERHEAD)
    lines.append(f"Outside the allocator: {OUTSIDE}")
    lines.append("Gradients at the peak: with accumulation those of the micro-batches before wait there.")
    if any(e.host for e in estimates):
        lines.append(
            "Host: what each rank keeps in host memory; whether the GPU fits does not depend on it. Not in the times: "
            "copies over PCIe, and the optimizer's step on the CPU."
        )
    for e in estimates:
        if e.books.world_size > 1:
            lines.append(f"{e.strategy} sends {e.volumes.get('total', 0):.2f}Ψ: {explain_volume(e.books)}.")
    shares = estimates[0].shares
    lines.append(
        f"Times assume {shares.typical:.0%} of the peak rate and {LATENCY * 1e6:.0f} µs per collective. From and to: "
        f"the most and the least of measured rows, {shares.most:.0%} and {shares.least:.0%} (benchmarks/plan_times.md)."
    )
    lines.append("Not in the memory: fragmentation.")
    return lines


def why(estimates: list[Estimate]) -> None:
    for line in notes(estimates):
        wrapped("", line)


def say_not_predicted(books: Scenario) -> None:
    """Name the settings that the figures do not follow, and the lines that they change."""
    lines: dict[str, list[str]] = {}
    for line, key in catalogue.books(books.strategy).not_predicted(books).items():
        lines.setdefault(key, []).append(line)
    for key, changed in lines.items():
        wrapped("Not predicted:", f"{key}, which changes {', '.join(changed)}; the figures are those without it.")
