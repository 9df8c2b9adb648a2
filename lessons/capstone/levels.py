"""The levels of a capstone. Each gets a registered strategy (shardrun.own.Own), and runs on every rank.

It raises Wrong with sentences that name the mistake, and returns what is to be said of a strategy that passes.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from lessons.capstone.events import Events, recorded, watch, watch_modules
from lessons.capstone.network import REDUCTIONS, slow
from lessons.capstone.reasons import earliest
from lessons.capstone.watched import Kept, Watched, all_notes, here, under
from lessons.worlds import all_agree
from shardrun.certify.equivalence import Case, Trace, run_reference, run_strategy
from shardrun.lesson.wrong import Wrong
from shardrun.own import Own, target_of
from shardrun.own.engine import OwnStrategy
from speedrun.books.shapes import scenario_of
from speedrun.config import Config, ScheduleConfig, StageConfig
from speedrun.presets import PRESETS
from speedrun.train import train
from strategies import catalogue, select
from strategies.base import Settings, Strategy
from strategies.forecast.predict import predict_after_forward, predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.ledger import book
from strategies.ledger.terms import CATEGORIES, Scenario
from strategies.mesh import Place
from strategies.optimizer import Recipe
from strategies.select import Launch
from strategies.start import Initial, begin

STEPS = 4
LONG = Kept.LATE
"""Steps of the trainer, in which nothing may leak."""
SOME = 8
"""Of them, as many as one process trains too; and of the trainer with Muon."""
ROWS = 12
"""Of a step's global batch."""


@dataclass(frozen=True)
class Trial(Case):
    """A case of the certificate, of a model that takes several buckets, and whose sizes divide by nothing.

    Three layers: of two, two ranks could have one each, and no matrix would be cut. The rate is another in the first
    step.
    """

    rows: int = ROWS

    def config(self) -> Config:
        config = super().config()
        model = replace(config.model, layers=3, width=96, mlp_width=201)
        schedule = ScheduleConfig(name="constant", stages=(StageConfig(1 / STEPS, lr=0.5), StageConfig()))
        return replace(config, model=model, schedule=schedule)


def right(own: Own) -> str:
    """What the single process computes, to rounding."""
    _certify(own, "adamw")
    return ""


def muon(own: Own) -> str:
    """The same with Muon, and its bytes."""
    _certify(own, "muon")
    _books(own, "muon", SOME)
    return ""


def _certify(own: Own, optimizer: str) -> None:
    place = here()
    usual = {2: [(1, False), (3, True)], 3: [(2, False)]}
    for accumulation, tied in usual.get(place.world_size, [(2, False)]):
        case = Trial(optimizer=optimizer, accumulation=accumulation, tied=tied, steps=STEPS)
        with slow(own) as network:
            strategy = Watched(own, Settings(place, "fp32", {}), network)
            try:
                trace = run_strategy(case, strategy, place.rank, place.world_size, phases=True)
            except NotImplementedError as error:  # what is written so far may be wrong
                _so_far(case, strategy)
                error.add_note(strategy.right_so_far)
                raise
        notes, words = all_notes(strategy), ""
        if place.rank == 0:
            reference = run_reference(case, phases=True)
            words = earliest(case, place.world_size, trace, reference, strategy, notes)
        _agree(words and f"{accumulation} micro-batch{'es' if accumulation > 1 else ''} a step. {words}")


def _so_far(case: Case, strategy: Watched) -> None:
    """The gradients of the first step, and what was noted, of a strategy of which a part is written. Collective."""
    place, notes, words = here(), all_notes(strategy), ""
    if place.rank == 0:
        trace = Trace(phases=[{"reduce": strategy.first_gradients}] if strategy.first_gradients else [])
        reference = run_reference(case, phases=True)
        reference = Trace(weights=reference.weights, phases=reference.phases[: len(trace.phases)])
        words = earliest(case, place.world_size, trace, reference, strategy, notes)
    _agree(words)


def _agree(words: str) -> None:
    """Raise what rank 0 has found, on all ranks. Collective."""
    said = [words]
    dist.broadcast_object_list(said, 0)
    if said[0]:
        raise Wrong(said[0])


