"""The words of the books: what a prediction is of, and what its lines are. Plain Python, no torch.

Every strategy's `books.py` is a class `Books` below; strategies/forecast asks it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from strategies.layout import Shape

FP32, BF16 = 4, 2
"""Bytes per element; fp16 takes what bf16 does."""

CATEGORIES = ("parameters", "master parameters", "gradients", "optimizer states", "communication buffers")
"""What a rank's tensors are held for (activations are counted elsewhere: no strategy owns them)."""
MODEL_STATES = CATEGORIES[:4]
MOMENTS = ("after prepare", "after forward", "after backward", "after step", "peak")
"""When a step is looked at: before the first one; once the last forward pass is done; before the update, with all
gradients there; after it, gradients cleared; and whenever it holds most."""
STATE_MOMENTS = ("after prepare", "after backward", "after step")
"""When no pass runs, and only what lasts is there."""

Held = dict[str, int]
"""Bytes by category."""

Moments = dict[str, Held]
"""Moment → bytes by category."""

Names = Sequence[str]

Modules = tuple[tuple[str, tuple[str, ...]], ...]
"""(path, the module's own parameters) of every module but lists of modules, in order; the root's path is ""."""

ComputePrecision = Literal["fp32", "autocast", "bf16", "fp16"]
"""Of activations. autocast: float32 weights, products in 16 bits; bf16 and fp16: weights in that too."""


@dataclass(frozen=True)
class Group:
    """Parameters under one rule. `whole_matrix`: Muon (one buffer per element), else AdamW (two, and a step count)."""

    name: str
    parameters: tuple[str, ...]
    whole_matrix: bool
    second_moments: bool = False
    """NorMuon: the owner of a matrix also keeps one number per row or column, whichever are more."""
    accumulates: bool = False
    """AdamW that does not update at every step: it also keeps a sum of gradients per element."""
    sharded: bool = False
    """AdamW under DDP: each rank updates its part of a parameter, and has the state of that part alone."""

    @property
    def state_bytes(self) -> int:
        """Optimizer state per element: Muon's momentum 4, AdamW's two moments 8 (and a sum 4); in float32 always."""
        return FP32 if self.whole_matrix else (3 if self.accumulates else 2) * FP32

    @property
    def holder_bytes(self) -> int:
        """Per tensor that the optimizer updates: AdamW keeps a step count."""
        return 0 if self.whole_matrix else FP32


