"""Lesson 13: what Muon does to a gradient, what that is worth against AdamW, and what it takes under sharding.

python demo.py                                                  one process: singular values, and the race
accelerate launch --config_file …/cpu/fsdp.yaml demo.py         two ranks: weights and bytes under sharding
"""

import os
import time
from dataclasses import replace

import torch

from lessons.kit import (
    CONFIG,
    doing,
    headline,
    launched,
    launched_scenario,
    open_text,
    prepare,
    rows_of,
    run_steps,
    save_figure,
    steps,
    table,
)
from shardrun.lesson.guess import guess_first
from speedrun.optim.orthogonalize import newton_schulz, polar_express
from speedrun.run.ending import guarded
from strategies import catalogue
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.wire import Meter
from strategies.mesh import Place

STEPS = steps(80)
RATES = {"adamw": (0.003, 0.01), "muon": (0.01, 0.02)}
"""Learning rates of the block matrices that each optimizer tries; everything else stays the same."""
MATRIX = "blocks.1.mlp.up.weight"
LAST = 10
"""Losses are means over so many last steps: single batches differ more than optimizers do."""


def configured(name: str, rate: float):
    """The lessons' model with this optimizer for the matrices in its blocks; momentum without a warm-up."""
    optimizer = replace(
        CONFIG.optimizer, name=name, adamw_lr=rate, muon_lr=rate, muon_momentum_warmup=0, muon_momentum_start=0.95,
        orthogonalization="newton_schulz", orthogonalization_dtype="float32",
    )  # fmt: skip
    return replace(CONFIG, optimizer=optimizer)


def main() -> None:
    guess = guess_first(13) if os.environ.get("WORLD_SIZE", "1") == "1" else None
    launch, first = launched()
    settings = replace(first.settings, precision="fp32")  # so that differences are not those of rounding to bfloat16
    launch = replace(launch, precision="fp32")
    if launch.world_size > 1:
        return sharded(launch, settings)
    print(headline(launch, "Muon"))
    data = open_text()
    gradients = first_gradients(launch, settings, data)
    spectra = look_at(gradients[MATRIX].float(), guess)
    embeddings(gradients["embed.weight"])
    runs = {(name, rate): train(launch, settings, data, name, rate) for name in RATES for rate in RATES[name]}
    race(runs)
    print(save_figure("lesson_13_muon", lambda figure: draw(figure, spectra, runs)))


def first_gradients(launch, settings, data) -> dict[str, torch.Tensor]:
    """Gradients after forty steps (the first ones have a rank of nearly one), on the CPU."""
    strategy = catalogue.engine(launch.strategy, settings)
    config = configured("adamw", 0.003)
    prepare(strategy, config)
    for step in range(steps(40)):
        gradients = backward(strategy, launch, data, step)
        strategy.step()
    return gradients


def backward(strategy, launch, data, step) -> dict[str, torch.Tensor]:
    inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
    with strategy.micro_batch(last=True):
        strategy.backward(strategy.model(inputs, targets))
    return {name: p.grad.detach().cpu().clone() for name, p in strategy.model.named_parameters()}


def look_at(gradient, guess) -> dict[str, torch.Tensor]:
    """Print what happens to a gradient's singular values; returns them."""
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    exact = u @ vh
    print(f"\nThe gradient of {MATRIX}, {gradient.shape[0]} × {gradient.shape[1]}: its singular values, divided by ‖G‖")
    batch = gradient[None]
    results = {"as it is": gradient / gradient.norm()}
    for count in (1, 3, 5):
        results[f"Newton–Schulz, {count} step" + "s" * (count > 1)] = newton_schulz(batch, count, torch.float32)[0]
    results["Newton–Schulz, 5 steps in bf16"] = newton_schulz(batch)[0]
    results["Polar Express, 5 steps"] = polar_express(batch, 5, torch.float32)[0]
    results["SVD: U·Vᵀ"] = exact
    half = gradient.shape[0] // 2
    shards = torch.cat([newton_schulz(part[None], 5, torch.float32)[0] for part in gradient.split(half)])
    results["each half by itself, 5 steps"] = shards
    lines, spectra = [], {}
    for name, matrix in results.items():
        values = torch.linalg.svdvals(matrix)
        spectra[name] = values
        apart = (matrix - exact).norm() / exact.norm()
        lines.append(
            [name, *(f"{x.item():.4f}" for x in (values.min(), values.median(), values.max())), f"{apart:.0%}"]
        )
    print(table(["", "smallest", "median", "largest", "from U·Vᵀ"], lines))
    iteration, factorisation = (
        seconds(f) for f in (lambda: newton_schulz(batch, 5, torch.float32), lambda: torch.linalg.svd(gradient))
    )
    print(f"Five steps take {iteration * 1e3:.1f} ms here, the SVD {factorisation * 1e3:.1f} ms.")
    whole = newton_schulz(batch, 5, torch.float32)[0]
    error = (shards - whole).norm() / whole.norm()
    print(f"Orthogonalised in two halves it is {error:.0%} away from the same five steps on the whole matrix.")
    guess.tell(100 * error.item())
    return spectra