def frugal(own: Own) -> str:
    """The trainer, for a while: the single process's loss; bytes held and sent; nothing that grows, on two ranks."""
    _books(own, "adamw", LONG if here().world_size == 2 else Kept.EARLY)
    return ""


def _config(optimizer: str, steps: int, ranks: int) -> Config:
    """The preset `tiny` without its tables, whose rows would be most of the model."""
    _, tiny = PRESETS["tiny"]
    return replace(
        tiny,
        model=replace(
            tiny.model, layers=2, heads=3, width=96, mlp_width=201, smear=False,
            bigram_rows=0, trigram_rows=0, fourgram_rows=0, ngram_width=0, kernels="torch",
        ),
        optimizer=replace(tiny.optimizer, name=optimizer, orthogonalization_dtype="float32", eps=1e-5, clip=1.0),
        schedule=replace(tiny.schedule, name="constant"),
        data=replace(tiny.data, sequence_length=16, global_batch=ROWS, micro_batch=ROWS // ranks // 2, eval_tokens=192),
        steps=steps, eval_every=0, progress="none", untimed_steps=0,
    )  # fmt: skip


def _books(own: Own, optimizer: str, steps: int) -> None:
    place = here()
    config = _config(optimizer, steps, place.world_size)
    with _scratch() as folder:
        config = replace(config, out=folder, name="own")
        with under(Kept) as made, contextlib.redirect_stdout(io.StringIO()):
            train("tiny", config, _launch(own.name, place.rank, place.world_size))
        scenario = scenario_of(config, own.name, place.world_size, "fp32", accumulation=2)
        all_agree(_grown(made[0]) or _unnamed(made[0]) or _too_much_alive(own, made[0], scenario))
        words = ""
        if place.rank == 0:
            ranks = book.read(Path(folder) / "own")["ranks"]
            words = _held(ranks, scenario) or _sent(ranks, scenario)
        _agree(words)
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(select, "start", _alone):
            alone = replace(config, name=f"single{place.rank}", steps=SOME)
            train("tiny", replace(alone, data=replace(config.data, micro_batch=ROWS)), _launch("single", 0, 1))
        _agree("" if place.rank else _losses(Path(folder)))


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder of rank 0's, known to all. Collective."""
    with tempfile.TemporaryDirectory() as folder:
        said = [folder]
        dist.broadcast_object_list(said, 0)
        yield said[0]
        dist.barrier()


def _launch(strategy: str, rank: int, world_size: int) -> Launch:
    return Launch(strategy, rank, rank, world_size, world_size, "fp32", True, {})


def _alone(launch: Launch, timeout: float) -> Strategy:
    """One process beside others: on every rank the whole batch. (The trainer agrees on things with all of them.)"""
    return catalogue.engine("single", Settings(Place(0, 1, torch.device("cpu")), "fp32", {}))


def _losses(folder: Path) -> str:
    """Against the trainer in one process, at the same steps."""
    runs = [(folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for name in ("own", "single0")]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in runs), strict=False):
        for key in ("train_loss", "val_loss"):
            if key in theirs and key in ours and not abs(ours[key] - theirs[key]) <= 1e-3 * theirs[key]:
                what = "validation loss" if key == "val_loss" else "loss"
                said = f"the {what} of step {ours['step']} is {ours[key]:.4f}, and {theirs[key]:.4f} in one process"
                return f"In the trainer {said}: does something stay from one pass to the next?"
    return ""


def _grown(kept: Kept) -> str:
    if len(kept.census) < 2:
        return ""
    early, late = kept.census[Kept.EARLY], kept.census[Kept.LATE]
    passed = Kept.LATE - Kept.EARLY
    if late.hooks > early.hooks:
        return f"in {passed} steps {late.hooks - early.hooks} hooks were added: register them once, in __init__."
    if late.tensors - early.tensors >= passed // 2 or late.bytes > 1.02 * early.bytes + 4096:
        return (
            f"{early.bytes:,} bytes of tensors are alive after step {Kept.EARLY} and {late.bytes:,} after step "
            f"{Kept.LATE}: something is kept from every step."
        )
    return ""


