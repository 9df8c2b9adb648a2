"""Lesson 17: a short run of the laptop track, its record read; and an idea tried on several seeds, in pairs.

python demo.py                                                  one process: the record, and pairs; three minutes
python demo.py runs/NAME                                        read the record of a run of yours
accelerate launch --config_file …/cpu/ddp.yaml demo.py          the same track on two ranks
"""

import json
import re
import statistics
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import torch

from lessons.kit import CONFIG, eval_tokens, open_text, prepare, run_steps, save_figure, steps, table, with_model
from shardrun.ablate.effects import T_975, effect, reached
from shardrun.colours import REFERENCE
from shardrun.lesson.guess import guess_first
from speedrun.books.flops import flops
from speedrun.config import Config, DataConfig, ModelConfig
from speedrun.evaluate import evaluate
from speedrun.presets import PRESETS
from speedrun.run.ending import guarded
from speedrun.run.record import step_times
from speedrun.train import train
from strategies import catalogue, select
from strategies.base import Settings
from strategies.mesh import Place

TARGET = 2.4
SEEDS, STEPS = (1, 2, 3, 4), steps(30)
ARMS = ("as it is", "without QK-norm", "AdamW for all")


def main() -> None:
    if sys.argv[1:]:
        curves = read(Path(sys.argv[1]))
        print(save_figure("lesson_17_speedrun", lambda figure: draw(figure, curves, None)))
        return
    guess = guess_first(17)
    launch = select.launched()
    if launch.rank == 0:
        print(f"A short form of the laptop track, {steps(60)} steps, without a word until it is done …", flush=True)
    config = track(f"lesson17-{launch.strategy}-{launch.world_size}x-{time.strftime('%H%M%S')}")
    train("tiny", config, launch)
    if launch.rank:
        return
    curves = read(Path(config.out) / config.name, guess)
    effects = pairs() if launch.world_size == 1 else None
    print(save_figure("lesson_17_speedrun", lambda figure: draw(figure, curves, effects)))


def track(name: str) -> Config:
    """The laptop track in short: its recipe, a third of its batch, an eighth of its steps, and a target to match."""
    config = PRESETS["tiny"][1]
    optimizer = replace(config.optimizer, orthogonalization_dtype="float32")  # quick on every CPU
    data = replace(config.data, global_batch=8, eval_tokens=eval_tokens(8192))
    return replace(
        config, optimizer=optimizer, data=data, steps=steps(60), eval_every=5, target_val_loss=TARGET, name=name,
        progress="none",
    )  # fmt: skip


def read(folder: Path, guess=None) -> list[dict]:
    """Print what a run's folder says; returns the lines of metrics.jsonl. FileNotFoundError where there is no run."""
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no metrics.jsonl in it.")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    launch, run = settings["launch"], settings["run"]
    print(f"{folder}: {settings['preset']}, {settings['parameters']:,} parameters, {launch['strategy']} on "
          f"{launch['world_size']} rank(s)")  # fmt: skip
    if (record := folder / "record.txt").is_file():
        text = record.read_text(encoding="utf-8")
        logged = re.findall(r"^step:\d+/.*$", text, re.M)
        print(f"{record.name}: {len(text.splitlines()):,} lines, nearly all of them the run's own source; then")
        for line in (logged[0], "…", logged[-1], text.splitlines()[-1]):
            print(textwrap.fill(line, 98, initial_indent="  ", subsequent_indent="      "))
    validations = [line for line in lines if line.get("val_loss") is not None]
    times = step_times(lines)
    print("\nThe curves:")
    rows = []
    for line in validations:
        done = line["step"]
        latest = f"{statistics.median(step_times(lines[max(1, done - 4) : done + 1])):.0f}" if done else "–"
        average = f"{line['step_avg_ms']:.0f}" if line.get("step_avg_ms") else "–"
        seconds = line["train_time_ms"] / 1e3
        rows.append([str(done), f"{line['tokens']:,}", f"{line['val_loss']:.4f}", f"{seconds:.1f}", average, latest])
    print(table(["step", "tokens", "val_loss", "seconds", "step_avg_ms", "of the last 5"], rows[-12:]))
    curve = [(line["tokens"], line["val_loss"], line["train_time_ms"] / 1e3) for line in validations]
    target = run["target_val_loss"]
    if target is not None and (found := reached(curve, target)):
        print(
            f"{target} was crossed after {found[0]:,.0f} tokens and {found[1]:.1f} seconds (a straight line between)."
        )
    utilisation(lines, times, run, launch["world_size"], guess)
    return lines