@dataclass(frozen=True)
class Scenario:
    """All that a prediction needs. shapes: name → shape, in the model's order, a tied weight once."""

    strategy: str
    shapes: dict[str, Shape]
    groups: Sequence[Group]
    world_size: int
    precision: str = "fp32"
    accumulation: int = 1
    engine: dict[str, Any] = field(default_factory=dict)
    """The engine's own settings, as strategies.select reads them from an accelerate config."""
    classes: dict[str, str] = field(default_factory=dict)
    """Path of a module → the name of its class. FSDP wraps by class; without any, "blocks.3" is taken for a Block."""
    modules: Modules | None = None
    """All of them in the order in which they are called, where it is known. It matters to ZeRO-3 alone, and only where
    a limit makes it let go of parameters between two uses."""
    host_apart: bool = True
    """Whether the device has a memory of its own, as a GPU has: what is offloaded is copied. On a CPU it is not."""

    def numel(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def elements(self, names: Names) -> int:
        """Of these parameters together."""
        return sum(self.numel(name) for name in names)

    def so_far(self, made: Sequence[Names]) -> list[int]:
        """Elements of these parameters and of all before them, for each of the moments."""
        return list(itertools.accumulate(self.elements(names) for names in made))

    @cached_property
    def parameters(self) -> int:
        """Ψ: elements of the model."""
        return self.elements(tuple(self.shapes))

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of what the model computes with, where an engine casts it."""
        return FP32 if self.precision == "fp32" else BF16

    @property
    def matrix_groups(self) -> list[Group]:
        """Those of Muon."""
        return [group for group in self.groups if group.whole_matrix]


@dataclass(frozen=True)
class BackwardMoment:
    """A moment of the backward pass at which a model may hold most, whatever the strategy. Bytes."""

    made: tuple[str, ...]
    """Parameters whose gradients have come since the moment before."""
    at_work: tuple[str, ...]
    """Those of the part that the pass is in."""
    activations: int
    """What is still kept, and what gradient checkpointing has computed again."""
    passing: int
    """Gradients of activations, and a weight's that has not been handed over yet."""


@dataclass(frozen=True)
class Entry:
    """One line of the traffic of a rank in one step.

    elements: of the model, before padding; payload_bytes and ring_bytes as defined in strategies/ledger/wire.py.
    """

    collective: str
    purpose: str
    """gradients (reduced), parameters (gathered), updates (Muon's matrices and back), bookkeeping (norms, flags)."""
    calls: int
    elements: int
    payload_bytes: int
    ring_bytes: float
    axis: str = "all"
    """Of the mesh along which the ranks lie that take part; "all": every rank does."""


def ring_bytes(collective: str, payload_bytes: int, world_size: int) -> float:
    """Bytes that a rank puts on the wire of a ring, on average over the ranks (Patarasu and Yuan, 2009)."""
    share = (world_size - 1) / world_size
    factor = {
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "broadcast": share,
        "reduce": share,
    }
    return payload_bytes * factor.get(collective, 1.0)


def entry(
    world_size: int, collective: str, purpose: str, calls: int, elements: int, payload: int, axis: str = "all"
) -> list[Entry]:
    """A line, or none where nothing is called. world_size: ranks that take part."""
    if not calls:
        return []
    return [Entry(collective, purpose, calls, elements, payload, ring_bytes(collective, payload, world_size), axis)]


def moments(
    parameters: int, masters: int, gradients: int, states: int, resident: int = 0, buffers: int = 0
) -> dict[str, Held]:
    """The three moments; `resident`, `buffers`: gradients and buffers that stay allocated between steps too."""
    base = {"parameters": parameters, "master parameters": masters, "communication buffers": buffers}
    return {
        "after prepare": {**base, "gradients": resident, "optimizer states": 0},
        "after backward": {**base, "gradients": gradients, "optimizer states": states},
        "after step": {**base, "gradients": resident, "optimizer states": states},
    }


def host_moments(resting: Held, gradients: int, states: int) -> Moments:
    """In host memory: what is always there, gradients among it; what gradients there are beside those after a backward
    pass; and the optimizer's states, from the first step on.
    """
    resting = {**dict.fromkeys(CATEGORIES, 0), **resting}
    between = {**resting, "optimizer states": states}
    full = {**between, "gradients": resting["gradients"] + gradients}
    return {"after prepare": resting, "after forward": between, "after backward": full, "after step": dict(between)}


class Resolved(NamedTuple):
    """A setting of an engine that decides memory, as it is in the end."""

    key: str
    value: str
    effect: str
    said: bool
    """Whether the config file says it; else it is a default, the engine's or ours."""


class StrategyBooks:
    """What a strategy's `books.py` says of a scenario. What stands here is true where nothing is said.

    All bytes are of one rank. Nothing here has ever seen a live tensor: shapes, dtypes, settings and the number of
    ranks are all that a prediction knows.
    """

    words: dict[str, str]
    """What a rank keeps, in a few words: by category, of "buffers" and "activations", and "waiting", the gradients of
    the micro-batches before the last."""
    precision_in_words: str
    """What `mixed_precision: bf16` or fp16 means here, for `explain`."""
    needs = ""
    """A package that it needs beside torch."""
    refuses_compile = ""
    """Why torch.compile does not go with it, and what does; empty where it does."""
    computes_bf16: ComputePrecision = "bf16"
    """How the model computes in bf16: "bf16" or "autocast". In fp16 it does likewise."""

    def fits(self, world_size: int) -> bool:
        """Whether so many ranks can be shared out like this."""
        return True

    def default_engine(self, world_size: int) -> dict[str, Any]:
        """The engine's settings of the shipped config, for plans without one."""
        return {}

    def settings(self, scenario: Scenario) -> list[Resolved]:
        """Those of the engine that decide memory, defaults among them."""
        return []

    def replicas(self, scenario: Scenario) -> int:
        """Groups of ranks, each of which holds everything once."""
        return 1

    def states(self, scenario: Scenario) -> list[Moments]:
        """For every rank: what its device holds at the three moments, NorMuon's second moments left out."""
        raise NotImplementedError

    def on_host(self, scenario: Scenario) -> list[Moments]:
        """For every rank: what lies in host memory beside that, at all moments but the peak, likewise; of a step that
        is not the first. Empty where nothing is offloaded."""
        return []

    def optimizer_on_host(self, scenario: Scenario) -> bool:
        """Whether the optimizer's states lie there."""
        return False

    def owners(self, scenario: Scenario) -> dict[str, int]:
        """Every matrix's owner as the optimizer assigns it."""
        raise NotImplementedError

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        """Gradients, and the buckets that stay with them, of the micro-batches before the last. moments: the rank's."""
        return {}

    def kept_gathered(self, scenario: Scenario) -> int:
        """Parameters that are gathered and stay so from the forward pass to the backward pass."""
        return 0

    def prefetched(self, scenario: Scenario) -> int:
        """What is gathered at the very start of the backward pass."""
        return 0

    def in_backward(self, scenario: Scenario, passes: Sequence[BackwardMoment]) -> list[Held]:
        """For every moment of the backward pass: category → bytes more (or less) than after the forward pass.

        Here gradients lie where they are made, in float32.
        """
        if scenario.accumulation > 1:
            return [{} for _ in passes]
        return [{"gradients": FP32 * elements} for elements in scenario.so_far([moment.made for moment in passes])]

    def unpacked(self, scenario: Scenario) -> int:
        """What is gathered in one buffer and copied out of it while the blocks' forward pass runs."""
        return 0

    def at_the_end(self, scenario: Scenario) -> int:
        """What is copied where the activations are gone."""
        return 0

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """What a rank of several sends in one step."""
        return []

    def volume_in_words(self, scenario: Scenario) -> str:
        """One line for a table: why this strategy sends what it sends, and not what the ZeRO paper says."""
        return ""

    def hidden_by(self, compute: float, accumulation: int) -> dict[str, float]:
        """Purpose → seconds of computation that its collectives run beside. compute: of all passes of a step."""
        return {}

    def published(self, psi: int, ranks: int, largest_layer: int) -> dict[str, int]:
        """Estimator → bytes of model states that it says a rank holds, with AdamW in 16-bit mixed precision.

        psi: elements of the model; largest_layer: of its largest layer. See strategies/forecast/court.py.
        """
        return {}

    def refuses(self, scenario: Scenario) -> str:
        """Why the engine's settings cannot run, and the way out, in one sentence; nothing where they can."""
        return ""

    def not_predicted(self, scenario: Scenario) -> dict[str, str]:
        """Line of the books (a category of memory, or a collective without its bookkeeping) → the engine's setting for
        which it is not predicted. What the other methods say of such a line does not count.
        """
        return {}

    def why_remainder(self, moment: str, category: str) -> str:
        """Why a difference between predicted and measured is no surprise, or nothing."""
        return ""
