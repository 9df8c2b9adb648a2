"""Lesson 5: ten steps in one process, under ZeRO-1 by hand, and under DeepSpeed's: weights, bytes held, bytes sent.

accelerate launch --config_file …/cpu/zero1.yaml demo.py        two ranks (--num_processes 4 for more)
python demo.py                                                  one process: the books alone, for more and more ranks
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lessons.kit import CONFIG, books_of, build, headline, held, launched, mib, open_text, prepare, save_figure, table
from speedrun.ending import guarded
from speedrun.optim.policy import parameter_groups
from strategies.ledger.memory import measure
from strategies.ledger.predict import MODEL_STATES, predict_memory
from strategies.ledger.traffic import predict_traffic
from strategies.ledger.wire import Meter
from strategies.matrices import Place

STEPS, ACCUMULATION = 10, 2
SENT = {"all_reduce": "gradients", "all_gather": "parameters"}
"""Collective → what ZeRO-1 sends with it."""


def main() -> None:
    launch, strategy = launched()
    place = strategy.settings.place
    if launch.world_size == 1:
        print(headline(launch, "ZeRO-1"))
        books_alone(launch)
        return
    if launch.strategy != "zero1":
        raise ValueError(f"this demo compares with ZeRO-1, not with {launch.strategy}; launch it with cpu/zero1.yaml.")
    alone = train_alone(place.device)
    hand = train_by_hand(place)
    prepare(strategy, accumulation=ACCUMULATION)
    deepspeeds = train_strategy(strategy)
    if launch.rank == 0:
        report(launch, alone, hand, deepspeeds)


def load(name: str):
    """A file beside this one (a folder whose name begins with a digit is no package)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def groups_of(model: nn.Module) -> list[dict]:
    """The model's parameters in AdamW's groups: with and without weight decay."""
    named = dict(model.named_parameters())
    recipe = parameter_groups({name: tuple(p.shape) for name, p in named.items()}, CONFIG.optimizer)
    return [{**group.options, "params": [named[name] for name in group.parameters]} for group in recipe]


def micro_batches(data, place: Place, step: int):
    """This rank's rows of a step's global batch, in micro-batches, on its device."""
    rows = data.global_batch // place.world_size
    size = rows // ACCUMULATION
    for first in range(place.rank * rows, (place.rank + 1) * rows, size):
        yield tuple(tensor.to(place.device) for tensor in data.batch(step, first, first + size))


def train_alone(device: torch.device, steps: int = STEPS) -> dict:
    """One process, all rows, torch's AdamW over whole parameters: the reference."""
    data, model = open_text(), build().to(device)
    optimizer = torch.optim.AdamW(groups_of(model))
    for step in range(steps):
        for inputs, targets in micro_batches(data, Place(0, 1, device), step):
            (model(inputs, targets) / ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.optimizer.clip)
        optimizer.step()
        memory = {
            "parameters": list(model.parameters()),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer states": [t for state in optimizer.state.values() for t in state.values()],
        }
        sizes = {"master parameters": 0, **measure(memory)}
        optimizer.zero_grad()
    return {"weights": weights_of(model), "held": sizes, "sent": []}


def train_by_hand(place: Place, steps: int = STEPS) -> dict:
    """The same over all ranks, by_hand.py."""
    data, model = open_text(), build().to(place.device)
    zero = load("by_hand").HandZero1(model, groups_of(model), CONFIG.optimizer.clip)
    for step in range(steps):
        with Meter() as meter:
            for inputs, targets in micro_batches(data, place, step):
                (model(inputs, targets) / ACCUMULATION).backward()
            zero.reduce()
            memory = measure(zero.held())
            zero.step()
    return {"weights": weights_of(model), "held": memory, "sent": meter.lines()}


