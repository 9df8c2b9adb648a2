"""A run's books: what every rank was predicted to hold and to send in a step, what it did, and the remainder.

Measured in one step of the run, the third or the next one that does not follow a validation: the optimizer's state
exists by then, and engines have settled (in their second step DDP agrees on its buckets and ZeRO-3 on the order of
modules, which it forgets in a validation). Predicted from the configuration alone. That one step takes longer, since a
dispatch mode sees its every operator, and compiled blocks run uncompiled for it; no other step pays anything.
(`books_every` asks for further ones: a live view.)

Under "memory" stands what the device holds. What a config file offloads stands beside it under "host memory".

A remainder that is no surprise says `why`: above all the peak's, whose prediction is a closed form of one of a few
moments (strategies/forecast/predict.py). A line that an engine's setting makes one that is not predicted names it.

Predictions are of the device, the kernels, the attention functions, the precision and torch's version that the run
resolved to; every rank's books say so under "predicted for". On a GPU the allocator is asked too: its bytes stand
beside the sum of all predicted lines, cuBLAS's workspaces and the batch (strategies/ledger/allocator.py). What has been
compared with a GPU so far: benchmarks/gpu_books.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.books.forward_pass import ForwardPass
from speedrun.books.kernels import CPU, Kernels
from speedrun.books.parts import part_of
from speedrun.books.shapes import scenario_of
from speedrun.books.stand_ins import inside
from speedrun.config import Config, ModelConfig
from speedrun.model.attend import where
from speedrun.model.compiling import uncompiled
from speedrun.stages import Stage
from strategies import catalogue
from strategies.base import COMPUTE_DTYPES, Precision, Strategy
from strategies.forecast.predict import predict_after_forward, predict_host, predict_memory, predict_states
from strategies.forecast.traffic import predict_traffic
from strategies.ledger import book
from strategies.ledger.activations import ActivationBook, measure_activations
from strategies.ledger.memory import measure_apart
from strategies.ledger.replay import Replay, replay
from strategies.ledger.terms import CATEGORIES, MOMENTS, Held
from strategies.ledger.timeline import timeline
from strategies.ledger.tracer import Tracer
from strategies.ledger.wire import Meter
from strategies.select import Launch

BESIDE = {"after forward": ("activations",), "peak": ("activations", "other")}
"""Moment → what is measured then beside the categories that a strategy holds; "other" is what passes: temporaries,
gradients of activations."""

OTHER_KERNELS = "the closed form follows the kernels that torch 2.13 picks on a CPU; others keep other things"
ON_A_GPU = "the closed form was compared with one H100 and torch 2.11 (benchmarks/gpu_books.md)"

LARGEST = 8
"""So many of the allocations alive at the peak are named."""


def kernels_of(model: ModelConfig, device: torch.device, precision: Precision) -> Kernels:
    """The kernels of a run on this device, whose `model.kernels` is resolved."""
    if device.type != "cuda":
        return CPU
    return Kernels(where(device, COMPUTE_DTYPES[precision]), model.attention, triton=model.kernels == "triton")


class Books:
    """The books of one rank:

    books.note("after prepare")
    …
    with books.step():
        … loss = books.forward(inputs, targets), backward …
        books.note("after backward")
        strategy.step()
    books.note("after step")
    """

    def __init__(self, config: Config, launch: Launch, strategy: Strategy, stage: Stage, loss_comes_first: bool):
        """stage: that the counted step belongs to; loss_comes_first: whether the ranks agree on it before an update."""
        accumulation, rows = stage.batches.accumulation, stage.batches.micro_batch
        about = (launch.strategy, launch.world_size, launch.precision)
        scenario = scenario_of(config, *about, accumulation, launch.engine)
        self.rank, self.strategy = launch.rank, strategy
        self.loss_comes_first = launch.world_size > 1 and loss_comes_first
        short, long = stage.windows[-1]
        model = replace(config.model, window_short=short, window_long=long)
        self.device = strategy.optimizer.place.device
        self.run = replace(scenario, host_apart=self.device.type != "cpu")
        kernels = kernels_of(model, self.device, launch.precision)
        self.forward_pass = ForwardPass(model, rows, stage.sequence_length, kernels=kernels)
        self.held: dict[str, Held] = {}
        self.host: dict[str, Held] = {}
        """In host memory, where something is offloaded."""
        self.states: dict[str, int] = {}
        self.allocator: dict[str, dict[str, int]] = {}
        self.activations: ActivationBook | None = None
        self.peak: Replay | None = None
        self.course: dict[str, Any] = {}
        """Of rank 0: the counted step in the order in which it happened (strategies/ledger/timeline.py)."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a counted step: every collective, allocation and release is noted. Nothing else of a run pays."""
        self.meter = Meter(self.strategy.axes)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # from here on it is this step's
        names = {id(module): path or "model" for path, module in self.strategy.model.named_modules()}
        self.tracer = Tracer(names, inside, gpu=self.device.type == "cuda")
        self.tracer.buffers = lambda: self.strategy.held().get("communication buffers", ())
        with self.meter, uncompiled(self.strategy.model), self.tracer:
            self.tracer.admit(self.strategy.held())
            self._mark_host()
            yield
            self._enter("end")
        if self.activations:
            self.peak = replay(self.tracer.events, step=0)
            if self.rank == 0:
                self.course = timeline(self.tracer.events, step=0)
            if self.device.type == "cuda":  # of the passes: before the update
                most = self.allocator["after backward"]["peak allocated"]
                unseen = most - self.peak.peak_total  # what kernels allocate for themselves, rounding
                self.allocator["peak"] = {"allocated": most, "allocated, in no category": unseen}
        del self.tracer

    def forward(self, *batch: Tensor, **options: Any) -> Tensor:
        """The strategy's model on a micro-batch, watched: what autograd keeps is measured."""
        losses: list[Tensor] = []

        def run_forward() -> Tensor:
            losses.append(self.strategy.model(*batch, **options))
            return losses[0]

        self.forward_pass = replace(self.forward_pass, future=len(options.get("future_weights", ())))
        self._enter("forward")
        self.activations = measure_activations(self.strategy.model, run_forward, part_of)
        self.note("after forward", self.activations.total)
        # Those that ZeRO-3 has gathered; the lasting ones have a category already.
        self.tracer.mark(self.strategy.held()["parameters"], "communication buffers", overwrite=False)
        self._enter("backward")
        return losses[0]

    def note(self, moment: str, activations: int = 0) -> None:
        """Measure what this rank holds now; activations: bytes of them, where they are there."""
        apart = measure_apart(self.strategy.held(), self.strategy.offloaded(), self.device)
        self.held[moment], self.host[moment] = apart
        if activations:
            self.held[moment]["activations"] = activations
        self.states = state_by_group(self.strategy)
        if self.device.type == "cuda":
            allocated = torch.cuda.memory_allocated(self.device)
            self.allocator[moment] = {
                "allocated": allocated,
                "reserved": torch.cuda.memory_reserved(self.device),
                "peak allocated": torch.cuda.max_memory_allocated(self.device),
                # Temporaries, the batch, rounding to 512 bytes: whatever no category of the books holds.
                "allocated, in no category": allocated - sum(self.held[moment].values()),
            }
        if moment == "after backward":
            self._enter("step")

    def _enter(self, phase: str) -> None:
        """Tell the tracer what comes next, and what the lasting allocations are held for."""
        if self.tracer.phase != "forward":  # gathered parameters stand in for the lasting ones there
            for category, tensors in self.strategy.held().items():
                self.tracer.mark(tensors, category)
            self._mark_host()
        self.tracer.enter(0 if phase != "end" else 1, phase)

    def _mark_host(self) -> None:
        """On a CPU, where no tensor says by itself that it would lie on the host of a GPU."""
        for tensors in self.strategy.offloaded().values():
            self.tracer.mark_host(tensors)

    def gather(self) -> list[dict[str, Any]]:
        """Every rank's books, on every rank. Collective."""
        memory, host = self._memory(), self._host()
        overhead = {
            "after forward": {**self.forward_pass.overhead(self.run, peak=False), "batch": self.forward_pass.batch},
            "peak": self.forward_pass.overhead(self.run),
        }
        ours = {
            "rank": self.rank,
            "predicted for": self.forward_pass.predicted_for(self.run),
            "memory": memory,
            **({"host memory": host} if host else {}),
            "activations": self._activations(),
            "largest at the peak": self.peak.largest[:LARGEST] if self.peak else [],
            "optimizer states by group": {
                name: entry(predict_states(self.run)[self.rank].get(name, 0), found)
                for name, found in self.states.items()
            },
            "allocator": against_allocator(memory, self.allocator, overhead),
            "traffic": self._traffic(),
            **({"timeline": self.course} if self.course else {}),
        }
        ranks: list[Any] = [ours] * self.run.world_size
        if self.run.world_size > 1:
            dist.all_gather_object(ranks, ours)
        return ranks

    def _memory(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Moment → category → predicted, measured and remainder, in bytes."""
        forward = self.forward_pass.predict(self.run)
        predicted = {
            **predict_memory(self.run)[self.rank],
            "after forward": {**predict_after_forward(self.run)[self.rank], "activations": forward.total},
            "peak": self.forward_pass.predict_peak(self.run)[self.rank],
        }
        held = dict(self.held)
        if self.peak:
            held["peak"] = self.peak.peak
        unknown = self.not_predicted
        memory = {
            moment: {
                category: entry(
                    None if category in unknown else predicted[moment].get(category, 0), held[moment].get(category, 0)
                )
                for category in (*CATEGORIES, *BESIDE.get(moment, ()))
            }
            for moment in MOMENTS
            if moment in held
        }
        for moment, entries in memory.items():
            for category, line in entries.items():
                if category in unknown:
                    line["why"] = f"not predicted: {unknown[category]}"
                elif line["remainder"] and (why := self._why(moment, category)):
                    line["why"] = why
        return memory

    def _host(self) -> dict[str, dict[str, dict[str, Any]]]:
        """As `_memory`, of what lies in host memory; nothing where nothing is offloaded, nor predicted to be."""
        predicted = predict_host(self.run)
        if not predicted and not any(self.host.values()):
            return {}
        ours, unknown = predicted[self.rank] if predicted else {}, self.not_predicted
        lines: dict[str, dict[str, dict[str, Any]]] = {}
        for moment, held in self.host.items():
            said = ours.get(moment, {})
            lines[moment] = {
                category: entry(None, held.get(category, 0)) | {"why": f"not predicted: {unknown[category]}"}
                if category in unknown
                else entry(said.get(category, 0), held.get(category, 0))
                for category in CATEGORIES
            }
        return lines

    @property
    def not_predicted(self) -> dict[str, str]:
        """Category or collective → the setting for which it is not predicted."""
        return catalogue.books(self.run.strategy).not_predicted(self.run)

    def _why(self, moment: str, category: str) -> str:
        """Why a remainder is no surprise, or nothing."""
        if why := catalogue.books(self.run.strategy).why_remainder(moment, category):
            return why
        if category == "activations" and (why := self._other_kernels()):
            return why
        if moment == "peak":
            return "an estimate in closed form; shardrun plan --simulate runs the engine for the exact moment"
        return ""

    def _other_kernels(self) -> str:
        """Why this run's kernels may keep other things than predicted, or nothing."""
        if self.device.type != "cpu":
            return ON_A_GPU
        return "" if torch.__version__.startswith("2.13.") else OTHER_KERNELS

    def _activations(self) -> dict[str, dict[str, Any]]:
        """Part of the model → what autograd keeps of it after a micro-batch's forward pass, layers added up."""
        if self.activations is None:
            return {}
        predicted, measured = self.forward_pass.predict(self.run).by_part(), self.activations.by_part()
        parts = {part: entry(predicted.get(part, 0), measured.get(part, 0)) for part in {**measured, **predicted}}
        for line in parts.values():
            if line["remainder"] and (why := self._other_kernels()):
                line["why"] = why
        return parts

    def _traffic(self) -> list[dict[str, Any]]:
        """Per collective and axis, payload and bookkeeping apart: calls; bytes predicted, measured, what remains."""
        lines: dict[tuple[str, str, str], dict[str, Any]] = {}

        def line(collective: str, purpose: str, axis: str) -> dict[str, Any]:
            empty = {"calls": 0, "predicted": 0, "measured": 0, "ring_bytes": 0.0}
            return lines.setdefault((collective, purpose, axis), empty)

        for expected in predict_traffic(self.run, self.rank):
            purpose = "bookkeeping" if expected.purpose == "bookkeeping" else "payload"
            line(expected.collective, purpose, expected.axis)["predicted"] += expected.payload_bytes
        if self.loss_comes_first:  # a float32, from all ranks to all
            line("all_reduce", "bookkeeping", "all")["predicted"] += 4
        for found in self.meter.lines():
            row = line(found.collective, found.purpose, found.axis)
            row |= {"calls": found.calls, "measured": found.payload_bytes, "ring_bytes": found.ring_bytes}
        for (collective, purpose, _), row in lines.items():
            row["remainder"] = row["measured"] - row["predicted"]
            if purpose == "payload" and (key := self.not_predicted.get(collective)):
                row |= {"predicted": None, "remainder": None, "why": f"not predicted: {key}"}
        return [
            {"collective": collective, "purpose": purpose, "axis": axis, **row}
            for (collective, purpose, axis), row in lines.items()
        ]


def counted_step(steps: int, eval_every: int, start: int = 0) -> int:
    """The step whose books are kept, in a run from `start` on; the last one where none is as the module's docstring
    wants it.
    """
    return next((step for step in range(start + 2, steps) if not eval_every or step % eval_every), steps - 1)


def further_steps(first: int, last: int, eval_every: int, every: int) -> list[int]:
    """The counted step, and where `every` is not 0 every so many steps after it, up to `last`, the end of its stage.
    One that follows a validation is left out.
    """
    later = range(first + every, last, every) if every else ()
    return [first, *(step for step in later if not eval_every or step % eval_every)]


def state_by_group(strategy: Strategy) -> dict[str, int]:
    """Bytes of optimizer state per line of the policy table: Muon's momentum, AdamW's moments of each kind."""
    optimizer = strategy.optimizer
    groups = {name: group["name"] for group in optimizer.param_groups for name in group["names"]}
    held: dict[str, dict[int, Tensor]] = {name: {} for name in groups.values()}
    for piece in optimizer.all_slices():
        for tensor in optimizer.state.get(piece.holder, {}).values():
            held[groups[piece.name]][id(tensor)] = tensor
    return {name: sum(t.numel() * t.element_size() for t in tensors.values()) for name, tensors in held.items()}


def against_allocator(
    memory: dict[str, dict[str, dict[str, Any]]],
    allocator: dict[str, dict[str, int]],
    overhead: dict[str, Held],
) -> dict[str, dict[str, Any]]:
    """The allocator's figures by moment, and beside what it has allocated the sum of all that was predicted.

    memory: as `Books` has it. overhead: what is predicted beside the categories after the forward pass and at the peak,
    by what it is; of it cuBLAS's workspaces stay for good once there was a step.
    """
    lasting = {"cuBLAS workspaces": overhead["peak"].get("cuBLAS workspaces", 0)}
    lines = {}
    for moment, figures in allocator.items():
        beside = {} if moment == "after prepare" else overhead.get(moment, lasting)
        known = book.added(memory[moment])["predicted"]
        predicted = None if known is None else known + sum(beside.values())
        lines[moment] = {
            **figures,
            "predicted": predicted,
            "predicted, in no category": beside,
            "remainder": None if predicted is None else figures["allocated"] - predicted,
        }
    return lines


def entry(predicted: int | None, measured: int) -> dict[str, Any]:
    """A line of the books; predicted None where it is not."""
    remainder = None if predicted is None else measured - predicted
    return {"predicted": predicted, "measured": measured, "remainder": remainder}
