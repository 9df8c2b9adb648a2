"""Lesson 14: schedules ranked on a short run of tiny, what warm-up does, and a spike with and without clipping.

python demo.py                                                  one process: all of it, some eight minutes
accelerate launch --config_file …/cpu/ddp.yaml demo.py          two ranks: a spike on one of them
"""

import math
import os
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from lessons.kit import (
    CONFIG,
    eval_tokens,
    headline,
    launched,
    open_text,
    prepare,
    rows_of,
    save_figure,
    steps,
    table,
)
from shardrun.colours import REFERENCE
from shardrun.lesson.guess import guess_first
from speedrun.config import ScheduleConfig
from speedrun.optim.schedule import learning_rate_multiplier, muon_momentum
from speedrun.presets import PRESETS
from speedrun.run.ending import guarded
from strategies import catalogue

TINY = PRESETS["tiny"][1]
STEPS, SEEDS, RATES = steps(50), (1, 2, 3), (1.0, 3.0)
"""Of the ranking. Rates are factors on tiny's; the first seed chooses, all seeds count."""
SCHEDULES = {
    "trapezoid": ScheduleConfig(name="trapezoid", decay=0.4),
    "cosine": ScheduleConfig(name="cosine"),
    "cosine + warm-down": ScheduleConfig(name="cosine_warmdown", decay=0.2),
    "constant": ScheduleConfig(name="constant"),
}
T975 = 4.303
"""Student's t for 95 % and two degrees of freedom: three seeds."""
SPIKE, BROKEN = steps(20), 1000.0
"""At this step the loss is multiplied by so much: a broken batch, or an overflow that nobody caught."""
AFTER = steps(30)
"""So many steps on, the spike's last trace is looked at."""
WATCHED = 10
"""In so many first steps it is watched how far the weights move."""


def main() -> None:
    guess = guess_first(14) if os.environ.get("WORLD_SIZE", "1") == "1" else None
    launch, first = launched()
    if launch.world_size > 1:
        return one_rank_spikes(launch, first.settings)
    print(headline(launch, "Schedules and stability"), flush=True)
    shapes(guess)
    runs, chosen = sweep(launch, first.settings)
    ranking(runs, chosen)
    warm_ups = {warmup: movement(launch, first.settings, warmup) for warmup in (0, 10)}
    show_movement(warm_ups)
    spikes = {
        name: train(
            launch, first.settings, adamw(clip), ScheduleConfig(name="constant", warmup=5), SPIKE + AFTER, spike
        )
        for name, clip, spike in (("no spike", 0.0, None), ("spike", 0.0, SPIKE), ("spike, clipped at 1", 1.0, SPIKE))
    }
    show_spikes(spikes)
    print(save_figure("lesson_14_schedules", lambda figure: draw(figure, runs, chosen, spikes), size=(12, 4)))


