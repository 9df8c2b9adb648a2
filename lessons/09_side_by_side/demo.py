"""Lesson 9: guess what each strategy holds, choose one for three models, and see all five side by side.

python demo.py                                                  the quiz, then the choice (asks where it can)
python demo.py 106 13 25 25 13                                  the quiz with these guesses
accelerate launch --config_file …/cpu/ddp.yaml demo.py          two ranks train under all five, one after another
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

from lessons.kit import CONFIG, headline, launched, open_text, prepare, rows_of, save_figure, table
from shardrun.colours import COLOURS, SENT
from shardrun.lesson.guess import guess_first
from shardrun.tables import mib
from speedrun.books.shapes import ledger_groups, shapes_from
from speedrun.config import Config, ModelConfig, OptimizerConfig
from speedrun.run.ending import guarded
from strategies import catalogue
from strategies.errors import UserError
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.memory import measure
from strategies.ledger.terms import CATEGORIES, MODEL_STATES, Scenario
from strategies.ledger.wire import Meter

ENGINES = {
    "ddp": {},
    "fsdp": {"reshard_after_forward": True, "wrap": ["Block"]},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
}
"""Strategy → its settings, those of the shipped accelerate configs."""
RANKS = 8
SEVEN = Config(
    model=ModelConfig(vocab_size=50_257, pad_vocab_to=128, layers=32, heads=32, width=4096, tied_head=True),
    optimizer=OptimizerConfig(name="adamw"),
)
"""What `shardrun plan --params 7B` plans for."""
CHOICES = {
    "124M": ["gpt2"],
    "7B": ["--params", "7B"],
    "32B": ["--params", "32B"],
    "32B again": ["--params", "32B", "--micro-batch", "1", "--checkpointing", "block"],
}
"""Model → arguments of `shardrun plan`."""
ADAMW = ["--optimizer", "adamw"]
STEPS, ACCUMULATION = 4, 2


def main() -> None:
    guess = guess_first(9) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    launch, strategy = launched()
    if launch.world_size > 1:
        return side_by_side(launch, strategy.settings, guess)
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    quiz(asks)
    choices(asks)


def books(config: Config, name: str, ranks: int, precision: str, accumulation: int = 1) -> Scenario:
    shapes, groups = shapes_from(config.model), ledger_groups(config)
    return Scenario(name, shapes, groups, ranks, precision, accumulation, ENGINES[name])


# The quiz


def quiz(asks: bool) -> None:
    """Five guesses, and only then the books."""
    psi = books(SEVEN, "ddp", RANKS, "bf16").parameters
    print(f"Guess the gigabytes: {psi / 1e9:.2f}B parameters, AdamW, bf16, {RANKS} GPUs, one micro-batch a step.")
    print("How many GB (10⁹ bytes) of parameters, master weights, gradients and moments has each GPU,")
    print("just before the optimizer's step?\n")
    guesses, whose = guess(asks, psi)
    right = {name: before_step(name) for name in ENGINES}
    totals = {name: sum(entries.values()) / 1e9 for name, entries in right.items()}
    lines = []
    for name, entries in right.items():
        parts = [f"{amount / 1e9:.1f}" if amount else "–" for amount in entries.values()]
        lines.append([name, f"{guesses[name]:.1f}" if name in guesses else "–", f"{totals[name]:.1f}", *parts])
    print(table(["GB per GPU", whose, "the books", "params", "masters", "grads", "moments"], lines))
    print()
    for name, guessed in guesses.items():
        print(f"  {name:<6} {remark(guessed, totals[name], mistakes(name, psi))}")
    print(save_figure("lesson_09_quiz", lambda figure: draw_quiz(figure, right, guesses)))


def guess(asks: bool, psi: int) -> tuple[dict[str, float], str]:
    """Strategy → guess in GB: from the command line, from the keyboard, or what the ZeRO paper would say; and whose."""
    if sys.argv[1:]:
        given = [number(word) for word in sys.argv[1:]]
        if len(given) != len(ENGINES) or None in given:
            raise UserError(f"{' '.join(sys.argv[1:])!r} are no guesses; give five numbers: {', '.join(ENGINES)}.")
        return dict(zip(ENGINES, given, strict=True)), "you"
    if not asks:
        print("(Nobody to ask here: the ZeRO paper guesses in your place. Yours: demo.py 106 13 25 25 13)\n")
        return {name: each * psi / 1e9 for name, each in paper().items()}, "paper"
    guesses = {}
    for name in ENGINES:
        said = answer(f"  {name:<6} GB: ")
        if (value := number(said)) is not None:
            guesses[name] = value
    print()
    return guesses, "you"


def paper() -> dict[str, float]:
    """Bytes per parameter in the ZeRO paper (2 + 2 + 12); it has no FSDP, which is its stage 3."""
    n = RANKS
    return {"ddp": 16, "fsdp": 16 / n, "zero1": 4 + 12 / n, "zero2": 2 + 14 / n, "zero3": 16 / n}


def number(text: str) -> float | None:
    """A positive number, with point or comma; None for anything else."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if value > 0 else None