def train_strategy(strategy) -> dict:
    """The same under one of the trainer's strategies: what speedrun/train.py does."""
    data = open_text()
    for step in range(STEPS):
        with Meter() as meter:
            for i, (inputs, targets) in enumerate(micro_batches(data, strategy.settings.place, step)):
                with strategy.micro_batch(last=i == ACCUMULATION - 1):
                    strategy.backward(strategy.model(inputs, targets))
            memory = held(strategy)
            strategy.step()
    weights = {name: weight.cpu() for name, weight in strategy.optimizer.full_weights().items()}
    return {"weights": weights, "held": memory, "sent": meter.lines()}


def weights_of(model: nn.Module) -> dict:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def difference(a: dict, b: dict) -> float:
    """The largest between two sets of weights."""
    return max((a["weights"][name] - b["weights"][name]).abs().max().item() for name in a["weights"])


def sent_by(run: dict) -> dict[str, int]:
    """What a measured step sent: payload bytes by collective, without bookkeeping."""
    return {
        collective: sum(
            line.payload_bytes for line in run["sent"] if (line.collective, line.purpose) == (collective, "payload")
        )
        for collective in SENT
    }


def report(launch, alone: dict, hand: dict, deepspeeds: dict) -> None:
    run = books_of(launch, accumulation=ACCUMULATION)
    print(headline(launch, "ZeRO-1"))
    print(f"\n{STEPS} steps of {CONFIG.data.global_batch} rows, {ACCUMULATION} micro-batches a rank; bytes sent:")
    lines = []
    for name, one in (("by hand (by_hand.py)", hand), ("DeepSpeed's, as strategies/zero.py", deepspeeds)):
        lines.append([name, f"{difference(one, alone):.1e}", *(f"{sent:,}" for sent in sent_by(one).values())])
    booked = predict_traffic(run, launch.rank)
    totals = [sum(entry.payload_bytes for entry in booked if entry.purpose == what) for what in SENT.values()]
    lines.append(["the books", "0", *(f"{total:,}" for total in totals)])
    print(table(["", "off one process", "gradients reduced", "parameters gathered"], lines))
    print("\nWhat this rank holds before the update (MiB):")
    books = predict_memory(run)[launch.rank]["after backward"]
    rows = {
        "one process": alone["held"],
        "by hand": hand["held"],
        "DeepSpeed's": deepspeeds["held"],
        "the books": books,
    }
    print(
        table(["", *MODEL_STATES], [[name, *(mib(memory[c]) for c in MODEL_STATES)] for name, memory in rows.items()])
    )
    print(save_figure("lesson_05_zero1", lambda figure: draw(figure.subplots(), rows, "What rank 0 holds (MiB)")))


def books_alone(launch) -> None:
    """No ranks are needed to know what they would hold."""
    run = books_of(launch)
    rows, lines = {}, []
    for ranks in (1, 2, 4, 8, 64):
        engine = {"zero_optimization": {"stage": 1}}
        column = replace(run, strategy="zero1", world_size=ranks, engine=engine)
        rows[f"{ranks}"] = memory = predict_memory(column)[0]["after backward"]
        sent = sum(entry.ring_bytes for entry in predict_traffic(column))
        lines.append([f"{ranks}", *(mib(memory[c]) for c in MODEL_STATES), mib(sent)])
    print(f"\nThe books for {run.parameters:,} parameters under ZeRO-1 in {run.precision} (MiB on rank 0):")
    print(table(["ranks", *MODEL_STATES, "sent a step"], lines))
    print("\nMaster weights and optimizer states shrink with the ranks; parameters do not.")
    print("(For ZeRO-1 itself launch this on several ranks; README.md has the command.)")
    print(save_figure("lesson_05_books", lambda figure: draw(figure.subplots(), rows, "Rank 0 by ranks (MiB)")))


def draw(axes, rows: dict[str, dict[str, int]], title: str) -> None:
    bottom = [0.0] * len(rows)
    for category in MODEL_STATES:
        values = [memory[category] / 2**20 for memory in rows.values()]
        axes.bar(list(rows), values, 0.6, bottom=bottom, label=category)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.set_title(title, loc="left")
    axes.set_ylim(0, 1.3 * max(bottom))
    axes.legend(frameon=False, ncols=4, fontsize=8)


if __name__ == "__main__":
    guarded(main)