def utilisation(lines: list[dict], times: list[float], run: dict, ranks: int, guess) -> None:
    """Model FLOPs utilisation: of the median step, beside what a large product reaches on this machine now."""
    if not times or not lines[-1]["tokens"]:
        return
    config = Config(model=ModelConfig(**run["model"]), data=DataConfig(**run["data"]))
    per_token = flops(config, 1) / config.data.sequence_length
    speed = lines[-1]["tokens"] / lines[-1]["step"] / statistics.median(times) * 1e3
    peak = product_rate()
    rate = per_token * speed
    print(f"\n{speed:,.0f} tokens/s · {per_token / 1e6:.2f}e6 operations a token = {rate / 1e9:.2f}e9 a second.")
    print(f"A large product reaches {peak / 1e9:.0f}e9 a second on one rank here; {rate / peak / ranks:.0%} are used.")
    if guess:
        guess.tell(100 * rate / peak / ranks)


def product_rate() -> float:
    """Operations a second of a large float32 (on a GPU: bfloat16) product, the best of five."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times[1:])


def pairs() -> dict[str, list[float]]:
    """Three recipes on four seeds: the losses, and what can be said of the differences."""
    print(
        f"\nAn idea, in pairs: {STEPS} steps of a small model, {len(ARMS)} recipes on {len(SEEDS)} seeds.", flush=True
    )
    losses = {}
    for arm in ARMS:
        losses[arm] = [short(arm, seed) for seed in SEEDS]
        print(f"  trained: {arm}", flush=True)
    print("Validation loss by seed:")
    lines = [
        [arm, *(f"{loss:.4f}" for loss in found), f"{statistics.stdev(found):.4f}"] for arm, found in losses.items()
    ]
    print(table(["", *(f"seed {seed}" for seed in SEEDS), "spread"], lines))
    print("\nMinus “as it is”: the mean, and 95 % intervals")
    lines, n, differences = [], len(SEEDS), {}
    for arm in ARMS[1:]:
        differences[arm] = [a - b for a, b in zip(losses[arm], losses[ARMS[0]], strict=True)]
        found = effect(differences[arm])
        apart = ((statistics.variance(losses[arm]) + statistics.variance(losses[ARMS[0]])) / n) ** 0.5
        verdict = {1: "worse", -1: "better", 0: "not seen"}[found.sign]
        low, high = (f"{bound:+.4f}" for bound in (found.low, found.high))
        lines.append([arm, f"{found.mean:+.4f}", f"{low} … {high}", f"± {T_975[2 * n - 3] * apart:.4f}", verdict])
    print(table(["", "mean", "paired", "unpaired", "verdict"], lines))
    print("The same model and batches on both sides: what a seed does to a run, it does to both of a pair.")
    return differences


def short(arm: str, seed: int) -> float:
    """Train the lessons' model for a few steps; its validation loss."""
    place = Place(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    optimizer = replace(
        CONFIG.optimizer, name="adamw" if arm == ARMS[2] else "muon", muon_momentum_warmup=0, adamw_lr=0.003,
        orthogonalization_dtype="float32",
    )  # fmt: skip
    config = replace(CONFIG, optimizer=optimizer, data=replace(CONFIG.data, eval_tokens=eval_tokens(8192)), seed=seed)
    if arm == ARMS[1]:
        config = with_model(config, qk_norm=False)
    strategy = catalogue.engine("single", Settings(place, "fp32", {}))
    prepare(strategy, config)
    text = open_text(config)
    run_steps(strategy, select.Launch("single", 0, 0, 1, 1, "fp32", place.device.type == "cpu"), text, STEPS)
    return evaluate(strategy, text, 32).loss


def draw(figure, lines: list[dict], differences: dict[str, list[float]] | None) -> None:
    axes = figure.subplots(1, 3 if differences else 2)
    validations = [line for line in lines if line.get("val_loss") is not None]
    axes[0].plot([v["train_time_ms"] / 1e3 for v in validations], [v["val_loss"] for v in validations], marker="o")
    axes[0].axhline(TARGET, color=REFERENCE)
    axes[0].set_title("val_loss over seconds", loc="left")
    trained = [line for line in lines if line.get("train_loss") is not None]
    axes[1].plot([line["step"] for line in trained], [line["step_avg_ms"] for line in trained], label="step_avg_ms")
    axes[1].plot([m["step"] for m in trained], [m["train_time_ms"] / 100 for m in trained], label="train_time_ms / 100")
    axes[1].set_title("over steps", loc="left")
    axes[1].legend(frameon=False)
    for i, found in enumerate((differences or {}).values()):
        bounds = effect(found)
        axes[2].errorbar(i, bounds.mean, yerr=bounds.high - bounds.mean, fmt="o", capsize=6)
        axes[2].plot([i + 0.1] * len(found), found, ".", color=REFERENCE)
    if differences:
        axes[2].axhline(0, color=REFERENCE)
        axes[2].set_xlim(-0.5, len(differences) - 0.5)
        axes[2].set_xticks(range(len(differences)), list(differences))
        axes[2].set_title("Δ loss of pairs, 95 %", loc="left")


if __name__ == "__main__":
    guarded(main)