def answer(question: str) -> str:
    """A line from the keyboard; nothing at its end (Ctrl-D)."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def before_step(name: str) -> dict[str, int]:
    """Bytes by category, of the rank that holds most; without buffers."""
    ranks = [rank["after backward"] for rank in predict_memory(books(SEVEN, name, RANKS, "bf16"))]
    fullest = max(ranks, key=lambda held: sum(held.values()))
    return {category: fullest[category] for category in MODEL_STATES}


def mistakes(name: str, psi: int) -> dict[str, float]:
    """What a wrong guess may come from → its value in GB. The first that is near a guess is told."""
    n = RANKS
    known = {"that is DDP, where nothing is shared out.": 16}
    if name in ("zero1", "zero2"):
        known |= {
            "that is everything shared out, stage 3. Here 2 bytes of parameters stay whole.": 16 / n,
            "the float32 master weights (4 bytes) are not in there.": 2 + 10 / n,
            "the paper's: gradients whole. In backward they are; then a rank keeps its slice's.": 4 + 12 / n,
        }
    elif name == "zero3":
        known["the float32 master weights (4 bytes) are not in there."] = 12 / n
    else:
        known["that has master weights (4 bytes); torch keeps none beside float32 parameters."] = (
            20 if name == "ddp" else 20 / n
        )
    known["that is parameters alone."] = 4 if name == "ddp" else 2
    return {words: each * psi / 1e9 for words, each in known.items()}


def remark(guessed: float, right: float, known: dict[str, float]) -> str:
    """What to say of a guess: right within a tenth, else the mistake that gives about that number."""
    if abs(guessed / right - 1) <= 0.1:
        return "right, within a tenth."
    for words, value in known.items():
        if value and abs(guessed / value - 1) <= 0.05:
            return words
    factor = max(guessed / right, right / guessed)
    return f"{factor:.1f} times too {'much' if guessed > right else 'little'}."


def draw_quiz(figure, right, guesses) -> None:
    axes = figure.subplots()
    bottom = [0.0] * len(right)
    for category in MODEL_STATES:
        values = [entries[category] / 1e9 for entries in right.values()]
        axes.bar(list(right), values, 0.6, bottom=bottom, label=category, color=COLOURS[category])
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.plot(list(guesses), list(guesses.values()), "D", color="black", label="guessed")
    axes.axhline(85, color=SENT, linestyle=":", label="an H100")
    axes.set_title(f"7B on {RANKS} GPUs: model states per GPU (GB)", loc="left")
    axes.legend(frameon=False)


# The choice


def choices(asks: bool) -> None:
    """What would you choose? And what `shardrun plan` says."""
    print(f"\nWhat would you choose on {RANKS}×H100 ({', '.join(ENGINES)})?")
    for model, arguments in CHOICES.items():
        chosen = answer(f"\n  {model}: ") if asks else "ddp"
        estimates = planned(arguments)
        fitting = [e for e in estimates if e["fits"]]
        print(f"\n{model}, that is\n  shardrun plan {' '.join([*arguments, *ADAMW])} --world {RANKS}")
        lines = [
            [e["strategy"], f"{e['total'] / 2**30:.1f}", "fits" if e["fits"] else "no", f"{e['step_s'] * 1e3:,.1f}"]
            for e in estimates
        ]
        print(table(["", "GiB", "80 GB", "ms a step"], lines))
        print(f"  {verdict(chosen, estimates, fitting)}")


def planned(arguments: list[str]) -> list[dict]:
    """`shardrun plan` of a model under every strategy, as JSON."""
    command = [sys.executable, "-m", "shardrun", "plan", *arguments, *ADAMW, "--world", str(RANKS)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"shardrun plan failed: {done.stderr.strip()}")
    return json.loads(done.stdout)["estimates"]


def verdict(chosen: str, estimates: list[dict], fitting: list[dict]) -> str:
    """A choice, judged by whether it fits and how long its step is."""
    if not fitting:
        return "Nothing fits: fewer rows at once, checkpointing, or more GPUs."
    best = min(e["step_s"] for e in fitting)
    good = [e["strategy"] for e in fitting if e["step_s"] <= 1.01 * best]
    words = f"Shortest step, within 1 %: {', '.join(good)}."
    mine = next((e for e in estimates if e["strategy"] == chosen), None)
    if mine is None:
        return words
    if not mine["fits"]:
        return f"{chosen} lacks {-mine['spare'] / 2**30:.0f} GiB. {words}"
    longer = mine["step_s"] / best - 1
    how = "is as quick as any" if longer < 0.01 else f"takes {longer:.0%} longer than the best"
    return f"{chosen} fits, and {how}. {words}"


# Side by side


def side_by_side(launch, settings, guess) -> None:
    """The same steps under every strategy, in one process group."""
    runs = {}
    for name, engine in ENGINES.items():
        try:
            runs[name] = train(replace(launch, strategy=name), catalogue.engine(name, replace(settings, engine=engine)))
        except ImportError as error:  # DeepSpeed has wheels for Linux only
            if launch.rank == 0:
                print(f"Left out: {name}, which needs {error.name}.")
    if launch.rank:
        return
    print(headline(launch, "All five strategies, launched as"))
    print(f"\n{STEPS} steps of {ACCUMULATION} micro-batches. What rank 0 holds before a step, and sends in one (MiB):")
    headings = ["", "params", "masters", "grads", "optim", "buffers", "total", "books", "sent", "books"]
    print(table(headings, rows(launch, runs)))
    lines = []
    for name, run in runs.items():
        apart = max(abs(a - b) / b for a, b in zip(run["losses"], runs["ddp"]["losses"], strict=True))
        lines.append([name, f"{run['losses'][-1]:.5f}", f"{apart:.0e}" if apart else "0", f"{run['ms']:.0f}"])
    print("\n" + table(["", "last loss", "off ddp's, at most", "ms a step"], lines))
    if "zero3" in runs:
        guess.tell(sum(runs["zero3"]["held"].values()) / 2**20)
    print("\nThe losses agree: a strategy changes where things are, not what is computed. (Times on a CPU")
    print("say what gloo and Python cost, not what NVLink does.)")
    print(save_figure("lesson_09_side_by_side", lambda figure: draw(figure, launch, runs)))


def train(launch, strategy) -> dict:
    """A few steps; what was held before the last one's update, and sent in it."""
    prepare(strategy, accumulation=ACCUMULATION)
    data, losses = open_text(), []
    for step in range(STEPS):
        started = time.perf_counter()
        inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
        halves = list(zip(inputs.chunk(ACCUMULATION), targets.chunk(ACCUMULATION), strict=True))
        total = 0.0
        with Meter() as meter:
            for i, half in enumerate(halves):
                with strategy.micro_batch(last=i == ACCUMULATION - 1):
                    loss = strategy.model(*half)
                    strategy.backward(loss)
                total += loss.item() / ACCUMULATION
            held = measure(strategy.held())
            strategy.step()
        losses.append(total)
        elapsed = time.perf_counter() - started
    sent = sum(line.ring_bytes for line in meter.lines() if line.purpose != "bookkeeping")
    return {"held": held, "sent": sent, "losses": losses, "ms": elapsed * 1e3}


