"""Lesson 1: what a training step holds, moment by moment, and what a 32B model would.

python demo.py                                                  one process, on this machine
accelerate launch --config_file …/single.yaml demo.py           the same, as a launched run
"""

from lessons.kit import (
    CONFIG,
    headline,
    held,
    launched,
    launched_scenario,
    open_text,
    prepare,
    rows_of,
    save_figure,
    steps,
    table,
    watched_forward,
)
from shardrun.colours import COLOURS, SENT
from shardrun.lesson.guess import guess_first
from shardrun.tables import mib
from speedrun.books.activations import predict_activations
from speedrun.books.shapes import ledger_groups, shapes_from
from speedrun.config import Config, ModelConfig, OptimizerConfig
from speedrun.run.ending import guarded
from strategies.forecast.predict import predict_memory
from strategies.ledger.terms import Scenario

STATES = ("parameters", "gradients", "optimizer states")
COLUMNS = ("parameters", "gradients", "optimizer states", "activations")
STEPS = steps(20)


def main() -> None:
    guess = guess_first(1)
    launch, strategy = launched()
    data = open_text()
    prepare(strategy)
    moments = {"after prepare": held(strategy)}
    losses = []
    for step in range(STEPS):
        inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
        with strategy.micro_batch(last=True):
            if step < STEPS - 1:
                loss = strategy.model(inputs, targets)
            else:  # the last step is watched
                loss, book = watched_forward(strategy, inputs, targets)
                moments["after forward"] = {**held(strategy), "activations": book.total}
            strategy.backward(loss)
        if step == STEPS - 1:
            moments["after backward"] = held(strategy)
        strategy.step()
        losses.append(loss.item())
    moments["after step"] = held(strategy)
    if launch.rank == 0:
        report(launch, moments, losses, guess)


def report(launch, moments, losses, guess) -> None:
    run = launched_scenario(launch)
    print(headline(launch, f"One GPU, {run.parameters:,} parameters, AdamW"))
    print(f"Loss {losses[0]:.3f} → {losses[-1]:.3f} in {STEPS} steps\n")

    predicted = {moment: dict(entries) for moment, entries in predict_memory(run)[launch.rank].items()}
    rows = CONFIG.data.global_batch // launch.world_size
    if launch.strategy in ("single", "ddp"):
        precision = "autocast" if launch.precision == "bf16" else "fp32"
        activations = predict_activations(CONFIG.model, rows, CONFIG.data.sequence_length, precision).total
        predicted["after forward"] = {**predicted["after step"], "activations": activations}
    lines = []
    for moment, entries in moments.items():
        lines.append([moment, "measured", *(mib(entries.get(column, 0)) for column in COLUMNS)])
        if moment in predicted:
            lines.append(["", "predicted", *(mib(predicted[moment].get(column, 0)) for column in COLUMNS)])
    print(f"What rank {launch.rank} holds, in MiB:")
    print(table(["moment", "", *COLUMNS], lines))
    if not launch.cpu:
        print("(The predicted activations are those of torch's CPU kernels; on a GPU some kernels keep other things.)")
    if launch.strategy == "ddp":
        print("(DDP's buckets, in which gradients lie, cannot be seen from Python before the first backward pass.)")
    per = {name: moments["after backward"].get(name, 0) / run.parameters for name in STATES}
    print("\nBytes per parameter: " + " + ".join(f"{per[name]:.1f} ({name})" for name in STATES))
    guess.tell(sum(per.values()))

    large = Config(
        model=ModelConfig(layers=64, heads=50, width=6400, vocab_size=50_304), optimizer=OptimizerConfig(name="adamw")
    )
    books = Scenario("single", shapes_from(large.model), ledger_groups(large), 1)
    psi = books.parameters
    hand = dict(zip(STATES, (4 * psi, 4 * psi, 8 * psi), strict=True))
    found = predict_memory(books)[0]["after backward"]
    hand["together"] = sum(hand.values())
    found["together"] = sum(found[name] for name in STATES)
    lines = [
        [name, f"{amount / 1e9:,.1f}", f"{found[name] / 1e9:,.1f}", f"{found[name] - amount:,}"]
        for name, amount in hand.items()
    ]
    print(f"\nA model of {psi / 1e9:.1f}B parameters on one GPU, in GB (an H100, sold as 80 GB, has 85):")
    print(table(["", "by hand", "by the books", "bytes between them"], lines))
    print("What is between them: AdamW's step counters, 4 bytes for every tensor.\n")
    print(save_figure("lesson_01_one_gpu", lambda figure: draw(figure, moments, losses)))


def draw(figure, moments, losses) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bottom = [0.0] * len(moments)
    for column in COLUMNS:
        values = [entries.get(column, 0) / 2**20 for entries in moments.values()]
        left.bar(list(moments), values, 0.6, bottom=bottom, label=column, color=COLOURS[column])
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    left.set_title("What the rank holds (MiB)", loc="left")
    left.legend(frameon=False)
    right.plot(range(1, len(losses) + 1), losses, color=SENT)
    right.set_title("Loss by step", loc="left")


if __name__ == "__main__":
    guarded(main)
