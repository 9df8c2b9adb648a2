"""What FSDP2 holds, sends and hides: a block of rows of everything, in float32; gathered unit by unit for its use. With
`offload` the rows lie in host memory.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from strategies.fsdp.settings import resharded_to
from strategies.layout import row_blocks
from strategies.ledger.exchange import exchange, owners_of
from strategies.ledger.terms import (
    FP32,
    BackwardMoment,
    Entry,
    Held,
    Modules,
    Moments,
    Names,
    Resolved,
    Scenario,
    StrategyBooks,
    entry,
    host_moments,
    moments,
)


class FSDPBooks(StrategyBooks):
    """See strategies.ledger.terms.StrategyBooks."""

    precision_in_words = "float32 shards, gathered in 16 bits, gradients reduced in float32"
    words = {
        "parameters": "float32 rows, gathered for use",
        "master parameters": "none: the shards are float32",
        "gradients": "float32 rows",
        "waiting": "whole, float32, till the last pass",
        "optimizer states": "for its rows",
        "activations": "in the compute dtype",
        "buffers": "two gathered blocks, one's gradients",
    }

    def default_engine(self, world_size: int) -> dict[str, Any]:
        return {"reshard_after_forward": True, "wrap": ["Block"]}

    def refuses(self, scenario: Scenario) -> str:
        unit_of = {name: unit for unit, names in units(scenario).items() for name in names}
        for path, names in scenario.modules or ():
            for name in names:  # fully_shard shares a parameter between modules of one unit only
                if unit_of[name] != (other := _unit(scenario, path)):
                    classes = [scenario.classes[unit] for unit in (unit_of[name], other) if unit]
                    return (
                        f"fsdp_transformer_layer_cls_to_wrap {', '.join(scenario.engine['wrap'])}: {name} is used in "
                        f"{path} too, and both must be in one unit; leave out {' and '.join(classes)}."
                    )
        return ""

    def settings(self, scenario: Scenario) -> list[Resolved]:
        engine, parts, width = scenario.engine, units(scenario), scenario.compute_bytes
        largest = max((scenario.elements(names) for unit, names in parts.items() if unit), default=0)
        root, mib = scenario.elements(parts.get("", [])), 2**20
        size = resharded_to(engine, scenario.world_size)
        between = {1: "whole", scenario.world_size: "cut over all ranks"}.get(size, f"cut over {size} ranks")
        gathered = f"gathered as one: {width * largest / mib:,.1f} MiB at most, and the root's "
        return [
            Resolved("wrap", ", ".join(engine.get("wrap") or ["(none)"]), gathered + f"{width * root / mib:,.1f} MiB",
                     "wrap" in engine),
            Resolved("reshard_after_forward", str(engine.get("reshard_after_forward", True)),
                     f"between the passes a unit's parameters are {between}", "reshard_after_forward" in engine),
            Resolved("param_dtype", scenario.precision, "of what is gathered, and of gradients as they come", False),
            Resolved("reduce_dtype", "fp32", f"a unit's gradients once more, {FP32 * largest / mib:,.1f} MiB", False),
            Resolved("offload_params", str(_offloads(scenario)), "true: shards, gradients and states are on the host",
                     "offload" in engine),
        ]  # fmt: skip

    def states(self, scenario: Scenario) -> list[Moments]:
        """float32 under bf16 and fp16 too (which exist gathered only). Parameters and gradients are padded to the
        largest block of rows on every rank, because the collectives work on equal parts; optimizer state is not.
        Offloaded, all of it lies on the host.
        """
        if _offloads(scenario):
            return [moments(0, 0, 0, 0) for _ in range(scenario.world_size)]
        padded, _, states = self._shards(scenario)
        return [moments(FP32 * padded, 0, FP32 * padded, mine) for mine in states]

    def on_host(self, scenario: Scenario) -> list[Moments]:
        """CPUOffloadPolicy: shards, their gradients from the backward pass to the step, and optimizer states.

        From a GPU every gradient comes by itself, without padding (`foreach_reduce` in _fsdp_collectives.py, torch
        2.13); where host and device are one it stays a view of what was reduced.
        """
        if not _offloads(scenario):
            return []
        padded, rows, states = self._shards(scenario)
        return [
            host_moments({"parameters": FP32 * padded}, FP32 * (own if scenario.host_apart else padded), mine)
            for own, mine in zip(rows, states, strict=True)
        ]

    def optimizer_on_host(self, scenario: Scenario) -> bool:
        return _offloads(scenario)

    def _shards(self, scenario: Scenario) -> tuple[int, list[int], list[int]]:
        """Elements of a rank's shards with their padding; by rank elements without it, and bytes of states."""
        padded, own, states = 0, [0] * scenario.world_size, [0] * scenario.world_size
        for g in scenario.groups:
            for n in g.parameters:
                rows, row = scenario.shapes[n][0], math.prod(scenario.shapes[n][1:])
                block = math.ceil(rows / scenario.world_size)
                padded += block * row
                for rank in range(math.ceil(rows / block)):  # the ranks that hold any of it
                    mine = min(block, rows - rank * block)
                    own[rank] += mine * row
                    states[rank] += g.state_bytes * mine * row + g.holder_bytes
        return padded, own, states

    def owners(self, scenario: Scenario) -> dict[str, int]:
        held = {name: row_blocks(shape, scenario.world_size) for name, shape in scenario.shapes.items()}
        return owners_of(scenario, held, scenario.world_size)

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        """Whole and without padding: the reduce-scatter is held back."""
        return {"gradients": FP32 * scenario.parameters}

    def kept_gathered(self, scenario: Scenario) -> int:
        return _kept_gathered(scenario)

    def prefetched(self, scenario: Scenario) -> int:
        """The last unit, whose parameters are gathered again at the very start of the backward pass."""
        wrapped = [names for unit, names in units(scenario).items() if unit]
        return scenario.compute_bytes * _padded(scenario, wrapped[-1]) if wrapped and _reshards(scenario) else 0

    def in_backward(self, scenario: Scenario, passes: Sequence[BackwardMoment]) -> list[Held]:
        """A unit is gathered and the next one fetched while its gradients come, in the compute dtype. The last of them
        lets it go; then they lie once more in the reduce-scatter's input, in float32, till the next unit's do
        (`FSDPParamGroup.post_backward`). What waited is in float32 and goes with its unit. The root is the last.
        """
        parts, width, ranks = units(scenario), scenario.compute_bytes, scenario.world_size
        unit_of = {name: unit for unit, names in parts.items() for name in names}
        left = {unit: set(names) for unit, names in parts.items()}
        order = [unit for unit in reversed(parts) if unit]
        following = dict(zip(order, order[1:], strict=False))
        numel = {unit: scenario.elements(names) for unit, names in parts.items()}
        waits, reshards, several = scenario.accumulation > 1, _reshards(scenario), ranks > 1
        kept = _kept_gathered(scenario)
        reducing = own = reduced = 0
        held = []
        for moment in passes:
            names = moment.made
            touched = dict.fromkeys(unit_of[name] for name in moment.at_work if unit_of[name])
            done = [unit for unit in dict.fromkeys(unit_of[name] for name in names) if left[unit] <= set(names)]
            for name in names:
                left[unit_of[name]].discard(name)
            own += width * scenario.elements(names)
            if done:
                reducing = FP32 * numel[done[-1]]
            gathered = 0
            for unit in touched if reshards else ():
                there = [*([] if unit in done else [unit]), *([following[unit]] if unit in following else [])]
                gathered += width * sum(_padded(scenario, parts[each]) for each in there)
            buffers = gathered + (reducing if several else 0)
            shards = FP32 * reduced // ranks - (FP32 * reduced if waits else 0)
            if "" in done:
                buffers -= min(kept, width * _padded(scenario, parts[""]))
            held.append({"gradients": own + shards, "communication buffers": buffers})
            for unit in done:
                own, reduced = own - width * numel[unit], reduced + numel[unit]
                if not reshards and unit:
                    kept -= width * numel[unit]
        return held

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """One all-gather per unit, of blocks of ceil(rows / N) rows: rows that do not divide make the gathered tensor
        longer than the parameters. In forward, and for resharded modules again in backward, at every micro-batch, in
        the compute dtype; backward lets go of all of them (`FSDPParamGroup.post_backward`, torch 2.13). Those that lie
        within a smaller group between the passes are gathered there: axis "reshard".

        One reduce-scatter per unit at the last micro-batch (`set_requires_gradient_sync`), float32 by our policy.
        """
        ranks, times = scenario.world_size, scenario.accumulation
        parts, size = units(scenario), resharded_to(scenario.engine, ranks)
        padded = {unit: _padded(scenario, names) for unit, names in parts.items()}
        again = [unit for unit in parts if unit and size > 1]

        def gathered(over: int, which: list[str], axis: str) -> list[Entry]:
            elements = times * sum(scenario.elements(parts[unit]) for unit in which)
            payload = times * scenario.compute_bytes * sum(padded[unit] for unit in which)
            return entry(over, "all_gather", "parameters", times * len(which), elements, payload, axis)

        reduced = FP32 * sum(padded.values())
        return [
            *gathered(ranks, [*parts, *(again if size == ranks else [])], "all"),
            *gathered(size, again if size < ranks else [], "reshard"),
            *entry(ranks, "reduce_scatter", "gradients", len(parts), scenario.parameters, reduced),
            *exchange(
                scenario,
                rank,
                lambda: {name: row_blocks(shape, ranks) for name, shape in scenario.shapes.items()},
                [group.parameters for group in scenario.matrix_groups],
            ),
            *entry(ranks, "all_reduce", "bookkeeping", 1, 0, FP32),  # the global norm
        ]

    def volume_in_words(self, scenario: Scenario) -> str:
        gathered = "gathered in forward and again in backward" if _reshards(scenario) else "gathered once"
        if 1 < (size := resharded_to(scenario.engine, scenario.world_size)) < scenario.world_size:
            gathered = f"gathered in forward and again in backward within groups of {size} ranks"
        return (
            f"blocks are {gathered} for every micro-batch, what no block holds once; gradients are reduce-scattered "
            "once a step (torch FSDP2)"
        )

    def hidden_by(self, compute: float, accumulation: int) -> dict[str, float]:
        """Parameters are gathered during all passes, gradients reduced during the last backward pass."""
        return {"gradients": compute * 2 / 3 / accumulation, "parameters": compute}