def seconds(work) -> float:
    """The quickest of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def embeddings(gradient) -> None:
    """Why not embeddings: what orthogonalising does to rows that stand for single tokens."""
    lengths = gradient.norm(dim=1)
    seen = lengths > 0
    update = newton_schulz(gradient[None].float(), 5, torch.float32)[0].norm(dim=1)
    spread = [f"{(x[seen].max() / x[seen].median()).item():,.0f}" for x in (lengths, update)]
    print(f"\nThe embedding's gradient: {int(seen.sum())} of {len(seen)} rows are not zero, one per token that occurs.")
    print(f"Longest row over the median row: {spread[0]} in the gradient, {spread[1]} once orthogonalised.")


def train(launch, settings, data, name: str, rate: float) -> list[float]:
    doing(f"{STEPS} steps of {name}, rate {rate}")
    strategy = catalogue.engine(launch.strategy, settings)
    prepare(strategy, configured(name, rate))
    return run_steps(strategy, launch, data, STEPS)


def ending(losses: list[float]) -> float:
    return sum(losses[-LAST:]) / LAST


def race(runs) -> None:
    print(f"\n{STEPS} steps, the same weights and batches; training loss, mean of the last {LAST} steps:")
    lines = [[f"{name}, rate {rate}", f"{ending(losses):.3f}"] for (name, rate), losses in runs.items()]
    print(table(["", "loss"], lines))
    best = best_of(runs)
    target = ending(best["adamw"][1])
    reached = next((i + 1 for i in range(LAST - 1, STEPS) if ending(best["muon"][1][: i + 1]) <= target), None)
    words = f"after {reached} steps" if reached else "in none of its steps"
    print(f"AdamW's best ends at {target:.3f}. Muon's best is there {words} of {STEPS}.")
    print("One seed, a tiny model, two rates each: a hint. The speedrun's records are the evidence.")


def best_of(runs) -> dict[str, tuple[float, list[float]]]:
    """Optimizer → (rate, losses) of its best run."""
    return {
        name: min(((rate, runs[name, rate]) for rate in RATES[name]), key=lambda run: ending(run[1])) for name in RATES
    }


def draw(figure, spectra, runs) -> None:
    left, right = figure.subplots(1, 2)
    for name, values in spectra.items():
        left.plot(sorted(values.tolist(), reverse=True), label=name)
    left.set_title("Singular values", loc="left")
    left.legend(frameon=False, fontsize=7)
    for name, (rate, losses) in best_of(runs).items():
        means = [sum(losses[max(0, i - 4) : i + 1]) / len(losses[max(0, i - 4) : i + 1]) for i in range(STEPS)]
        right.plot(range(1, STEPS + 1), means, label=f"{name}, {rate}")
    right.set_title("Training loss, best rate of each (mean of 5 steps)", loc="left")
    right.legend(frameon=False)


def sharded(launch, settings) -> None:
    """Several ranks: the same training as in one process, and what Muon sends beside what AdamW sends."""
    alone_settings = replace(settings, place=Place(0, 1, settings.place.device), engine={})
    alone = few_steps(replace(launch, world_size=1, rank=0), catalogue.engine("single", alone_settings), "muon")
    ours = {name: few_steps(launch, catalogue.engine(launch.strategy, settings), name) for name in ("adamw", "muon")}
    if launch.rank:
        return
    print(headline(launch, "Muon"))
    apart = max((ours["muon"]["weights"][n] - w).abs().max().item() for n, w in alone["weights"].items())
    print(f"\nAfter 5 steps of Muon the weights are {apart:.1e} at most from those of one process.")
    print("\nWhat a rank hands to collectives in one step (bytes):")
    sent = [line for run in ours.values() for line in run["sent"]]
    kinds = list(dict.fromkeys(line.collective for line in sent if line.purpose == "payload"))
    sums = {name: {kind: payload(run["sent"], kind) for kind in kinds} for name, run in ours.items()}
    lines = [[name, *(f"{total[kind]:,}" for kind in kinds)] for name, total in sums.items()]
    for name in sums:
        booked = predict_traffic(launched_scenario(launch, configured(name, 0.02)), 0)
        total = {kind: payload(booked, kind) for kind in kinds}
        lines.append([f"the books: {name}", *(f"{total[kind]:,}" for kind in kinds)])
    print(table(["", *kinds], lines))

    def draw_sent(figure) -> None:
        axes = figure.subplots()
        bottom = [0.0, 0.0]
        for kind in kinds:
            values = [total[kind] / 2**20 for total in sums.values()]
            axes.bar(list(sums), values, 0.6, bottom=bottom, label=kind)
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]
        axes.set_title(f"One step under {launch.strategy}: MiB that a rank hands to collectives", loc="left")
        axes.legend(frameon=False)

    print(save_figure("lesson_13_muon_sharded", draw_sent))


def payload(lines, kind: str) -> int:
    """Without what the engine or the clipping exchanges besides, such as a norm."""
    return sum(line.payload_bytes for line in lines if line.collective == kind and line.purpose != "bookkeeping")


def few_steps(launch, strategy, name: str) -> dict:
    """Five steps; returns whole weights and what the last step sent."""
    prepare(strategy, configured(name, 0.02 if name == "muon" else 0.003))
    data = open_text()
    for step in range(5):
        with Meter() as meter:
            inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
            with strategy.micro_batch(last=True):
                strategy.backward(strategy.model(inputs, targets))
            strategy.step()
    return {"weights": {n: w.cpu() for n, w in strategy.optimizer.full_weights().items()}, "sent": meter.lines()}


if __name__ == "__main__":
    guarded(main)
