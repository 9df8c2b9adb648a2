"""Checks of lesson 17."""

import math
import statistics

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, expect_numbers, is_number
from shardrun.ablate.effects import T_975, effect, reached
from speedrun.run.progress import describe

SOURCE = '''# speedrun/run/progress.py
"""A line looks like this:
    step:20/60 train_loss:2.6489 val_loss:9.9999 train_time:6465ms step_avg:323.26ms
"""
    parts = [f"step:{metrics['step']}/{steps}"]
step: one all-reduce of gradients
'''


def _record(bits):
    """A record's text, and its validations."""
    text, found = [SOURCE, "=" * 100, '{"command": ["speedrun/train.py", "tiny"]}', "=" * 100], []
    for step in range(0, 31):
        line = {"step": step, "train_time_ms": 251.4 * step + (900 if step else 0)}
        if step:
            line |= {"train_loss": 5.5 - 0.1 * step + 0.01 * (step % 3), "step_avg_ms": line["train_time_ms"] / step}
        if step % 10 == 0:
            line |= {"val_loss": 5.5514 - 0.1083 * step} | ({"val_bits_per_byte": 8.01 - 0.1 * step} if bits else {})
            found.append((step, round(line["val_loss"], 4), round(line["train_time_ms"]) / 1000))
        text.append(describe(line, 30))
    return "\n".join([*text, "=" * 100, "finished; 2.4 reached at step 30"]) + "\n", found


def read_record(theirs):
    for bits in (True, False):
        text, right = _record(bits)
        found = theirs(text)
        expect(isinstance(found, list), f"Your function returned {found!r}; a list of tuples is asked for.")
        found = [tuple(entry) for entry in found]
        if found == right:
            continue
        if any(len(entry) != 3 for entry in found):
            raise Wrong(f"An entry of yours is {next(e for e in found if len(e) != 3)!r}; it has three parts.")
        if any(entry[1] == 9.9999 for entry in found):
            raise Wrong("You have read a line of the run's own source. The log's lines begin with step: at once.")
        if len(found) == len(right) - 1 and found == right[1:]:
            raise Wrong("The validation before the first step is missing: its line has no train_loss.")
        if len(found) > len(right):
            raise Wrong(f"You have {len(found)} entries where the record has {len(right)} validations: most lines have "
                        "a train_loss only.")  # fmt: skip
        if not found:
            extra = "" if bits else " Not every record has bits_per_byte."
            raise Wrong(f"You have found no validation where the record has {len(right)}.{extra}")
        for mine, entry in zip(right, found, strict=False):
            if not all(map(is_number, entry)):
                raise Wrong(f"Your entry {entry!r} has text in it; numbers are asked for.")
            if math.isclose(entry[2], 1000 * mine[2]) and mine[2]:
                raise Wrong(f"At step {mine[0]} you say {entry[2]:g} seconds: train_time is in milliseconds.")
            if entry[:2] == mine[:2] and entry[2] == int(mine[2]) != mine[2]:
                raise Wrong(f"At step {mine[0]} you say {entry[2]:g} seconds: whole ones. Divide by 1000 (/, not //).")
            if entry[:2] == mine[:2] and entry[2] != mine[2]:
                raise Wrong(f"At step {mine[0]} you say {entry[2]:g} seconds in place of {mine[2]:g}: is it step_avg?")
            expect(entry == mine, f"You have {entry!r} where {mine!r} stands in the record.")
        raise Wrong(f"You have {len(found)} of the record's {len(right)} validations.")
    generated(
        lambda every, losses, bits, fast: _recorded(theirs, every, losses, bits, fast), most=30,
        every=st.integers(1, 4), losses=st.lists(st.integers(0, 12_000_000), max_size=5), bits=st.booleans(),
        fast=st.booleans(),
    )  # fmt: skip