def shapes(guess) -> None:
    print(f"\nThe factor on every peak learning rate, in a run of {STEPS} steps:")
    at = (0, STEPS // 4, STEPS // 2, 3 * STEPS // 4, STEPS - 1)
    lines, means = [], {}
    for name, schedule in SCHEDULES.items():
        curve = [learning_rate_multiplier(schedule, step, STEPS) for step in range(STEPS)]
        means[name] = sum(curve) / STEPS
        lines.append([name, *(f"{curve[step]:.3f}" for step in at), f"{means[name]:.2f}"])
    print(table(["", *(f"step {step}" for step in at), "mean"], lines))
    guess.tell(means["trapezoid"])


# The ranking


def tiny(rate: float, seed: int):
    """tiny with a third of its batch, all rates times `rate`, and orthogonalisation in float32, quick on every CPU."""
    names = ("muon_lr", "embedding_lr", "head_lr", "vector_lr", "table_lr", "gate_lr")
    rates = {name: getattr(TINY.optimizer, name) * rate for name in names}
    optimizer = replace(
        TINY.optimizer, **rates, muon_momentum_warmup=STEPS // 2, orthogonalization_dtype="float32"
    )  # fmt: skip
    data = replace(TINY.data, global_batch=8, eval_tokens=eval_tokens(16_384))
    return replace(TINY, optimizer=optimizer, data=data, steps=STEPS, seed=seed)


def sweep(launch, settings) -> tuple[dict, dict]:
    """(schedule, rate, seed) → validation loss; and the rate that each schedule did best with on the first seed."""
    runs, chosen, started = {}, {}, time.perf_counter()
    total = len(SCHEDULES) * (len(RATES) + len(SEEDS) - 1)
    print(f"\nRanked on tiny: {total} runs of {STEPS} steps.", flush=True)

    def final(name: str, rate: float, seed: int) -> float:
        config = tiny(rate, seed)
        loss = validate(train(launch, settings, config, SCHEDULES[name], STEPS)["strategy"], open_text(config))
        done = f"  {len(runs) + 1:>2} of {total}, {time.perf_counter() - started:4.0f} s:"
        print(f"{done} {name}, rates × {rate:g}, seed {seed}: {loss:.4f}", flush=True)
        return loss

    for name in SCHEDULES:
        for rate in RATES:
            runs[name, rate, SEEDS[0]] = final(name, rate, SEEDS[0])
        chosen[name] = min(RATES, key=lambda rate, name=name: runs[name, rate, SEEDS[0]])
        for seed in SEEDS[1:]:
            runs[name, chosen[name], seed] = final(name, chosen[name], seed)
    return runs, chosen


def validate(strategy, data) -> float:
    with strategy.evaluation():
        rows = [strategy.model(*data.validation(i, i + 8)).item() for i in range(0, data.validation_rows, 8)]
    return sum(rows) / len(rows)


def ranking(runs, chosen) -> None:
    """Each schedule at its best rate, seed by seed against the trapezoid."""
    print("\nThe ranking. Validation loss, nats per byte:")
    lines = []
    means = {name: sum(runs[name, rate, s] for s in SEEDS) / len(SEEDS) for name, rate in chosen.items()}
    for name in sorted(chosen, key=lambda name: means[name]):
        tried = [f"{runs[name, rate, SEEDS[0]]:.4f}" for rate in RATES]
        lines.append([name, *tried, f"× {chosen[name]:g}", f"{means[name]:.4f}", *against(runs, chosen, name)])
    headings = [f"rates × {rate:g}" for rate in RATES]
    print(table(["", *headings, "best", f"mean of {len(SEEDS)}", "− trapezoid", "95 % interval"], lines))
    print("An interval that includes zero means: not seen with three seeds, not: no difference.")


def against(runs, chosen, name: str) -> list[str]:
    """Paired differences to the trapezoid: mean, and the interval of the mean."""
    if name == "trapezoid":
        return ["", ""]
    pairs = [runs[name, chosen[name], s] - runs["trapezoid", chosen["trapezoid"], s] for s in SEEDS]
    mean = sum(pairs) / len(pairs)
    error = math.sqrt(sum((d - mean) ** 2 for d in pairs) / (len(pairs) - 1) / len(pairs))
    return [f"{mean:+.4f}", f"{mean - T975 * error:+.4f} … {mean + T975 * error:+.4f}"]


def train(launch, settings, config, schedule, count: int, spike: int | None = None, mine: bool = True) -> dict:
    """Train, with the schedule on all rates. mine: whether the spike is on this rank."""
    strategy = catalogue.engine(launch.strategy, settings)
    prepare(strategy, config)
    data, losses, norms, moved = open_text(config), [], [], []
    for step in range(count):
        factor = learning_rate_multiplier(schedule, step, count)
        for group in strategy.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            if "momentum" in group:
                group["momentum"] = muon_momentum(config.optimizer, step, count)
        inputs, targets = (tensor.to(settings.place.device) for tensor in rows_of(launch, data, step))
        with strategy.micro_batch(last=True):
            loss = strategy.model(inputs, targets)
            strategy.backward(loss * (BROKEN if step == spike and mine else 1.0))
        before = blocks(strategy) if launch.world_size == 1 and step < WATCHED else []
        norms.append(float(strategy.step()))
        if before:
            moved.append(change(before, blocks(strategy)))
        losses.append(loss.item())
    return {"strategy": strategy, "losses": losses, "norms": norms, "moved": moved}


# Warm-up


def adamw(clip: float, rate: float = 0.003):
    """The lessons' model, AdamW with a small eps everywhere."""
    return replace(CONFIG, optimizer=replace(CONFIG.optimizer, adamw_lr=rate, clip=clip, eps=1e-8))


def movement(launch, settings, warmup: int) -> dict:
    schedule = ScheduleConfig(name="constant", warmup=warmup)
    return train(launch, settings, adamw(1.0, 0.02), schedule, WATCHED)


def blocks(strategy) -> list[torch.Tensor]:
    return [p.detach().clone() for name, p in strategy.model.named_parameters() if name.startswith("blocks.")]


def change(before, after) -> float:
    """How far the blocks' weights went, in relation to their size."""
    squares = sum((b - a).square().sum() for a, b in zip(before, after, strict=True))
    return (squares / sum(a.square().sum() for a in before)).sqrt().item()


def show_movement(runs) -> None:
    print("\nWarm-up: AdamW at a rate of 0.02. How far the blocks' weights move in a step, ‖Δw‖ / ‖w‖:")
    at = (0, 1, 2, 4, 7, 9)
    lines = [
        [f"{warmup} steps of warm-up" if warmup else "no warm-up", *(f"{run['moved'][i]:.1%}" for i in at)]
        for warmup, run in runs.items()
    ]
    print(table(["", *(f"step {i + 1}" for i in at)], lines))
    print("AdamW's first step moves every weight by the full rate, however small its gradient is.")


# Spikes


def show_spikes(runs) -> None:
    print(f"\nA spike: at step {SPIKE + 1} the gradient is {BROKEN:,.0f} times too large. AdamW, rate 0.003:")
    at = [-5, 1, 6, 11, AFTER - 5]  # of five steps each, from the spike
    spans = [(SPIKE + first, SPIKE + first + 5) for first in at]
    lines = [
        [name, f"{run['norms'][SPIKE]:,.1f}", *(f"{sum(run['losses'][a:b]) / (b - a):.2f}" for a, b in spans)]
        for name, run in runs.items()
    ]
    print(table(["training loss", "norm then", *(f"{a + 1}–{b}" for a, b in spans)], lines))


def one_rank_spikes(launch, settings) -> None:
    """The broken batch is rank 1's alone; what does each rank see?"""
    mine = launch.rank == 1
    schedule = ScheduleConfig(name="constant", warmup=5)
    for clip in (0.0, 1.0):
        run = train(launch, settings, adamw(clip), schedule, SPIKE + 4, SPIKE, mine)
        norms = [None] * launch.world_size
        dist.all_gather_object(norms, [run["norms"][SPIKE - 1], run["norms"][SPIKE], run["losses"][-1]])
        if launch.rank == 0:
            if not clip:
                print(headline(launch, "A spike on one rank"))
            print(f"\nAt step {SPIKE + 1} rank 1's gradient is {BROKEN:,.0f} times too large; clip {clip:g}:")
            lines = [[f"rank {r}", f"{a:.2f}", f"{b:,.2f}", f"{c:.2f}"] for r, (a, b, c) in enumerate(norms)]
            print(table(["", "norm before", "norm then", f"its loss at step {SPIKE + 4}"], lines))
    if launch.rank == 0:
        print("\nThe norm is that of the averaged gradient, the same on every rank, so all ranks clip by one factor.")
        print("Schedules need no messages either: every rank computes the same factor from the same step.")


def draw(figure, runs, chosen, spikes) -> None:
    left, middle, right = figure.subplots(1, 3)
    for name, schedule in SCHEDULES.items():
        left.plot([learning_rate_multiplier(schedule, step, STEPS) for step in range(STEPS)], label=name)
    left.set_title("Factor on the learning rate", loc="left")
    left.legend(frameon=False, fontsize=8)
    for i, name in enumerate(chosen):
        middle.plot([runs[name, chosen[name], seed] for seed in SEEDS], [i] * len(SEEDS), "o")
    middle.set_yticks(range(len(chosen)), [f"{name}, × {rate:g}" for name, rate in chosen.items()])
    middle.set_title(f"Validation loss, {len(SEEDS)} seeds", loc="left")
    for name, run in spikes.items():
        right.plot(run["losses"], label=name)
    right.axvline(SPIKE, color=REFERENCE, linestyle=":", linewidth=1)
    right.set_title("Training loss", loc="left")
    right.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    guarded(main)