def _unnamed(kept: Kept) -> str:
    census = next((census for census in kept.census.values() if census.bytes), None)
    if census is None or census.unnamed <= 2048:
        return ""
    return f"{census.unnamed:,} bytes are alive after a step that held() does not name, of shapes {census.shapes}."


def _too_much_alive(own: Own, kept: Kept, scenario: Scenario) -> str:
    """While backward runs: what a strategy must not have whole at any time."""
    for category, most in getattr(target_of(own), "most", lambda _: {})(scenario).items():
        if kept.most.get(category, 0) > most + _padding(scenario):
            return (
                f"while backward runs {kept.most[category]:,} bytes of {category} are alive at once, where "
                f"{most:,} do: let go of them as they are done with."
            )
    return ""


def _padding(scenario: Scenario) -> int:
    """Bytes that cuts may add: every parameter filled up to a multiple of the ranks."""
    return 8 * scenario.world_size * (len(scenario.shapes) + 1)


def _held(ranks: list[dict[str, Any]], scenario: Scenario) -> str:
    memory, after_forward = predict_memory(scenario), predict_after_forward(scenario)
    for rank in ranks:
        for moment in ("after prepare", "after forward", "after backward", "after step"):
            due = memory[rank["rank"]].get(moment) or after_forward[rank["rank"]]
            for category in CATEGORIES:
                found, most = rank["memory"][moment][category]["measured"], due.get(category, 0)
                if moment == "after prepare" and category == "optimizer states":
                    continue  # they may be made at the start
                if found > most + _padding(scenario):
                    times = f", {found / most:.2g} times as much" if most else ""
                    holds = f"{moment.capitalize()} rank {rank['rank']} holds {found:,} bytes of {category}"
                    one = replace(scenario, world_size=1)
                    alone = (predict_memory(one)[0].get(moment) or predict_after_forward(one)[0]).get(category, 0)
                    return f"{holds}, where {most:,} do{times}.{_share(found, most, alone)}"
    return ""


def _share(found: int, most: int, alone: int) -> str:
    """What a factor means. alone: what one process would hold."""
    if 1.4 * most < alone <= 1.05 * found:
        return " That is what one process holds: the ranks could share it."
    if most and abs(found / most - 2) < 0.05:
        return " That is a second copy: let one be a view of the other."
    return ""


def _sent(ranks: list[dict[str, Any]], scenario: Scenario) -> str:
    for rank in ranks:
        due = [e for e in predict_traffic(scenario, rank["rank"]) if e.purpose != "bookkeeping"]
        lines = [line for line in rank["traffic"] if line["purpose"] == "payload"]
        found, most = sum(line["ring_bytes"] for line in lines), sum(e.ring_bytes for e in due)
        if found > most + 2 * _padding(scenario):
            sent = ", ".join(f"{line['collective']} ×{line['calls']}" for line in lines)
            reduced = sum(line["ring_bytes"] for line in lines if line["collective"] in REDUCTIONS)
            times = reduced / sum(e.ring_bytes for e in due if e.collective in REDUCTIONS)
            why = ""
            if "all_reduce" in sent and all(e.collective != "all_reduce" for e in due):
                why = " An all_reduce gives every rank the whole sum, at twice the price: each needs its own part."
            elif abs(times - scenario.accumulation) < 0.05:
                why = f" Once in each of the {scenario.accumulation} micro-batches: hold it back until the last."
            return (
                f"Rank {rank['rank']} puts {found:,.0f} bytes of a step on a ring's wire, where {most:,.0f} do: "
                f"{found / most:.2g} times as much ({sent}).{why}"
            )
    return ""


