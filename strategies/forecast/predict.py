"""Predicted memory: what every rank holds, in bytes by category, from shapes, dtypes, world size and settings alone.
On its device, which is what has to fit; what is offloaded from there to host memory stands apart (`predict_host`).

Plain Python, no torch: no weights, no process group, milliseconds for any size. What a strategy holds, its own books
say (strategies/*/books.py); here is what is alike for all.
"""

from collections.abc import Sequence
from dataclasses import replace

from strategies import catalogue
from strategies.ledger.terms import FP32, STATE_MOMENTS, BackwardMoment, Group, Held, Moments, Scenario


def predict_memory(scenario: Scenario) -> list[Moments]:
    """For every rank: moment → category → bytes on its device.

    Linear in parameters plus ranks, so also for thousands of ranks.
    """
    books = catalogue.books(scenario.strategy)
    ranks = books.states(scenario)
    for group in [] if books.optimizer_on_host(scenario) else scenario.groups:
        for rank, size in zip(ranks, second_moments(scenario, group), strict=True):
            for moment in STATE_MOMENTS[1:]:
                rank[moment]["optimizer states"] += size
    return ranks


def predict_host(scenario: Scenario) -> list[Moments]:
    """For every rank: moment → category → bytes in host memory, where something is offloaded; else nothing.

    Of what a strategy keeps there, not of what training on a CPU holds, nor of what the process itself does.
    """
    books = catalogue.books(scenario.strategy)
    ranks = books.on_host(scenario)
    for group in scenario.groups if ranks and books.optimizer_on_host(scenario) else []:
        for rank, size in zip(ranks, second_moments(scenario, group), strict=True):
            for moment in rank:
                rank[moment]["optimizer states"] += size if moment != "after prepare" else 0
    return ranks


def second_moments(scenario: Scenario, group: Group) -> list[int]:
    """For every rank: bytes of NorMuon's state of the matrices that it owns, in full whatever part of them it holds."""
    books = catalogue.books(scenario.strategy)
    replicas = books.replicas(scenario)
    owned = [0] * (scenario.world_size // replicas)
    if group.second_moments:
        owners = books.owners(scenario)
        for name in group.parameters:
            owned[owners[name]] += FP32 * max(scenario.shapes[name])
    return owned * replicas


def predict_states(scenario: Scenario) -> list[dict[str, int]]:
    """For every rank: group → bytes of its optimizer state. What lies like the weights does not depend on the other
    groups; who owns a matrix does.
    """
    by_group = {}
    for group in scenario.groups:
        shapes = {name: scenario.shapes[name] for name in group.parameters}
        alone = replace(scenario, shapes=shapes, groups=[replace(group, second_moments=False)])
        there = predict_host(alone) if catalogue.books(scenario.strategy).optimizer_on_host(scenario) else []
        ranks = [rank["after step"]["optimizer states"] for rank in there or predict_memory(alone)]
        by_group[group.name] = [sum(sizes) for sizes in zip(ranks, second_moments(scenario, group), strict=True)]
    return [{name: ranks[rank] for name, ranks in by_group.items()} for rank in range(scenario.world_size)]


def predict_after_forward(scenario: Scenario) -> list[Held]:
    """For every rank: category → bytes held after the forward pass of a step's last micro-batch, without activations.

    That is what is held between steps, and: with accumulation, the gradients of the micro-batches before; and
    parameters that are gathered and stay so for the backward pass, counted as parameters.
    """
    return _after_forward(scenario, predict_memory(scenario))


def _after_forward(scenario: Scenario, ranks: list[Moments]) -> list[Held]:
    """ranks: what `predict_memory` says."""
    books = catalogue.books(scenario.strategy)
    gathered = books.kept_gathered(scenario)
    found = []
    for rank, moments in enumerate(ranks):
        held = dict(moments["after step"])
        if scenario.accumulation > 1:
            held |= books.waiting(scenario, moments, rank)
        held["parameters"] += gathered
        found.append(held)
    return found


def predict_peak(
    scenario: Scenario,
    kept: int,
    passing: int,
    forward: int = 0,
    in_blocks: int = 0,
    backward: Sequence[BackwardMoment] = (),
) -> list[Held]:
    """For every rank: category → bytes at the peak of the passes, activations and what passes ("other") among them.

    kept: activations after the forward pass; passing: what the backward pass of the loss allocates for itself; forward:
    what the forward pass holds at its own peak beside what it keeps; in_blocks: the most that its blocks hold, kept or
    not; backward: the moments after the loss. All in bytes.

    The largest of these moments: at the end of the forward pass, where a fused loss has its own logits; in the backward
    pass of the loss, where all activations are there and no new gradient yet: both are exact; and those after it, where
    gradients come and activations go: within 3 % of what the engine does (benchmarks/plan_simulated.md), which
    strategies/forecast/simulate.py runs itself. A strategy may have one more, where all activations are gone
    (`StrategyBooks.at_the_end`).
    """
    books = catalogue.books(scenario.strategy)
    prefetched, copied = books.prefetched(scenario), books.at_the_end(scenario)
    later = books.in_backward(scenario, backward)
    passes = [
        {**held, "activations": moment.activations, "other": moment.passing}
        for held, moment in zip(later, backward, strict=True)
    ]
    if copied and later:
        passes.append({**later[-1], "activations": 0, "other": 0})
        passes[-1]["communication buffers"] = passes[-1].get("communication buffers", 0) + copied
    most = max(passes, key=lambda held: sum(held.values()), default={})  # on every rank the same moment
    unpacked = {"activations": in_blocks, "communication buffers": books.unpacked(scenario)}
    ranks = predict_memory(scenario)
    peaks = []
    for moments, between in zip(ranks, _after_forward(scenario, ranks), strict=True):
        resting = moments["after step"]["parameters"]
        gathered = between["parameters"] - resting
        between = {**between, "parameters": resting, "activations": 0, "other": 0}
        between["communication buffers"] += gathered
        at_loss = _plus(between, {"activations": kept, "other": passing, "communication buffers": prefetched})
        at_forward = {**at_loss, "other": forward}
        if scenario.world_size == 1:  # else the last all-gather's output is still there, as large as what comes next
            at_forward["communication buffers"] -= prefetched
        candidates = [at_loss, at_forward, _plus(between, unpacked), _plus(between, most)]
        peaks.append(max(candidates, key=lambda held: sum(held.values())))
    return peaks


def _plus(held: Held, more: Held) -> Held:
    """Both together, by category."""
    return {category: bytes + more.get(category, 0) for category, bytes in held.items()}
