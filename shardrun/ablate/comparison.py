"""A suite, run: first the learning rates, then every arm on every seed; and the rows of its table."""

import math
import time
from dataclasses import dataclass, field

from shardrun.ablate.effects import Effect, effect, loss_at, reached
from shardrun.ablate.runs import Result, Runs
from shardrun.ablate.suites import Arm, Suite, scaled
from strategies.errors import UserError

EXTENSIONS = 2
"""How often a sweep whose best factor is its lowest or highest goes on by one more factor on that side."""


@dataclass(frozen=True)
class ComparisonRow:
    """An arm beside the baseline. Effects are of pairs with one seed: the loss in nats per token at equal tokens; all
    others as shares of the baseline's (0.1: a tenth more). None where a run diverged or did not reach the target."""

    arm: Arm
    factor: float
    losses: list[float]
    """By seed; infinite where a run diverged."""
    loss: Effect | None
    tokens: Effect | None
    seconds_to_target: Effect | None
    step_time: Effect | None
    reached: int
    """Seeds in which the target was reached."""

    @property
    def verdict(self) -> str:
        """What the arm's loss at equal tokens says: the idea pays, costs, or neither can be seen."""
        if self.loss is None:
            return "diverges"
        if self.loss.low is None:
            return "one seed"
        if not self.loss.sign:
            return "not seen"
        return "pays" if (self.loss.sign > 0) == self.arm.dropped else "costs"


@dataclass
class Comparison:
    """A finished suite. results: arm by arm, seed by seed; sweeps: arm → factor of the learning rates → validation loss
    of the first seed."""

    suite: Suite
    seeds: list[int]
    target: float
    rows: list[ComparisonRow]
    results: list[list[Result]]
    sweeps: dict[str, dict[float, float]] = field(default_factory=dict)


def run_suite(suite: Suite, runs: Runs, seeds: list[int], target: float | None) -> Comparison:
    """Train what is not in the results file yet. Progress is printed.

    target: a validation loss, or None for the one that the baseline has on average after three quarters of its tokens.
    """
    progress = _Progress(suite, runs, seeds)
    factors, sweeps = {}, {}
    for arm in suite.arms:
        factors[arm.name] = 1.0
        if suite.factors:
            sweeps[arm.name] = _sweep(arm, suite, runs, seeds[0], progress)
            factors[arm.name] = best_factor(sweeps[arm.name])
    by_seed = []
    for seed in seeds:  # all arms of a seed one after another: pairs run close in time, and share the machine's mood
        by_seed.append([progress.get(arm, factors[arm.name], seed) for arm in suite.arms])
    results = [list(of_arm) for of_arm in zip(*by_seed, strict=True)]
    hashes = {result.data_hash for of_arm in results for result in of_arm}
    if len(hashes) > 1:
        raise UserError(
            f"{runs.file} holds runs on different data (hashes {', '.join(sorted(hashes))}), which cannot be paired: "
            "choose another --out."
        )
    if target is None:
        if any(result.diverged for result in results[0]):
            raise UserError("the baseline diverged, so that there is nothing to compare with: lower its rates.")
        target = sum(loss_at(result.curve, 0.75) for result in results[0]) / len(seeds)
    rows = [
        row(arm, factors[arm.name], of_arm, results[0], target) for arm, of_arm in zip(suite.arms, results, strict=True)
    ]
    return Comparison(suite, seeds, target, rows, results, sweeps)


def row(arm: Arm, factor: float, results: list[Result], baseline: list[Result], target: float) -> ComparisonRow:
    """results, baseline: one per seed, in the same order."""
    pairs = list(zip(results, baseline, strict=True))
    assert all(ours.seed == theirs.seed for ours, theirs in pairs), "pairs are of one seed"
    reach = [(reached(ours.curve, target), reached(theirs.curve, target)) for ours, theirs in pairs]
    both = [(ours, theirs) for ours, theirs in reach if ours and theirs]
    diverged = any(result.diverged for result in [*results, *baseline])

    def of_pairs(differences: list[float]) -> Effect | None:
        return effect(differences) if len(differences) == len(pairs) and not diverged else None

    return ComparisonRow(
        arm=arm,
        factor=factor,
        losses=[result.val_loss for result in results],
        loss=of_pairs([ours.val_loss - theirs.val_loss for ours, theirs in pairs if math.isfinite(ours.val_loss)]),
        tokens=of_pairs([ours[0] / theirs[0] - 1 for ours, theirs in both]),
        seconds_to_target=of_pairs([ours[1] / theirs[1] - 1 for ours, theirs in both]),
        step_time=of_pairs([ours.step_ms / theirs.step_ms - 1 for ours, theirs in pairs if theirs.step_ms]),
        reached=sum(ours is not None for ours, _ in reach),
    )


def best_factor(losses: dict[float, float]) -> float:
    """losses: factor → loss. The factor of the lowest one."""
    return min(losses, key=lambda factor: losses[factor])


def _sweep(arm: Arm, suite: Suite, runs: Runs, seed: int, progress: "_Progress") -> dict[float, float]:
    """Factor → loss, one run each; goes on beyond an edge that is best."""
    losses = {factor: progress.get(arm, factor, seed).val_loss for factor in sorted(suite.factors)}
    for _ in range(EXTENSIONS if len(losses) > 1 else 0):
        factors = sorted(losses)
        best = best_factor(losses)
        if best == factors[0]:
            further = best * factors[0] / factors[1]
        elif best == factors[-1]:
            further = best * factors[-1] / factors[-2]
        else:
            break
        losses[further] = progress.get(arm, further, seed).val_loss
    return dict(sorted(losses.items()))


class _Progress:
    """A line per run, with what is still to come."""

    def __init__(self, suite: Suite, runs: Runs, seeds: list[int]) -> None:
        self.suite, self.runs, self.done = suite, runs, 0
        swept = max(0, len(suite.factors) - 1) * len(suite.arms)  # one factor's run is the first seed's
        self.total = swept + len(seeds) * len(suite.arms)
        self.seen: set[str] = set()

    def get(self, arm: Arm, factor: float, seed: int) -> Result:
        changes = scaled(arm, factor, self.suite, self.runs.setting)
        key, kept = self.runs.key(changes, seed), self.runs.has(changes, seed)
        label = f"{arm.name}, rates × {factor:g}" if self.suite.factors else arm.name
        started = time.perf_counter()
        result = self.runs.get(label, changes, seed)
        if key not in self.seen:
            self.seen.add(key)
            self.done += 1
            self.total = max(self.total, self.done)  # a sweep that was extended
            loss = "diverged" if result.diverged else f"val loss {result.val_loss:.4f}"
            took = "kept" if kept else f"{time.perf_counter() - started:.0f} s"
            print(f"[{self.done}/{self.total}] seed {seed}, {label}: {loss}, {took}{self._left()}", flush=True)
        return result

    def _left(self) -> str:
        times = self.runs.trained_seconds
        left = (self.total - self.done) * sum(times) / len(times) / 60 if times else 0
        return f" (about {left:.0f} min left)" if left >= 1 else ""
