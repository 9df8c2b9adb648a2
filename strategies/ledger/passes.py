"""Predicted memory while a step's passes run, beside activations: after the last forward pass, and at the peak.

predict.py has the moments between steps and before the update, where only what lasts is there. During the passes
engines hold more: gathered parameters, gradients of the micro-batches so far, buckets. Plain Python, no torch.
"""

import math

from strategies.layout import flat_partition_size
from strategies.ledger.predict import (
    BF16,
    FP32,
    Held,
    Run,
    accumulates_float32,
    most_gathered,
    predict_buffers,
    predict_memory,
    reduce_bucket,
    zero_setting,
)


def predict_after_forward(run: Run) -> list[Held]:
    """For every rank: category → bytes held after the forward pass of a step's last micro-batch, without activations.

    That is what is held between steps, and: with accumulation, the gradients of the micro-batches before; and
    parameters that are gathered and stay so for the backward pass, counted as parameters. ZeRO-3 keeps all of them up
    to stage3_max_live_parameters; above that it depends on the order of modules, and this is an upper bound.
    """
    ranks = predict_memory(run)
    return [
        {
            **moments["after step"],
            **_gradients(run, moments, rank),
            **_gathered(run, moments["after step"]["parameters"]),
        }
        for rank, moments in enumerate(ranks)
    ]


def predict_peak(run: Run, kept: int, loss: int, passing: int, forward: int = 0) -> list[Held]:
    """For every rank: category → bytes at the peak of the passes, activations and what passes ("other") among them.

    kept: activations after the forward pass; loss: those of them that belong to the logits and the loss; passing: what
    the backward pass of the loss allocates for itself; forward: what the forward pass holds at its own peak beside what
    it keeps. All in bytes.

    The largest of three: at the end of the forward pass, where a fused loss has its own logits; in the backward pass of
    the loss, where all activations are there and no new gradient yet: both are exact; and after it, where gradients
    come and activations go: an estimate, which adds up what is there at one moment or another and leaves out what a
    block's backward pass allocates for itself. strategies/ledger/simulate.py runs the engine itself and gives the exact
    moment.

    ZeRO-2 has a fourth, at the end, where the activations are gone: what is sent is a copy of the bucket, its slices
    end to end (`allreduce_bucket` in stage_1_and_2.py). Exact where the bucket holds the whole model.
    """
    extra = sum(predict_buffers(run).values())
    copied = run.strategy == "zero2" and run.world_size > 1 and zero_setting(run, "reduce_scatter")
    copied = copied and not accumulates_float32(run)  # which has it add slices to a partition of its own
    in_bucket = copied and reduce_bucket(run) >= run.parameters  # all new gradients, to the end
    peaks = []
    for moments, between in zip(predict_memory(run), predict_after_forward(run), strict=True):
        resting = moments["after step"]["parameters"]
        gathered = between["parameters"] - resting + _prefetched(run)
        at_loss = {**between, "parameters": resting, "activations": kept, "other": passing}
        at_loss["communication buffers"] += gathered
        at_forward = {**at_loss, "other": forward}
        if run.world_size == 1:  # else FSDP2 still has the last all-gather's output, as large as what it gathers next
            at_forward["communication buffers"] -= _prefetched(run)
        later = {**moments["after backward"], "activations": kept - loss, "other": 0}
        later["communication buffers"] += extra
        later["gradients"] = between["gradients"] if in_bucket else max(later["gradients"], between["gradients"])
        candidates = [at_loss, at_forward, later]
        if copied:
            copy = (BF16 if run.precision == "bf16" else FP32) * reduce_bucket(run)
            buffers = {"communication buffers": between["communication buffers"] + extra + copy}
            candidates.append({**between, **buffers, "activations": 0, "other": 0})
        peaks.append(max(candidates, key=lambda held: sum(held.values())))
    return peaks


def _gradients(run: Run, moments: dict[str, Held], rank: int) -> Held:
    """Gradients, and the buckets that stay with them, of the micro-batches before the last."""
    if run.accumulation == 1:
        return {}
    width = BF16 if run.precision == "bf16" else FP32
    if run.strategy == "single":
        return {"gradients": moments["after backward"]["gradients"]}
    if run.strategy == "ddp":
        # Twice: under no_sync autograd makes gradients of its own, and they are copied into the buckets, which have
        # been there all the time, only when the last micro-batch's are reduced.
        return {"gradients": moments["after backward"]["gradients"] + moments["after step"]["gradients"]}
    if run.strategy == "fsdp":  # whole and without padding: the reduce-scatter is held back
        return {"gradients": FP32 * run.parameters}
    if run.strategy in ("zero1", "zero2") and accumulates_float32(run):
        return {"gradients": moments["after backward"]["gradients"]}
    if run.strategy == "zero2":  # reduced at every micro-batch; zeros for the padding come with the last
        return {"gradients": moments["after backward"]["gradients"] - width * _padding(run, rank)}
    if run.strategy == "zero1":
        # Whole too, and the bucket is let go only where the last micro-batch has been reduced.
        overlap = run.engine.get("zero_optimization", {}).get("overlap_comm") is True
        bucket = width * reduce_bucket(run) * (2 if overlap else 1)
        return {"gradients": width * run.parameters, "communication buffers": bucket}
    return {}


def _padding(run: Run, rank: int) -> int:
    """Elements of the padding in this rank's slices of ZeRO-1/2's flat buffers."""
    padding = 0
    for group in run.groups:
        numels = [run.numel(name) for name in group.parameters]
        part = flat_partition_size(numels, run.world_size)
        padding += part - min(max(sum(numels) - rank * part, 0), part)
    return padding


def _gathered(run: Run, resting: int) -> Held:
    width = BF16 if run.precision == "bf16" else FP32
    if run.strategy == "fsdp":
        reshards = run.engine.get("reshard_after_forward", True)
        kept = [name for name in run.shapes if not (reshards and name.startswith("blocks."))]
        return {"parameters": resting + width * _padded_rows(run, kept)}
    if run.strategy == "zero3" and run.world_size > 1:
        live = min(most_gathered(run), int(zero_setting(run, "stage3_max_reuse_distance")))
        return {"parameters": resting + width * live}
    return {}


def _prefetched(run: Run) -> int:
    """Bytes of the last block, which FSDP2 gathers again at the very start of the backward pass."""
    if run.strategy != "fsdp" or not run.engine.get("reshard_after_forward", True):
        return 0
    blocks = [name.split(".")[1] for name in run.shapes if name.startswith("blocks.")]
    last = [name for name in run.shapes if blocks and name.startswith(f"blocks.{blocks[-1]}.")]
    return (BF16 if run.precision == "bf16" else FP32) * _padded_rows(run, last)


def _padded_rows(run: Run, names: list[str]) -> int:
    """Elements of gathered parameters: FSDP2 pads rows to a multiple of the world size."""
    rows = {name: math.ceil(run.shapes[name][0] / run.world_size) * run.world_size for name in names}
    return sum(rows[name] * math.prod(run.shapes[name][1:]) for name in names)
