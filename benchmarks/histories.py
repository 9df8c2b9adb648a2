"""Random histories of runs on two ranks: is every checkpoint and every record there that must be, and nothing else?

    python -m benchmarks.histories                      # 100 histories, minutes on two quiet cores
    python -m benchmarks.histories --examples 5 --out FILE.md

The state machine and its model are tests/speedrun/run/histories_machine.py. A history starts, goes on, goes back to any
checkpoint, set aside or not, meets a full disk and weights that are not finite, is started a second time, asked for
fewer steps and for a damaged checkpoint, and goes on in another folder. Its ranks are killed with -9 just before a
change of the folder that rank 0 makes: a rename, a replacement, a write through to the disk. Each start is the trainer,
under a strategy drawn by chance, so that each goes on from what another one saved. Anything that differs from the model
ends the script with the steps that lead to it.
"""

import argparse
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from speedrun.config import Config, DataConfig, ModelConfig
from strategies import catalogue
from tests.ranks import RankPool
from tests.speedrun.run.histories_machine import Histories, count_changes
from tests.speedrun.run.test_histories_machine import second_fails
from tests.speedrun.runs import small, train_here

STRATEGIES = catalogue.spread()
FOLDERS, FAULTS = "folders", "starts with a failing save"


def smallest() -> Config:
    """A step of a millisecond: what is tried here is the folder."""
    model = ModelConfig(layers=1, heads=1, width=8, mlp_width=8, max_sequence_length=16)
    data = DataConfig(sequence_length=8, global_batch=2, eval_tokens=16)
    return small(model=model, data=data, optimizer=replace(small().optimizer, name="adamw"))


def on_rank(name: str, config: Config, kill: int, fault: str) -> str:
    """The run on one of the ranks; returns the sentence of a run that was done before."""
    import speedrun.run.context
    import speedrun.train
    from strategies.checkpoint import save as saving

    said: list[str] = []

    def is_done(checked: Any, launch: Any) -> bool:
        if checked.resumed and checked.resumed.done:
            said.append(checked.resumed.done)
        return bool(said)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speedrun.train, "is_done", is_done)
        patch.setattr(speedrun.run.context, "further_steps", lambda *_: ())  # books are another matter, and slow
        if kill and dist.get_rank() == 0:
            count_changes(die, kill, patch)
        if fault:
            patch.setattr(saving, "first_not_finite" if fault == "nan" else "write_shard", second_fails(fault))
        try:
            train_here(name, config)
        except FloatingPointError:
            return "ended"
        except (ValueError, FileNotFoundError) as error:
            if "is being trained" in str(error):  # which rank 0 alone finds: the pool ends the other
                raise
            return str(error)
    return said[0] if said else "trained"


def one_folder(machine: Histories, steps: int, chance: random.Random) -> None:
    """A folder's histories: so many rules of the machine, each as likely as any other, and the model after each."""
    some = partial(chance.randint, 1)
    rules: list[Callable[[], None]] = [
        lambda: machine.go_on(more=some(3)),
        lambda: machine.go_on_with_a_fault(more=1 + some(2), fault=chance.choice(("full", "nan"))),
        lambda: machine.go_back(which=some(999), more=some(3)),
        lambda: machine.be_killed(more=some(3), at=some(40)),
        lambda: machine.be_killed_while_going_back(which=some(999), more=some(3), at=some(40)),
        lambda: machine.start_a_second_time(),
        lambda: machine.ask_again_and_for_less(),
        lambda: machine.ask_for_a_damaged_one(which=some(999)),
        lambda: machine.resume_elsewhere(which=some(999)),
    ]
    machine.begin(keep=some(3), best=chance.random() < 0.5, steps=1 + some(3))
    machine.the_folder_is_what_the_model_says()
    for _ in range(steps):
        chance.choice(rules)()
        machine.the_folder_is_what_the_model_says()
    machine.teardown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="histories (default: 100)")
    parser.add_argument("--steps", type=int, default=8, help="rules in each (default: 8)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    ranks, chance, count = RankPool(), random.Random(arguments.seed), Counter[str]()
    began = time.monotonic()

    def train(config: Config, kill: int, fault: str) -> str:
        name = chance.choice(STRATEGIES)
        count[name] += 1
        try:
            outcome = str(ranks.run(2, on_rank, name, config, kill, fault)[0])
        except (AssertionError, OSError, EOFError) as error:
            outcome = "killed" if kill else str(error)
        count[outcome if outcome in ("trained", "killed", "ended") else "refused or done"] += 1
        count[FAULTS] += bool(fault)
        return outcome

    class OnTwoRanks(Histories):
        config = smallest()

    OnTwoRanks.train = staticmethod(train)  # type: ignore[method-assign]
    try:
        for _ in range(arguments.examples):
            one_folder(OnTwoRanks(), arguments.steps, chance)
            count[FOLDERS] += 1
            print(f"{count[FOLDERS]} folders, {time.monotonic() - began:.0f} s, {dict(count)}", flush=True)
    finally:
        ranks.close()
    rows = [
        ("folders", count[FOLDERS]),
        ("starts of the trainer", sum(count[name] for name in STRATEGIES)),
        *((f"– under {name}", count[name]) for name in STRATEGIES),
        ("– that trained to their end", count["trained"]),
        ("– ended by weights that are not finite", count["ended"]),
        ("– killed with −9 just before a change of the folder", count["killed"]),
        ("– refused, or done already: nothing changed", count["refused or done"]),
        (
            "– with a failing save: a full disk, or weights that are not finite",
            count[FAULTS],
        ),
        ("went back, to another history", OnTwoRanks.forks),
        ("checkpoints or records lost, left over or in the wrong place", 0),
    ]
    text = "\n".join(["| what | how many |", "|---|---:|", *(f"| {what} | {number} |" for what, number in rows)])
    print(text)
    if arguments.out:
        command = f"python -m benchmarks.histories --examples {arguments.examples} --seed {arguments.seed}"
        arguments.out.write_text(
            f"# Random histories of runs on two ranks\n\n`{command}`, {(time.monotonic() - began) / 60:.0f} minutes. "
            "After every rule the folder was compared with a model of what must be in it: each checkpoint by its "
            f"history and step, verified byte by byte, and every record.\n\n{text}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
