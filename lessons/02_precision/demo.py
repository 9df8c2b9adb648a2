"""Lesson 2: the same training in float32 and under bfloat16 autocast: what is computed in which, what is kept in which.

python demo.py                                                  one process, on this machine
accelerate launch --config_file …/cpu/ddp.yaml demo.py          the same on two ranks
"""

import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from lessons.kit import (
    doing,
    headline,
    held,
    launched,
    open_text,
    prepare,
    rows_of,
    save_figure,
    steps,
    table,
    watched_forward,
)
from shardrun.colours import SERIES
from shardrun.lesson.guess import guess_first
from shardrun.tables import mib
from speedrun.kernels.fp8 import quantize_reference, scale_reference
from speedrun.kernels.fp8_formats import E4M3, E5M2
from speedrun.optim.precision import native_bf16
from speedrun.run.ending import guarded
from strategies import catalogue

STEPS = steps(40)
EMULATED_SECONDS = 40.0
"""For the steps in bf16 where it has no instructions: one then takes ten times as long, or a hundred."""
QUIET_SECONDS = 5.0
"""So long it prints nothing at most, a step apart."""
FIRST_UPDATE = 2e-6
"""What AdamW moves a weight by in the first step of a long warm-up."""


def main() -> None:
    guess = guess_first(2)
    launch, first = launched()
    data = open_text()
    native, why = native_bf16(first.settings.place.device)
    if launch.rank == 0:
        print(headline(replace(launch, precision="fp32 and bf16"), "Precision"), flush=True)
    count = STEPS if native else steps_that_fit(launch, first, data)
    runs = {}
    for precision in ("fp32", "bf16"):
        doing(f"{count} steps in {precision}")
        runs[precision] = train(precise(launch, first, precision), launch, data, count)
    if launch.rank == 0:
        if not native:
            print(f"{count} steps, at most {STEPS}: {why}, and bf16 is emulated.")
        report(launch, runs, guess)


def precise(launch, first, precision):
    """The launched strategy in another precision, with a fresh model."""
    strategy = catalogue.engine(launch.strategy, replace(first.settings, precision=precision))
    prepare(strategy)
    return strategy


def steps_that_fit(launch, first, data) -> int:
    """How many emulated steps there is time for: rank 0 tries two, and all ranks take its number."""
    doing("two steps in emulated bf16, to see how long they take")
    started = time.perf_counter()
    train(precise(launch, first, "bf16"), launch, data, 2)
    count = [max(3, min(STEPS, int(2 * EMULATED_SECONDS / (time.perf_counter() - started))))]
    if launch.world_size > 1:
        dist.broadcast_object_list(count, 0)
    return count[0]


def train(strategy, launch, data, count) -> dict:
    """Train; returns losses, what is held, activations by part, and the dtype that each linear layer gives."""
    losses, dtypes, said = [], set(), time.perf_counter()

    def note(module, inputs, output) -> None:
        dtypes.add(str(output.dtype).removeprefix("torch."))

    hooks = [m.register_forward_hook(note) for m in strategy.model.modules() if isinstance(m, nn.Linear)]
    for step in range(count):
        inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
        with strategy.micro_batch(last=True):
            if step == count - 1:
                loss, book = watched_forward(strategy, inputs, targets)
            else:
                loss = strategy.model(inputs, targets)
            strategy.backward(loss)
        memory = held(strategy)
        strategy.step()
        losses.append(loss.item())
        if time.perf_counter() - said > QUIET_SECONDS:
            doing(f"{step + 1} of {count}")
            said = time.perf_counter()
    for hook in hooks:
        hook.remove()
    weight = max((p for p in strategy.model.parameters() if p.dim() == 2), key=torch.numel).detach().cpu()
    return {"losses": losses, "held": memory, "activations": book.by_part(), "dtypes": dtypes, "weight": weight}


