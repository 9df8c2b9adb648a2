"""A comparison as Markdown (readable on a terminal too) and as JSON."""

import math
import statistics
from typing import Any

from shardrun.ablate.comparison import Comparison, ComparisonRow, best_factor
from shardrun.ablate.effects import Effect
from shardrun.ablate.ideas import described

SCHEMA = 1


def markdown(comparison: Comparison, settings: str) -> str:
    """settings: what all runs share, in a sentence."""
    baseline, *arms = comparison.rows
    count = len(comparison.seeds)
    lines = [
        settings,
        "",
        f"Baseline: {_change(baseline) if baseline.arm.changes else 'nothing changed'}, validation loss "
        f"{statistics.fmean(baseline.losses):.4f} nats per token{_spread(baseline.losses)}. "
        f"{_seeds(comparison.seeds)}; "
        "every arm is paired with the baseline of its seed, which has the same data in the same order.",
        "",
    ]
    heading = ["change", "val loss", "Δ loss", "95 % interval", f"tokens to {comparison.target:.4f}", "seconds to it"]
    heading += ["step time", "the idea"]
    if comparison.sweeps:
        heading.insert(1, "rates ×")
    table = [heading]
    for group in dict.fromkeys(row.arm.group for row in arms):
        in_group = [row for row in arms if row.arm.group == group]
        for row in sorted(in_group, key=lambda row: -abs(row.loss.mean) if row.loss else -math.inf):
            cells = [_change(row), f"{statistics.fmean(row.losses):.4f}", *_loss_cells(row)]
            cells += [_to_target(row, row.tokens, count), _percent(row.seconds_to_target), _percent(row.step_time)]
            cells.append(row.verdict)
            if comparison.sweeps:
                cells.insert(1, f"{row.factor:g}")
            table.append(cells)
    lines += aligned(table, left=1)
    lines += ["", *_legend(comparison)]
    if comparison.sweeps:
        lines += ["", *_sweeps(comparison)]
    lines += [line for sentence in comparison.suite.left_out for line in ("", f"Left out: {sentence}.")]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison, settings: str) -> dict[str, Any]:
    """The same, with every seed's figures."""
    return {
        "schema": SCHEMA,
        "settings": settings,
        "seeds": comparison.seeds,
        "target": comparison.target,
        "sweeps": {
            name: {f"{factor:g}": _finite(loss) for factor, loss in losses.items()}
            for name, losses in comparison.sweeps.items()
        },
        "left_out": list(comparison.suite.left_out),
        "arms": [
            {
                "name": row.arm.name,
                "group": row.arm.group,
                "changes": row.arm.changes or {},
                "dropped": row.arm.dropped,
                "factor": row.factor,
                "verdict": row.verdict,
                "val_loss": [_finite(loss) for loss in row.losses],
                "tokens": [result.tokens for result in results],
                "seconds": [result.seconds for result in results],
                "step_ms": [result.step_ms for result in results],
                "reached": row.reached,
                "effects": {
                    name: vars(value) if value else None
                    for name, value in (
                        ("val_loss", row.loss),
                        ("tokens_to_target", row.tokens),
                        ("seconds_to_target", row.seconds_to_target),
                        ("step_time", row.step_time),
                    )
                },
            }
            for row, results in zip(comparison.rows, comparison.results, strict=True)
        ],
    }


def aligned(table: list[list[str]], left: int) -> list[str]:
    """A Markdown table whose columns stand under each other in plain text; the first `left` are flush left."""
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(table[0]))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    cells = [[c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
             for line in table]  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:])]


def _legend(comparison: Comparison) -> list[str]:
    count = len(comparison.seeds)
    lines = [
        "Δ loss: validation loss at equal tokens minus the baseline's, mean ± standard deviation of the paired "
        "differences; the interval is Student's t for their mean. Tokens, seconds and step time: relative to the "
        "baseline's, likewise; a run's schedule is as long as ever, whenever it reaches the target.",
        "",
        "*pays*: the interval says that the loss is lower with the idea than without; *costs*: higher; *not seen*: it "
        f"includes zero, at {count} seeds. Of 20 ideas that do nothing, one gets a verdict by chance. A verdict is on "
        "tokens: what a step costs stands beside it.",
    ]
    if count == 1:
        lines.append("One seed has no spread, and so no verdict: take three or more.")
    return lines


def _sweeps(comparison: Comparison) -> list[str]:
    """Every factor's loss, with what a reader has to know of the choice."""
    factors = sorted({factor for losses in comparison.sweeps.values() for factor in losses})
    table = [["rates ×", *(f"{factor:g}" for factor in factors)]]
    edges = []
    for name, losses in comparison.sweeps.items():
        table.append([name, *(_number(losses[factor]) if factor in losses else "" for factor in factors)])
        if len(losses) > 1 and best_factor(losses) in (min(losses), max(losses)):
            edges.append(name)
    lines = aligned(table, left=1)
    rates = ", ".join(rate.partition(".")[2] for rate in comparison.suite.rates)
    lines += ["", f"Validation loss at each factor of {rates}, seed {comparison.seeds[0]}; the best one is used on all "
              "seeds."]  # fmt: skip
    if edges:
        lines += [
            "",
            f"The best factor of {', '.join(edges)} is at the edge of the sweep: a better one is likely.",
        ]
    return lines


def _change(row: ComparisonRow) -> str:
    return f"{row.arm.name} ({described(row.arm.changes)})" if row.arm.changes else row.arm.name


def _loss_cells(row: ComparisonRow) -> tuple[str, str]:
    if row.loss is None:
        return f"diverged {sum(map(math.isinf, row.losses))} of {len(row.losses)}", ""
    spread = "" if row.loss.spread is None else f" ± {row.loss.spread:.4f}"
    interval = "" if row.loss.low is None else f"{row.loss.low:+.4f} … {row.loss.high:+.4f}"
    return f"{row.loss.mean:+.4f}{spread}", interval


def _to_target(row: ComparisonRow, tokens: Effect | None, count: int) -> str:
    return _percent(tokens) if row.reached == count or tokens else f"reached {row.reached} of {count}"


def _percent(value: Effect | None) -> str:
    if value is None:
        return ""
    spread = "" if value.spread is None else f" ± {100 * value.spread:.1f}"
    return f"{100 * value.mean:+.1f}{spread} %"


def _number(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _spread(losses: list[float]) -> str:
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return ""
    return f" (standard deviation between seeds {statistics.stdev(losses):.4f})"


def _seeds(seeds: list[int]) -> str:
    return f"Seed {seeds[0]}" if len(seeds) == 1 else f"Seeds {', '.join(map(str, seeds))}"