def predicted(launch, name: str) -> tuple[int, float]:
    """Bytes held before a step, and sent in one, by the books."""
    run = books(CONFIG, name, launch.world_size, launch.precision, ACCUMULATION)
    held = sum(predict_memory(run)[launch.rank]["after backward"].values())
    return held, sum(entry.ring_bytes for entry in predict_traffic(run, launch.rank) if entry.purpose != "bookkeeping")


def rows(launch, runs) -> list[list[str]]:
    lines = []
    for name, run in runs.items():
        held, sent = predicted(launch, name)
        parts = [mib(run["held"].get(category, 0)) for category in CATEGORIES]
        lines.append([name, *parts, mib(sum(run["held"].values())), mib(held), mib(run["sent"]), mib(sent)])
    return lines


def draw(figure, launch, runs) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bottom = [0.0] * len(runs)
    for category in CATEGORIES:
        values = [run["held"].get(category, 0) / 2**20 for run in runs.values()]
        left.bar(list(runs), values, 0.6, bottom=bottom, label=category, color=COLOURS[category])
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    left.set_title(f"Rank 0 of {launch.world_size} before a step (MiB)", loc="left")
    left.set_ylim(0, 1.35 * max(bottom))
    left.legend(frameon=False, ncols=3, fontsize=8)
    right.bar(list(runs), [run["sent"] / 2**20 for run in runs.values()], 0.6, color=SENT)
    right.set_title("Sent in a step (MiB)", loc="left")


if __name__ == "__main__":
    guarded(main)
