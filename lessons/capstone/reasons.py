"""From what a strategy computed to the mistake that gives just that: the usual ones are computed and compared."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lessons.capstone.watched import Note, Watched, extent
from shardrun.certify.equivalence import LOSS_TOLERANCE, Case, Trace, parting
from shardrun.own import new_state
from speedrun.data import open_data
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from speedrun.optim.schedule import forward_options
from speedrun.stages import resolve_stages
from strategies.layout import Intervals

Gradients = dict[str, Tensor]


def earliest(case: Case, ranks: int, trace: Trace, reference: Trace, strategy: Watched, notes: list[Note]) -> str:
    """Where a run leaves the single process first, and why, in sentences; nothing where it does not.

    trace: with phases. notes: of all ranks (`all_notes`).
    """
    found: list[Note] = []
    for step, (loss, right) in enumerate(zip(trace.losses, reference.losses, strict=True)):
        if not abs(loss - right) <= LOSS_TOLERANCE * abs(right):
            words = f"the loss is {loss:.6f}, and {right:.6f} in one process."
            found.append(Note(step, "forward", f"{words} {_why_loss(case, step, loss, reference)}"))
            break
    for step, (norm, right) in enumerate(zip(trace.norms, reference.norms, strict=True)):
        if not abs(norm - right) <= 10 * LOSS_TOLERANCE * abs(right):
            words = f"norm() is {norm:.6g}, and {right:.6g} in one process."
            own = local_passes(case, ranks, step, weights_before(case, step, reference))[0]
            found.append(Note(step, "norm", f"{words} {_why_norm(norm, right, strategy.shares[step], own)}"))
            break
    if parted := parting(trace, reference):
        step, phase, name = parted.step, parted.phase, parted.name
        here, there = trace.phases[step][phase][name].cpu().flatten(), reference.phases[step][phase][name].flatten()
        off = ~((here - there).abs() <= 1e-4 * there.abs().max() + 1e-7)
        off = off if off.any() else torch.ones_like(off)
        words = f"{name} is wrong ({parted.parted} of {parted.parameters} parameters are), {extent(off)}."
        if phase == "reduce":
            one = _of_one_rank(off, next(p.state for p in strategy.optimizer.all_slices() if p.name == name))
            why = _why_gradient(case, ranks, step, name, here, one, reference) or _shifted(here, there, 2 * ranks)
        elif phase == "clip":
            why = "The trainer scales what parts() gives, in place: give views of the gradients, not copies."
        else:
            why = _why_weight(step, name, here, off, reference, case)
        found.append(Note(step, phase, f"{words} {why}"))
    found += notes  # of two at the same time the one above says more
    if not found:
        return ""
    first = min(found, key=lambda note: note.when)
    return f"Step {first.step}, {first.phase}: {first.words}".strip()


def _of_one_rank(off: Tensor, state: Intervals) -> Tensor:
    """Of the elements those that the rank has which has most of them: what another has may be wrong in another way."""
    parts = [torch.zeros_like(off) for _ in state]
    for part, interval in zip(parts, state, strict=True):
        part[interval.start : interval.stop] = off[interval.start : interval.stop]
    return max(parts, key=lambda part: int(part.sum()))


def _alike(found: Tensor, right: Tensor, tolerance: float = 2e-3) -> bool:
    scale = right.abs().max()
    return bool(((found - right).abs() <= tolerance * scale + 1e-9).all())


def _first(found: Tensor, candidates: Sequence[tuple[str, Tensor]]) -> str:
    return next((words for words, value in candidates if _alike(found, value)), "")


def weights_before(case: Case, step: int, reference: Trace) -> dict[str, Tensor]:
    """The single process's weights at the start of a step."""
    if step:
        return reference.phases[step - 1]["update"]
    model = GPT(case.config().model)
    model.init_weights(case.config().seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def local_passes(
    case: Case, ranks: int, step: int, weights: dict[str, Tensor]
) -> tuple[list[list[Gradients]], list[float]]:
    """What every rank computes alone: gradients[rank][micro-batch], and its mean losses, with these weights."""
    config = case.config()
    data = open_data(config.data, config.model.vocab_size, config.seed, resolve_stages(config, case.steps))
    model = GPT(config.model, document_start=data.document_start)
    model.load_state_dict(weights, strict=False)
    rows = case.rows // (ranks * case.accumulation)
    gradients: list[list[Gradients]] = []
    losses = []
    for rank in range(ranks):
        gradients.append([])
        losses.append(0.0)
        for i in range(case.accumulation):
            first = (rank * case.accumulation + i) * rows
            loss = model(*data.batch(step, first, first + rows), **forward_options(config, step, case.steps))
            loss.backward()
            losses[-1] += loss.item() / case.accumulation
            gradients[-1].append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
    return gradients, losses


def _why_gradient(case: Case, ranks: int, step: int, name: str, found: Tensor, off: Tensor, reference: Trace) -> str:
    passes = local_passes(case, ranks, step, weights_before(case, step, reference))[0]
    each = [[micro[name].flatten()[off] for micro in rank] for rank in passes]
    count, found = case.accumulation, found[off]
    right = sum(sum(micro) for micro in each) / (ranks * count)
    assert isinstance(right, Tensor)
    if not torch.isfinite(found).all():
        return "It is not finite: was the memory let go, or never filled, before it was read?"
    if not found.any():
        return "It is zero: it was sent before it had come, or cleared or let go before it was read."
    if len(found) > 1 and (found == found[0]).all():
        return "All elements are the same number: it was read before the work that brings it was waited for."
    own = [sum(rank) / count for rank in each]
    candidates: list[tuple[str, Tensor]] = [
        (f"It is {ranks} times too large: summed over the ranks, and not divided by their number.", right * ranks),
        (f"It is {ranks} times too small: divided by the number of ranks once too often.", right / ranks),
    ]
    for rank, mine in enumerate(own):
        candidates += [
            (f"It is rank {rank}'s own gradient: it was never reduced.", mine),
            (f"It is rank {rank}'s own gradient, divided by {ranks}: it was never reduced.", mine / ranks),
        ]
    if count > 1:
        first, last = (sum(rank[i] for rank in each) / (ranks * count) for i in (0, -1))
        candidates += [
            ("It is the last micro-batch's alone: those before are lost.", last),
            ("It is the last micro-batch's alone, not divided by their number: those before are lost.", last * count),
            ("It is the first micro-batch's alone: what came after it was sent is lost.", first),
            (f"It is {count} times too small: the loss comes divided by the number of micro-batches.", right / count),
            (f"It is {count} times too large.", right * count),
        ]
        for mine in each:
            words = "Of the ranks that do not update it only the last micro-batch is in it: each had to be added up."
            candidates.append((words, last + sum(mine[:-1]) / (ranks * count)))
            words = "It was sent at the first micro-batch; the later ones were only added up at home, after that."
            candidates.append((words, first + sum(mine[1:]) / count))
            candidates.append((words, (first * ranks + sum(mine[1:]) / count) / ranks))
        words = "In each micro-batch what had been reduced before was reduced again, as if it were new."
        candidates.append((words, _reduced_again(each, ranks, count)))
    older: list[list[Gradients]] = []
    if step:
        for phase in ("clip", "reduce"):
            before = reference.phases[step - 1][phase][name].flatten()[off]
            words = "The gradient of the step before is still in it: clear() forgets it."
            candidates += [(words, right + before), (words, right + before / ranks)]
        older = local_passes(case, ranks, step - 1, weights_before(case, step - 1, reference))[0]
        stale_passes = local_passes(case, ranks, step, weights_before(case, step - 1, reference))[0]
        stale = sum(micro[name].flatten()[off] for rank in stale_passes for micro in rank) / (ranks * count)
        assert isinstance(stale, Tensor)
        candidates.append(("It was computed with the weights from before the last update: those are stale.", stale))
    said = _first(found, candidates) or _times(found, right, ranks)
    return said or _shares(found, each, [sum(micro[name].flatten()[off] for micro in rank) for rank in older])


def _shares(found: Tensor, each: list[list[Tensor]], older: list[Any]) -> str:
    """What it is made of, in words, where it is a sum of the ranks' micro-batches with other weights than it should.

    each: [rank][micro-batch]; older: what every rank computed in the step before.
    """
    ranks, count = len(each), len(each[0])
    terms = torch.stack([*(micro for rank in each for micro in rank), *older]).double()
    if found.numel() < 4 * len(terms):
        return ""
    weights = torch.linalg.lstsq(terms.T, found.double()[:, None]).solution[:, 0]
    if not _alike(found, (weights @ terms).float()):
        return ""
    if older and float(weights[ranks * count :].abs().max()) > 1e-2:
        return "The gradient of the step before is still in it, on some ranks: clear() forgets it, p.grad too."
    shares = (weights[: ranks * count] * ranks * count).view(ranks, count).tolist()
    said = "; ".join(f"rank {r}: {', '.join(f'{share:.2f}' for share in rank)}" for r, rank in enumerate(shares))
    return f"It should have 1 of each rank's each micro-batch, in order, and has of {said}."


def _shifted(found: Tensor, right: Tensor, most: int) -> str:
    """In words, where it is the right one some elements further on, or back."""
    for by in range(1, min(most, found.numel() // 2) + 1):
        if _alike(found[by:], right[:-by]) or _alike(found[:-by], right[by:]):
            many = "s" if by > 1 else ""
            return f"It is shifted by {by} element{many}: padding goes to the end, and counts nowhere else."
    return ""


def _times(found: Tensor, right: Tensor, ranks: int) -> str:
    """In words, where it is the right one but for a factor."""
    factor = float((found * right).sum() / right.square().sum())
    if not _alike(found, factor * right):
        return ""
    divisor = ranks / factor
    if round(divisor) >= 1 and abs(divisor - round(divisor)) < 1e-3 * divisor:
        return f"It is {factor:.3g} times what it should be: divided by {divisor:.0f}, and there are {ranks} ranks."
    return f"It is {factor:.3g} times what it should be."


def _reduced_again(each: list[list[Tensor]], ranks: int, count: int) -> Tensor:
    """Sums over the ranks of all that has been added up, in every micro-batch, divided at the end."""
    total = torch.zeros_like(each[0][0])
    for i in range(count):
        total = ranks * total + sum(rank[i] for rank in each) / count
    return total / ranks


def _why_loss(case: Case, step: int, loss: float, reference: Trace) -> str:
    if not math.isfinite(loss):
        return "A weight was read before it was there, or after it was let go."
    if not step:
        return "The forward pass computes with other weights."
    for back in range(1, step + 1):
        older = sum(local_passes(case, 1, step, weights_before(case, step - back, reference))[1])
        if abs(loss - older) <= LOSS_TOLERANCE * abs(older):
            ago = "the last update" if back == 1 else f"the last {back} updates"
            return f"It is the loss with the weights from before {ago}: the forward pass computes with stale ones."
    return "The forward pass computes with other weights than were updated: some are stale, or were let go too early."


def _why_norm(found: float, right: float, shares: list[float], own: list[list[Gradients]]) -> str:
    """shares: norm of what each rank has of the mean gradient; own: what each computed alone (`local_passes`)."""
    ranks = len(own)
    twice = "Was the gradient multiplied or divided by the number of ranks once more?"
    alone = [math.sqrt(sum(float(_mean(micro, n).square().sum()) for n in micro[0])) for micro in own]
    squares = sum(share**2 for share in shares)
    candidates = {
        "That is the square of it: the root is missing.": right**2,
        "Norms of parts do not add up: add their squares, over all ranks, and take the root.": sum(shares),
        f"Every rank's square was counted {ranks} times.": right * ranks**0.5,
        "That is the square's mean over the ranks, and its root: squares of parts are added up.": right / ranks**0.5,
        f"It is {ranks} times too large. {twice}": right * ranks,
        f"It is {ranks} times too small. {twice}": right / ranks,
    }
    if squares < 1.0001 * right**2:  # parts of one whole
        for rank, share in enumerate(shares):
            candidates[f"That is of rank {rank}'s part alone: add the squares of all ranks."] = share
    else:
        candidates[f"Every rank has all of the gradient, and it was counted {ranks} times."] = right * ranks**0.5
    for rank, norm in enumerate(alone):
        words = f"That is of rank {rank}'s own gradient, before it was reduced: take it of what parts() gives."
        candidates[words] = norm
    for words, value in reversed(candidates.items()):
        if abs(found - value) <= 1e-4 * abs(value):
            return words
    if not math.isfinite(found):
        return "A gradient is not finite, or was read before it was there."
    if found < right:
        return "It is smaller: some elements of the gradient are left out."
    return "It is larger: some elements are counted more than once, or something that is no gradient."


def _mean(micro_batches: list[Gradients], name: str) -> Tensor:
    return torch.stack([micro[name] for micro in micro_batches]).mean(0)


def _why_weight(step: int, name: str, found: Tensor, off: Tensor, reference: Trace, case: Case) -> str:
    """The gradient is right, and all weights before: what is left is the rule's state, and what it was given."""
    before = weights_before(case, step, reference)[name]
    if torch.equal(found[off], before.flatten()[off]):
        return "It is what it was before the step: it was not updated."
    moved, due = found - before.flatten(), reference.phases[step]["update"][name].flatten() - before.flatten()
    factor = float((moved * due)[off].sum() / due[off].square().sum())
    if _alike(moved[off], factor * due[off]):
        words = "before each step the trainer writes the rate into the groups that it gave you, not into copies"
        return f"It moved {factor:.3g} times as far as it should: by another learning rate? ({words.capitalize()}.)"
    shapes = {n: tuple(w.shape) for n, w in reference.weights.items()}
    group = next(g for g in parameter_groups(shapes, case.config().optimizer) if name in g.parameters)
    gradient = reference.phases[step]["clip"][name]
    if step:
        fresh = updated(group.rule, group.options, before, gradient, new_state(group.rule, before)).flatten()
        if _alike(found[off] - before.flatten()[off], fresh[off] - before.flatten()[off]):
            return "It is what the rule makes of it with a state of zeros: the state of the step before was not kept."
        if not group.rule.whole_matrix:
            return "Its gradient is right and so was the update before: the rule's state is not what that one left."
    if group.rule.whole_matrix:
        return (
            "Its gradient is right: does transform() get the whole matrix, after accumulate() with the momentum of the "
            "same elements? Of a part it makes something else."
        )
    return (
        "Its gradient is right: is it that of the same elements that the rule gets, with the options of its own group?"
    )


def updated(rule: Any, options: dict[str, Any], weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The weight after one step of a rule; nothing is changed."""
    weight, gradient = weight.clone(), gradient.clone()
    if not rule.whole_matrix:
        rule.step([weight], [gradient], [state], options)
        return weight
    rule.accumulate([gradient], [state], options)
    rule.apply(weight, rule.transform(gradient[None], options)[0], options)
    return weight