class HSDPBooks(FSDPBooks):
    """HSDP: FSDP2 within groups of ranks, each of which holds everything once; gradients are averaged over them too."""

    def default_engine(self, world_size: int) -> dict[str, Any]:
        return {**super().default_engine(world_size), "replicas": 2}

    def fits(self, world_size: int) -> bool:
        """Two replicas, of two ranks at least."""
        return world_size >= 4 and world_size % 2 == 0

    def replicas(self, scenario: Scenario) -> int:
        return int(scenario.engine["replicas"])

    def _one(self, scenario: Scenario) -> Scenario:
        """One of the replicas: its ranks alone."""
        return replace(scenario, world_size=scenario.world_size // self.replicas(scenario))

    def states(self, scenario: Scenario) -> list[Moments]:
        one = super().states(self._one(scenario))
        return [copy.deepcopy(rank) for _ in range(self.replicas(scenario)) for rank in one]

    def on_host(self, scenario: Scenario) -> list[Moments]:
        one = super().on_host(self._one(scenario))
        return [copy.deepcopy(rank) for _ in range(self.replicas(scenario)) for rank in one]

    def owners(self, scenario: Scenario) -> dict[str, int]:
        """In every replica the same."""
        return super().owners(self._one(scenario))

    def kept_gathered(self, scenario: Scenario) -> int:
        return _kept_gathered(self._one(scenario))

    def prefetched(self, scenario: Scenario) -> int:
        return super().prefetched(self._one(scenario))

    def in_backward(self, scenario: Scenario, passes: Sequence[BackwardMoment]) -> list[Held]:
        return super().in_backward(self._one(scenario), passes)

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """As FSDP's along the axis "shard", and one all-reduce per unit of what a rank then holds of the gradients,
        along the axis "replicate".
        """
        one, replicas = self._one(scenario), self.replicas(scenario)
        entries = []
        if one.world_size > 1:
            entries = super().traffic(one, rank % one.world_size, modules)
            entries = [replace(e, axis="shard") if e.axis == "all" else e for e in entries]
        if replicas > 1:
            parts = units(scenario)
            shards = sum(_padded(one, names) for names in parts.values()) // one.world_size
            elements = scenario.parameters // one.world_size
            entries += entry(replicas, "all_reduce", "gradients", len(parts), elements, FP32 * shards, "replicate")
        return entries

    def volume_in_words(self, scenario: Scenario) -> str:
        inner = super().volume_in_words(scenario)
        return (
            f"within each of {self.replicas(scenario)} replicas {inner}; a rank's share of them is all-reduced over "
            "the replicas"
        )


def units(scenario: Scenario) -> dict[str, list[str]]:
    """What is gathered at once: path of a wrapped module → parameters that no wrapped module inside it holds; "" is the
    root, with what is in none. In the model's order.

    Which modules are wrapped, their classes say (`wrap`). Where they are not known, the items of lists of modules are.
    """
    parts: dict[str, list[str]] = {}
    for name in scenario.shapes:
        parts.setdefault(_unit(scenario, name.rpartition(".")[0]), []).append(name)
    return parts


def _unit(scenario: Scenario, path: str) -> str:
    """The wrapped module that a module is in, or is."""
    wrap = scenario.engine.get("wrap")

    def is_wrapped(path: str) -> bool:
        if wrap is None or wrap and not scenario.classes:
            return path.rpartition(".")[2].isdigit()
        return scenario.classes.get(path) in wrap

    while path and not is_wrapped(path):
        path = path.rpartition(".")[0]
    return path


def _kept_gathered(scenario: Scenario) -> int:
    """What no wrapped module holds; and of the others what is not let go: all, or a smaller group's share."""
    parts, size = units(scenario), resharded_to(scenario.engine, scenario.world_size)
    kept = _padded(scenario, parts.pop("", []))
    if not _reshards(scenario) or size < scenario.world_size:
        kept += sum(_padded(scenario, names) for names in parts.values()) // size
    return scenario.compute_bytes * kept


def _reshards(scenario: Scenario) -> bool:
    """Whether a unit's parameters are gathered again for its backward pass."""
    return resharded_to(scenario.engine, 2) > 1


def _offloads(scenario: Scenario) -> bool:
    return bool(scenario.engine.get("offload", False))


def _padded(scenario: Scenario, names: Names) -> int:
    """Elements of gathered parameters: FSDP2 pads rows to a multiple of the world size."""
    rows = {name: math.ceil(scenario.shapes[name][0] / scenario.world_size) * scenario.world_size for name in names}
    return sum(rows[name] * math.prod(scenario.shapes[name][1:]) for name in names)


def books(name: str) -> StrategyBooks:
    """For strategies.catalogue."""
    return HSDPBooks() if name == "hsdp" else FSDPBooks()