def report(launch, runs, guess) -> None:
    fp32, bf16 = runs["fp32"], runs["bf16"]
    count = len(fp32["losses"])
    print(f"\nLoss after {count} steps: {fp32['losses'][-1]:.4f} in fp32, {bf16['losses'][-1]:.4f} in bf16")
    dtypes = {name: ", ".join(run["dtypes"]) for name, run in runs.items()}
    print(f"Is it a no-op? Linear layers give {dtypes['fp32']} in fp32, {dtypes['bf16']} in bf16.")
    print("\nWhat the rank holds just before an update, in MiB: the same, autocast casts copies")
    parts = ("parameters", "gradients", "optimizer states")
    print(table(["", *parts], [[name, *(mib(run["held"].get(p, 0)) for p in parts)] for name, run in runs.items()]))
    print("\nWhat the forward pass keeps, in MiB")
    largest = list({**fp32["activations"], **bf16["activations"]})
    lines = [[part, *(mib(run["activations"].get(part, 0)) for run in runs.values())] for part in largest]
    lines.append(["together", *(mib(sum(run["activations"].values())) for run in runs.values())])
    print(table(["", "fp32", "bf16"], lines))
    guess.tell(100 * sum(bf16["activations"].values()) / sum(fp32["activations"].values()))

    plain, copy = torch.ones(2, dtype=torch.bfloat16).unbind()
    master = torch.ones(())
    for _ in range(1000):
        plain -= 1e-4
        master -= 1e-4
        copy.copy_(master)
    print(f"\n1 − 1000 · 0.0001: bfloat16 alone {plain.item():g}, with a float32 master {copy.item():g}")
    arrived = {name: arrives(master) for name, master in masters_of(fp32["weight"]).items()}
    print(f"A first update of {FIRST_UPDATE:g}: in the bfloat16 copies of this model's largest weight matrix")
    print("  " + " · ".join(f"{share:.0%} of it with {name}" for name, share in arrived.items()))
    print("Relative error of rounding this model's largest weight matrix:")
    errors = rounding_errors(fp32["weight"])
    print("  " + " · ".join(f"{name} {error:.2%}" for name, error in errors.items()))
    print(save_figure("lesson_02_precision", lambda figure: draw(figure, runs, errors)))


def masters_of(weight) -> dict:
    """The two masters that an engine can begin with."""
    return {"masters of float32 values": weight, "masters of rounded values": weight.bfloat16().float()}


def arrives(master) -> float:
    """The share of an update, up or down at random, that is found in the bfloat16 copies: 1 if nothing is lost."""
    signs = torch.randn(master.shape, generator=torch.Generator().manual_seed(0)).sign()
    moved = (master + FIRST_UPDATE * signs).bfloat16().float() - master.bfloat16().float()
    return (moved * signs).mean().item() / FIRST_UPDATE


def rounding_errors(weight) -> dict[str, float]:
    """The root mean square error of a matrix in each format, relative to the matrix's own."""

    def error(rounded) -> float:
        return ((rounded.float() - weight).norm() / weight.norm()).item()

    errors = {"bfloat16": error(weight.bfloat16())}
    for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
        scale = scale_reference(weight.abs().max(), dtype)
        errors[name] = error(quantize_reference(weight, scale, dtype).float() * scale)
    small = weight / 1000  # as gradients often are
    unscaled = quantize_reference(small, torch.ones(()), E4M3).float()
    errors["e4m3 of a thousandth of it, unscaled"] = error(1000 * unscaled)
    return errors


def draw(figure, runs, errors) -> None:
    left, middle, right = figure.subplots(1, 3)
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        left.plot(range(1, len(run["losses"]) + 1), run["losses"], style, label=name)
    left.set_title("Loss by step", loc="left")
    left.legend(frameon=False)
    bottom = [0.0, 0.0]
    parts = {**runs["fp32"]["activations"], **runs["bf16"]["activations"]}
    for i, part in enumerate(parts):
        values = [run["activations"].get(part, 0) / 2**20 for run in runs.values()]
        looks = {"color": SERIES[i % len(SERIES)], "hatch": "//" * (i // len(SERIES)), "edgecolor": "white"}
        middle.bar(list(runs), values, 0.6, bottom=bottom, label=part, **looks)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    middle.set_title("Activations (MiB)", loc="left")
    middle.set_ylim(0, 1.6 * max(bottom))
    middle.legend(frameon=False, fontsize=7, ncols=2)
    labels = [name.replace(" of a thousandth of it, ", "\nof a thousandth,\n") for name in errors]
    right.bar(labels, list(errors.values()))
    right.set_yscale("log")
    right.set_title("Rounding error, relative", loc="left")
    right.tick_params(axis="x", labelsize=7)


if __name__ == "__main__":
    guarded(main)
