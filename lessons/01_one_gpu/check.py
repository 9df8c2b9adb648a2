"""Checks of lesson 1."""

import torch
import torch.nn.functional as F
from torch import nn

from lessons.checking import GIB, Wrong, expect, expect_number, expect_numbers


def training_bytes(theirs):
    for n in (1000, 32 * 10**9):
        right = {"parameters": 4 * n, "gradients": 4 * n, "optimizer states": 8 * n}
        mistakes = {
            "parameters": {
                "That is 2 bytes per parameter, a bfloat16; here everything is float32.": 2 * n,
                "That is 8 bytes per parameter, a float64; here everything is float32.": 8 * n,
                "That includes the gradients, which have an entry of their own.": 8.0 * n,
            },
            "gradients": {
                "Gradients are there too: one for every parameter, of the same dtype.": 0,
                "That is 2 bytes per gradient, a bfloat16; here everything is float32.": 2 * n,
            },
            "optimizer states": {
                "That is one moment. AdamW keeps two: of the gradient, and of its square.": 4 * n,
                "That is a float32 master copy of the weights beside the two moments; the weights are float32 already "
                "and need none.": 12 * n,
                "AdamW does keep something: two moments for every parameter.": 0,
            },
        }
        expect_numbers(theirs(n), right, f"{n:,} parameters, in bytes", mistakes)


def gigabytes_32b(theirs):
    expect_number(
        theirs(),
        512.0,
        "a 32B model, in GB",
        {
            "That is the parameters alone; gradients and AdamW's states are there too.": 128.0,
            "That is parameters and gradients; AdamW's states are forgotten.": 256.0,
            "That is one of AdamW's moments; it keeps two.": 384.0,
            "That has a float32 master copy of the weights, which are float32 already: 20 bytes, not 16.": 640.0,
            "That is GiB (2³⁰ bytes) where GB (10⁹ bytes) are asked for.": 512e9 / GIB,
            "That is bytes; GB are asked for.": 512e9,
        },
    )


def logits_bytes(theirs):
    for rows, length, vocabulary in ((4, 1024, 50304), (3, 7, 11)):
        n = rows * length * vocabulary
        mistakes = {
            "That is the logits alone; their gradient is as large, and both are there at once.": 4 * n,
            "That is two bytes per number; the loss is computed in float32.": 2 * 2 * n,
            "That is one number for every token; there is one for every token and every word of the vocabulary.": (
                2 * 4 * rows * length
            ),
            "That leaves out the rows of the batch.": 2 * 4 * length * vocabulary,
        }
        expect_number(
            theirs(rows, length, vocabulary),
            2 * 4 * n,
            f"{rows} rows of {length:,} tokens and a vocabulary of {vocabulary:,}, in bytes",
            mistakes,
        )


def held_bytes(theirs):
    weight = torch.zeros(10, 6)
    half = torch.zeros(10, dtype=torch.bfloat16)
    expect_number(
        theirs([weight, half]),
        240 + 20,
        "a float32 tensor of 60 elements and a bfloat16 tensor of 10, in bytes",
        {
            "That takes 4 bytes for every element; a bfloat16 has 2. Ask the tensor.": 280,
            "That counts elements.": 70,
        },
    )
    head = weight.view(10, 6)  # a tied head: another tensor, the same memory
    expect_number(
        theirs([weight, head]),
        240,
        "an embedding and the head that is tied to it, in bytes",
        {"That counts the tied weight twice. Two tensors with one storage are the same memory.": 480},
    )
    expect_number(
        theirs([weight[2:4]]),
        240,
        "a view of two of an embedding's ten rows, in bytes",
        {"That is the view's own elements; but it keeps the whole storage alive.": 48},
    )
    expect_number(theirs([]), 0, "no tensors at all, in bytes")


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))


def _train(step):
    """Three steps with `step`; returns the losses and the weights."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        inputs, targets = (torch.randint(11, (2, 5), generator=generator) for _ in range(2))
        losses.append(step(model, optimizer, inputs, targets))
    return losses, [p.detach().clone() for p in model.parameters()]


def _variant(clear=True, update=True):
    """A step that may be wrong on purpose."""

    def step(model, optimizer, inputs, targets):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        if clear:
            optimizer.zero_grad()
        loss.backward()
        if update:
            optimizer.step()
        return loss.item()

    return step


def training_step(theirs):
    try:
        losses, weights = _train(theirs)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise Wrong(
            "The optimizer updates before the backward pass: it has changed weights that backward() still needs. "
            "First backward(), then step()."
        ) from error
    for loss in losses:
        expect(loss is not None, "Your function returns nothing; the loss is asked for.")
        expect(
            isinstance(loss, float),
            f"Your function returns a {type(loss).__name__}; a Python number is asked for (loss.item()). A tensor "
            "would keep the graph of its step alive, and all activations with it.",
        )

    def same(step):
        return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, _train(step)[1], strict=True))

    if not same(_variant()):
        mistakes = {
            "The gradients of the step before are still there: backward() adds to them. Clear them first, with "
            "optimizer.zero_grad().": _variant(clear=False),
            "The weights do not change. Is optimizer.step() there, after backward() and before the gradients are "
            "cleared?": _variant(update=False),
        }
        for message, step in mistakes.items():
            expect(not same(step), message)
        raise Wrong("After three steps the weights are not what they should be.")
    right = _train(_variant())[0]
    if all(abs(a - 10 * b) < 1e-3 for a, b in zip(losses, right, strict=True)):
        raise Wrong("Your loss is the sum over all 10 tokens; the mean is asked for.")
    close = all(abs(a - b) < 1e-5 for a, b in zip(losses, right, strict=True))
    expect(close, f"The weights are right, but the losses you return are {losses}, not the mean cross-entropy.")