class _Recorded(OwnStrategy):
    """Its third step is recorded: by then all has been learned that is learned in the first."""

    events: Events | None = None

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        begin(model, initial, self.settings.place.device)
        self.steps, self.kept = 0, Events()
        watch(self._computed, model)
        super().prepare(model, recipe, clip, accumulation)
        watch_modules(self._computed, model)
        for phase in ("backward", "wait", "norm", "update", "clear"):
            setattr(self.own, phase, self._noted(phase, getattr(self.own, phase)))

    def _computed(self, what: str) -> None:
        if self.events is not None:
            self.events.work.append((self.events.tick(), what))

    def _noted(self, phase: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if self.events is not None:
                self.events.phase = phase
                if phase == "backward":
                    self.events.last = arguments[1]
            found = function(*arguments)
            if self.events is not None:
                self.events.phase = "forward"
            return found

        return call

    def step(self, update: bool = True) -> float:
        norm = super().step(update)
        self.steps += 1
        if self.events is not None:
            now, self.events = self.events, None
            self.kept = replace(now, messages=list(now.messages))  # the next step's come in the same list
        return norm


def overlapped(own: Own) -> str:
    """In the last micro-batch of a step next to nothing that travels is waited for with nothing to compute."""
    place, target = here(), target_of(own)
    case = Trial(optimizer="adamw", accumulation=2, steps=STEPS)
    strategy = _Recorded(own, Settings(place, "fp32", {}))
    with recorded(own) as events:
        strategy.events = None
        original = strategy.micro_batch

        def from_the_third(last: bool) -> Any:
            if strategy.steps == 2 and strategy.events is None:
                events.messages.clear()
                strategy.events, events.phase, events.last = events, "forward", False
            return original(last)

        strategy.micro_batch = from_the_third  # type: ignore[method-assign]
        run_strategy(case, strategy, place.rank, place.world_size)
    all_agree(_exposed(strategy.kept, target))
    return _beside(own) if place.world_size == 2 else ""


def _exposed(events: Events, target: Any) -> str:
    """What is waited for, in words; nothing where it is little enough."""
    phases = ("forward", "backward", "wait")
    messages = [m for m in events.messages if m.phase in phases and m.collective in target.MESSAGES and m.bytes]
    total = sum(message.bytes for message in messages)
    late = [message for message in messages if events.exposed(message)]
    bytes = sum(message.bytes for message in late)
    if not messages:
        return "nothing was sent during the passes."
    if bytes > 0.3 * total:
        if all(message.phase == "wait" for message in late):
            why = "it is sent after backward has ended, when nothing is left to compute. Send it from a hook."
        elif any(message.asked_to_wait for message in late):
            why = "the call waits for it on the spot. Give async_op=True and wait for the work later."
        else:
            why = "it is waited for before anything else is computed. Send it earlier, or wait later."
        largest = max(late, key=lambda message: message.bytes)
        return (
            f"of {total:,} bytes that travel in a step's passes {bytes:,} are exposed. The {largest.collective} of "
            f"{largest.bytes:,} bytes, for example: {why}"
        )
    bucket = getattr(target, "BUCKET", 0)
    if bucket and len(messages) > 2 * total / bucket + 2:
        return f"{len(messages)} messages carry what {total / bucket:.0f} buckets of {bucket:,} bytes would."
    return ""


def _beside(own: Own) -> str:
    """A step's time, and that of the library's; shown, not graded. Collective."""
    place = here()
    ours = _step_ms(OwnStrategy(own, Settings(place, "fp32", {})))
    words = f"A step takes {ours:.0f} ms"
    engine = catalogue.books(own.like).default_engine(place.world_size)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            theirs = _step_ms(catalogue.engine(own.like, Settings(place, "fp32", engine)))
    except ImportError:
        return f"{words} here."
    return f"{words} here, and {theirs:.0f} ms under {own.like} of the catalogue (shown, not graded)."


def _step_ms(strategy: Strategy) -> float:
    """The median of some steps."""
    place, case, times = here(), Trial(optimizer="adamw", accumulation=2, steps=8), [time.perf_counter()]
    inner = strategy.step

    def step(update: bool = True) -> float:
        norm = inner(update)
        times.append(time.perf_counter())
        return norm

    strategy.step = step  # type: ignore[method-assign]
    run_strategy(case, strategy, place.rank, place.world_size)
    return 1e3 * statistics.median([b - a for a, b in zip(times[2:], times[3:], strict=False)])
