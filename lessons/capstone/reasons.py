"""From what a strategy computed to the mistake that gives just that: the usual ones are computed and compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lessons.capstone.watched import Note, Watched, extent
from shardrun.certify.equivalence import LOSS_TOLERANCE, Case, Trace, parting
from speedrun.data import open_data
from speedrun.model import GPT
from speedrun.optim.schedule import forward_options
from speedrun.stages import resolve_stages

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
            found.append(Note(step, "norm", f"{words} {_why_norm(norm, right, strategy.shares[step], ranks)}"))
            break
    if parted := parting(trace, reference):
        step, phase, name = parted.step, parted.phase, parted.name
        here, there = trace.phases[step][phase][name].cpu().flatten(), reference.phases[step][phase][name].flatten()
        off = ~((here - there).abs() <= 1e-4 * there.abs().max() + 1e-7)
        off = off if off.any() else torch.ones_like(off)
        words = f"{name} is wrong ({parted.parted} of {parted.parameters} parameters are), {extent(off)}."
        if phase == "reduce":
            why = _why_gradient(case, ranks, step, name, here, off, reference)
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
        return "It is zero: was it cleared, or let go, before it was read?"
    own = [sum(rank) / count for rank in each]
    candidates: list[tuple[str, Tensor]] = [
        (f"It is {ranks} times too large: summed over the ranks, and not divided by their number.", right * ranks),
        (f"It is a {ranks}th of what it should be: divided by the number of ranks once too often.", right / ranks),
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
            words = "It was sent at the first micro-batch; the later ones were only added up at home, after that."
            candidates.append((words, first + sum(mine[1:]) / count))
            candidates.append((words, (first * ranks + sum(mine[1:]) / count) / ranks))
        words = "In each micro-batch what had been reduced before was reduced again, as if it were new."
        candidates.append((words, _reduced_again(each, ranks, count)))
    if step:
        before = reference.phases[step - 1]["clip"][name].flatten()[off]
        candidates.append(("The gradient of the step before is still in it: clear() forgets it.", right + before))
        older = local_passes(case, ranks, step, weights_before(case, step - 1, reference))[0]
        stale = sum(micro[name].flatten()[off] for rank in older for micro in rank) / (ranks * count)
        assert isinstance(stale, Tensor)
        candidates.append(("It was computed with the weights from before the last update: those are stale.", stale))
    return _first(found, candidates)


def _reduced_again(each: list[list[Tensor]], ranks: int, count: int) -> Tensor:
    """Sums over the ranks of all that has been added up, in every micro-batch, divided at the end."""
    total = torch.zeros_like(each[0][0])
    for i in range(count):
        total = ranks * total + sum(rank[i] for rank in each) / count
    return total / ranks


def _why_loss(case: Case, step: int, loss: float, reference: Trace) -> str:
    if not step:
        return "The forward pass computes with other weights."
    for back in range(1, step + 1):
        older = sum(local_passes(case, 1, step, weights_before(case, step - back, reference))[1])
        if abs(loss - older) <= LOSS_TOLERANCE * abs(older):
            ago = "the last update" if back == 1 else f"the last {back} updates"
            return f"It is the loss with the weights from before {ago}: the forward pass computes with stale ones."
    return "The forward pass computes with other weights than were updated: some are stale, or were let go too early."


def _why_norm(found: float, right: float, shares: list[float], ranks: int) -> str:
    squares = sum(share**2 for share in shares)
    candidates = {
        "That is the square of it: the root is missing.": right**2,
        "Norms of parts do not add up: add their squares, over all ranks, and take the root.": sum(shares),
        f"Every rank has all of the gradient, and it was counted {ranks} times.": right * ranks**0.5,
    }
    if squares < 1.0001 * right**2:  # parts of one whole
        candidates |= {
            f"That is of rank {rank}'s part alone: add the squares of all ranks.": share
            for rank, share in enumerate(shares)
        }
    return next((words for words, value in candidates.items() if abs(found - value) <= 1e-4 * abs(value)), "")


def _why_weight(step: int, name: str, found: Tensor, off: Tensor, reference: Trace, case: Case) -> str:
    before = weights_before(case, step, reference)[name].flatten()
    if torch.equal(found[off], before[off]):
        return "It is what it was before the step: it was not updated."
    return ""