def _recorded(theirs, every, losses, bits, fast):
    """A line a step, as the trainer writes it; validations every so many steps, none where there are no losses."""
    lines, right = [SOURCE], []
    for step in range(every * len(losses)):
        line = {"step": step, "train_time_ms": step * (0.4 if fast else 12_345.6)}
        if step:
            line |= {"train_loss": 3.0 + step, "step_avg_ms": line["train_time_ms"] / step}
        if step % every == 0:
            loss = losses[step // every] / 10**6
            line |= {"val_loss": loss} | ({"val_bits_per_byte": loss / 2} if bits else {})
            right.append((step, float(f"{loss:.4f}"), round(line["train_time_ms"]) / 1000))
        lines.append(describe(line, 999))
    found = theirs("\n".join([*lines, "=" * 100]))
    same = isinstance(found, list) and [tuple(entry) for entry in found] == right
    shown = "\n".join(lines[1:4])
    expect(same, f"For a record whose lines begin so:\n{shown}\nyou say {found}; it is {right}.")


def tokens_to_target(theirs):
    smooth = [(0, 5.55), (100_000, 3.2), (200_000, 2.6), (300_000, 2.3)]
    bumpy = [(0, 5.55), (100_000, 2.4), (200_000, 2.7), (300_000, 2.2)]
    for curve, target in ((smooth, 2.5), (bumpy, 2.5), (smooth, 3.2)):
        found = theirs(curve, target)
        where = f"the target {target} on {curve}"
        expect(found is not None, f"You say None for {where}; it is reached.")
        line = reached([(tokens, loss, 0.0) for tokens, loss in curve], target)
        last = next(i for i in range(len(curve) - 1, 0, -1) if curve[i - 1][1] > target >= curve[i][1])
        (a, above), (b, below) = curve[last - 1], curve[last]
        first = next(tokens for tokens, loss in curve if loss <= target)
        before = max(tokens for tokens, _ in curve if tokens < first)
        expect_number(
            found,
            line[0],
            where,
            {
                "That is the first validation at or below the target; it was crossed on the way there.": first,
                "That is the last validation above the target; it is crossed after it.": before,
                "That is the last crossing; the first one counts.": a + (above - target) / (above - below) * (b - a),
                "That is the middle between the two validations.": (before + first) / 2,
                "The share of the way is turned round: (above − target) / (above − below) of it lies behind.": (
                    before + first - line[0]
                ),
            },
        )
    found = theirs(smooth, 2.0)
    expect(found is None, f"You say {found!r} tokens for the target 2.0 on {smooth}, which is never reached: None.")
    generated(
        lambda start, losses, target: _crossed(theirs, [start, *losses], target),
        start=st.integers(7, 9), losses=st.lists(st.integers(1, 9), max_size=6), target=st.sampled_from([2, 3, 4.5, 6]),
    )  # fmt: skip


def _crossed(theirs, losses, target):
    curve = [(100 * i * (i + 1), float(loss)) for i, loss in enumerate(losses)]
    right = None
    for i in range(len(curve) - 1, 0, -1):  # from behind, so that the first crossing stays
        (a, above), (b, below) = curve[i - 1 : i + 1]
        if below <= target < above:
            right = b - (target - below) * (b - a) / (above - below)
    found = theirs(curve, target)
    same = found is None if right is None else is_number(found) and math.isclose(found, right, rel_tol=1e-9)
    expect(same, f"For the target {target} on {curve} you say {found}; it is {right}.")


def step_ms(theirs):
    for steps in ([900.0, 250.0, 251.0, 249.0, 255.0, 600.0, 252.0], [30.0, 20.0, 23.0, 21.0], [7.0]):
        times = [sum(steps[: i + 1]) for i in range(len(steps))]
        n = len(steps)
        averages = [time / (i + 1) for i, time in enumerate(times)]
        right = {"average": times[-1] / n, "median": statistics.median(steps)}
        mistakes = {
            "average": {
                "That leaves out a step: there is one before each of the times.": times[-1] / (n - 1) if n > 1 else -1,
                "That leaves out the first step, which is slow but was made.": (times[-1] - times[0]) / (n - 1)
                if n > 1
                else -1,
                "That is the whole time, not that of a step.": times[-1],
                "That is the mean of the times so far; they add up already.": statistics.fmean(times),
                "That is the mean of all step_avg; the last of them is the run's.": statistics.fmean(averages),
                "That is the median.": right["median"],
            },
            "median": {
                "That is the median of the times so far; a step is the difference between two of them.": (
                    statistics.median(times)
                ),
                "That is the average.": right["average"],
                "That is the median of step_avg, which has the first, slow step in every entry.": (
                    statistics.median(averages)
                ),
                "That leaves out the first step.": statistics.median(steps[1:]) if n > 2 and n % 2 else -1,
                "With an even number of steps the median is the mean of the two in the middle, not the lower.": (
                    statistics.median_low(steps)
                ),
                "With an even number of steps the median is the mean of the two in the middle, not the upper.": (
                    statistics.median_high(steps)
                ),
                "That is a mean, of all but the first step.": statistics.fmean(steps[1:]) if n > 1 else -1,
            },
        }
        expect_numbers(theirs(times), right, f"train_time_ms {times}", mistakes)
    generated(lambda steps: _stepped(theirs, steps), steps=st.lists(st.integers(1, 500), min_size=1, max_size=7))


def _stepped(theirs, steps):
    times = [float(sum(steps[: i + 1])) for i in range(len(steps))]
    ordered, half = sorted(steps), len(steps) // 2
    middle = ordered[half] if len(steps) % 2 else (ordered[half - 1] + ordered[half]) / 2
    right = {"average": sum(steps) / len(steps), "median": middle}
    expect_numbers(theirs(times), right, f"train_time_ms {times}", {})


def mfu(theirs):
    gpt2 = {"matrices": 123_568_128, "layers": 12, "width": 768, "length": 1024}
    for name, model, speed, gpus, peak in (
        ("llm.c's baseline, 10 billion tokens in 45 minutes on 8 H100", gpt2, 10e9 / 2700, 8, 989e12),
        ("221,000 tokens per second on 2 RTX 4090", gpt2, 221e3, 2, 165e12),
    ):
        matrices, attention = 6 * model["matrices"], 6 * model["layers"] * model["width"] * model["length"]
        each = speed / (gpus * peak)
        expect_number(
            theirs(**model, tokens_per_second=speed, gpus=gpus, peak=peak),
            (matrices + attention) * each,
            name,
            {
                "That is the forward pass alone: backward takes twice that again.": (matrices + attention) * each / 3,
                "Backward is missing for the matrices: 2 forward, 4 backward.": (matrices / 3 + attention) * each,
                "Backward takes twice what forward takes, so 6 per element in all, not 4.": (
                    (matrices * 2 / 3 + attention) * each
                ),
                "Attention is missing: its scores and sums take operations, but no weights.": matrices * each,
                "That counts all of attention's scores; half of them are masked.": (matrices + 2 * attention) * each,
                "The operations are shared by all GPUs: divide by their number.": (matrices + attention) * each * gpus,
                "tokens_per_second is of all GPUs together already.": (matrices + attention) * each / gpus,
                "That is in per cent; a share of 1 is asked for.": (matrices + attention) * each * 100,
            },
            gpus,
        )

    def share(m, n, w, s, speed, gpus, peak):
        return speed / gpus * 3 * (2 * m + 2 * n * w * s) / peak

    formula(
        theirs, share, "a share", "gpus",
        matrices=st.integers(1, 10**9), layers=st.integers(1, 64), width=st.integers(1, 8192),
        length=st.integers(1, 8192), tokens_per_second=st.floats(1.0, 1e7), gpus=st.integers(1, 64),
        peak=st.floats(1e12, 1e15),
    )  # fmt: skip


def paired(theirs):
    for baseline, changed in (
        ([1.651, 1.672, 1.623, 1.640], [1.664, 1.681, 1.639, 1.646]),
        ([3.31, 3.26, 3.29], [3.27, 3.24, 3.25]),
        ([1.0, 2.0, 3.0], [1.1, 3.1, 1.9]),
        ([1.64, 1.62], [1.67, 1.66]),
    ):
        found = theirs(changed, baseline)
        expect(
            isinstance(found, (tuple, list)) and len(found) == 3,
            f"Your function returned {found!r}; (mean, low, high) is asked for.",
        )
        differences = [c - b for c, b in zip(changed, baseline, strict=True)]
        right, n = effect(differences), len(differences)
        where = f"changed {changed} against baseline {baseline}"
        expect_number(
            found[0],
            right.mean,
            f"the mean for {where}",
            {"The sign is turned round: changed − baseline, so that below zero is better.": -right.mean},
        )
        half = right.high - right.mean
        apart = (statistics.variance(changed) + statistics.variance(baseline)) ** 0.5 / n**0.5
        t = T_975[n - 2]
        wrong = {
            "That treats the runs as if they were not paired: what seeds differ by is in it twice. Take the spread of "
            "the differences.": t * apart,
            "That treats the runs as if they were not paired. Take the spread of the differences.": T_975[2 * n - 3]
            * apart,
            "The spread of a mean is s / √n: √n is missing.": half * n**0.5,
            "With so few pairs 1.96 promises too much: take Student's t.": half / t * 1.96,
            "n pairs have n − 1 degrees of freedom, and T_975[0] is for one: T_975[n − 2].": half / t * T_975[n - 1],
            "T_975[0] is for one degree of freedom, and n pairs have n − 1: T_975[n − 2].": (
                half / t * T_975[n - 3] if n > 2 else -1
            ),
            "That is the standard deviation of a whole population; a sample's divides by n − 1.": half
            * ((n - 1) / n) ** 0.5,
            "That is one standard error to either side; for 95 % it takes t of them.": half / t,
        }
        sorted_pairs = effect([c - b for c, b in zip(sorted(changed), sorted(baseline), strict=True)])
        wrong["The runs are paired by the order of their losses. A pair has one seed: changed[i] and baseline[i]."] = (
            sorted_pairs.high - sorted_pairs.mean
        )
        wrong["The spread of a mean is s / √n, not s / √(n − 1): n − 1 is in s already."] = half * (n / (n - 1)) ** 0.5
        mistakes = {message: right.mean - value for message, value in wrong.items()}
        mistakes["Low and high are exchanged: (mean, low, high)."] = right.high
        expect_number(found[1], right.low, f"the lower end for {where}", mistakes)
        mistakes = {message: right.mean + value for message, value in wrong.items()}
        mistakes["Low and high are exchanged: (mean, low, high)."] = right.low
        expect_number(found[2], right.high, f"the upper end for {where}", mistakes)
    generated(
        lambda pairs: _paired(theirs, pairs),
        pairs=st.lists(st.tuples(st.integers(10, 40), st.integers(10, 40)), min_size=2, max_size=11),
    )


def _paired(theirs, pairs):
    changed, baseline = ([loss / 10 for loss in side] for side in zip(*pairs, strict=True))
    differences = [(c - b) / 10 for c, b in pairs]
    n = len(pairs)
    mean = sum(differences) / n
    half = T_975[n - 2] * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    found, right = theirs(changed, baseline), (mean, mean - half, mean + half)
    same = all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(found, right, strict=True))
    expect(same, f"For changed {changed} against baseline {baseline} you say {found}; it is {right}.")
