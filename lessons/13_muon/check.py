"""Checks of lesson 13."""

import numpy as np
import torch
import torch.distributed as dist

from lessons.cases import generated, st
from lessons.checking import Wrong, expect, expect_number, expect_numbers, expect_tensor
from lessons.meters import Counted, Largest, on_all_wires
from lessons.worlds import on_two_ranks
from strategies.ledger.wire import Meter

QUINTIC = (3.4445, -4.7750, 2.0315)


def _matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _svd(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _iterated(matrix, steps, norm=None):
    a, b, c = QUINTIC
    x = matrix / (matrix.norm() if norm is None else norm)
    for _ in range(steps):
        product = x @ x.T
        x = a * x + (b * product + c * product @ product) @ x
    return x


def _same(a, b, tolerance=2e-3):
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance))


def _tensor(found, like):
    expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
    if found.shape != like.shape and found.shape == like.T.shape:
        raise Wrong(f"Your result is transposed: {tuple(found.shape)} for a matrix of {tuple(like.shape)}.")
    expect(found.shape == like.shape, f"Your result is {tuple(found.shape)} for a matrix of {tuple(like.shape)}.")
    expect_tensor(found, like)


def orthogonal(theirs):
    for rows, columns, size in ((6, 6, 1.0), (8, 3, 1.0), (3, 8, 1.0), (5, 4, 1e-4), (4, 5, 1e-6), (4, 4, 1e4)):
        matrix = size * _matrix(rows, columns)
        try:
            found = theirs(matrix)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise Wrong(
                f"With a matrix of {rows} × {columns}: {error}. full_matrices=False makes U and Vᵀ fit together."
            ) from error
        _tensor(found, matrix)
        if _same(found, _svd(matrix), 1e-4):
            continue
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        if rows == columns and _same(found, u @ vh.T):
            raise Wrong("That is U·V. torch.linalg.svd returns Vᵀ, already transposed: do not transpose it again.")
        if _same(found, matrix):
            raise Wrong("That is the gradient itself, put together again: the singular values S have to go.")
        values = torch.linalg.svdvals(found)
        if size < 1 and not _same(values, torch.ones_like(values)):
            raise Wrong(
                f"With a gradient of about {size:g} your singular values go from {values.min():.2f} to "
                f"{values.max():.2f}; all have to be one, however small the gradient is. Leave S out."
            )
        if _same(found / found.norm(), matrix / matrix.norm()):
            raise Wrong(
                f"That is the gradient, scaled. Its singular values still differ, {values.min():.2f} to "
                f"{values.max():.2f}; all have to be one."
            )
        raise Wrong(
            f"With {rows} × {columns}: your singular values go from {values.min():.2f} to {values.max():.2f}, and the "
            f"result is {(found - _svd(matrix)).norm() / _svd(matrix).norm():.0%} away from U·Vᵀ."
        )
    generated(
        lambda rows, columns, seed: _orthogonal(theirs, rows, columns, seed), most=30,
        rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99),
    )  # fmt: skip


def _orthogonal(theirs, rows, columns, seed):
    """Whose Gram matrix is the identity, and whose product with the gradient is symmetric: no SVD."""
    matrix = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed)).T  # in memory by columns
    found = theirs(matrix)
    _tensor(found, matrix)
    gram = found @ found.T if rows <= columns else found.T @ found
    product = found @ matrix.T if rows <= columns else found.T @ matrix
    right = _same(gram, torch.eye(len(gram)), 1e-4) and _same(product, product.T, 5e-4)
    expect(right, f"With {rows} × {columns} (stored by columns) your result is not the nearest orthogonal matrix.")


def newton_schulz(theirs):
    for rows, columns, size in ((6, 10, 30.0), (10, 6, 30.0), (6, 10, 1e-2), (10, 6, 1e-5)):
        matrix = size * _matrix(rows, columns)
        for steps in (1, 3, 5):
            with Largest() as memory:
                found = theirs(matrix, steps)
            _tensor(found, matrix)
            right = _iterated(matrix, steps)
            if _same(found, right, 2e-3 if size < 1e-3 else 1e-5 * 8**steps):
                _on_the_smaller_side(memory, rows, columns)
                continue
            if size < 1:
                raise Wrong(
                    f"With a gradient of about {size:g} your result is {(found - right).norm() / right.norm():.1%} "
                    "away: what is added to the norm is not small beside it. Divide by the norm itself."
                )
            if _same(found, right, 0.1) and _same(found, _iterated(matrix.bfloat16(), steps).float(), 3e-2):
                raise Wrong(
                    f"After {steps} steps your result is {(found - right).norm() / right.norm():.1%} away: something "
                    "is computed in fewer bits (bfloat16?). All in float32."
                )
            if not found.isfinite().all() or found.abs().max() > 100:
                raise Wrong(
                    "It explodes: the polynomial is made for singular values of at most one. Divide by the Frobenius "
                    "norm first."
                )
            if _same(found, _iterated(matrix, steps, torch.linalg.matrix_norm(matrix, 2))):
                raise Wrong(
                    "You divide by the largest singular value. That works, but it takes an SVD to know it; the "
                    "Frobenius norm is asked for."
                )
            if steps != 5 and _same(found, _iterated(matrix, 5)):
                raise Wrong(f"You always make five steps; here {steps} are asked for.")
            if _same(found, _cubic(matrix, steps)):
                raise Wrong("c belongs to A² = A·A, the fifth power of X. Yours stands with A, the third.")
            values = torch.linalg.svdvals(right)
            raise Wrong(
                f"After {steps} steps with {rows} × {columns} your result is "
                f"{(found - right).norm() / right.norm():.0%} away. Its singular values should go from "
                f"{values.min():.2f} to {values.max():.2f}; yours go from {torch.linalg.svdvals(found).min():.2f} to "
                f"{torch.linalg.svdvals(found).max():.2f}."
            )
    generated(
        lambda rows, columns, steps, size: _schulz(theirs, rows, columns, steps, size), most=30,
        rows=st.integers(1, 9), columns=st.integers(1, 9), steps=st.integers(0, 6),
        size=st.sampled_from([1.0, 1e-3, 1e3]),
    )  # fmt: skip


def _on_the_smaller_side(memory, rows, columns):
    """A tall matrix is transposed first (or multiplied on its other side)."""
    most = max(rows * columns, min(rows, columns) ** 2)
    expect(
        memory.elements <= most,
        f"Right, but for {rows} × {columns} you make a matrix of {memory.elements} elements, {rows} × {rows}: "
        "transpose a tall matrix first, so that A is the smaller of the two products (and the result back).",
    )


def _schulz(theirs, rows, columns, steps, size):
    matrix = size * _matrix(columns, rows, seed=steps).T
    found = theirs(matrix, steps)
    _tensor(found, matrix)
    right = _iterated(matrix, steps)
    off = ((found - right).norm() / right.norm()).item()
    where = f"With {rows} × {columns} (stored by columns) of about {size:g} and {steps} steps "
    expect(off < 5e-3, f"{where}your result is {off:.1%} away.")


def _cubic(matrix, steps):
    a, b, c = QUINTIC
    x = matrix / matrix.norm()
    for _ in range(steps):
        x = a * x + (b + c) * x @ x.T @ x
    return x


def uses_muon(theirs):
    cases = {
        "blocks.0.attention.q.weight": ((768, 768), True, "It is a matrix inside a block: what Muon is for."),
        "blocks.11.mlp.down.weight": ((768, 3072), True, "It is a matrix inside a block: what Muon is for."),
        "embed.weight": (
            (50304, 768),
            False,
            "An embedding's rows are looked up one by one, not multiplied with: its singular values mean nothing.",
        ),
        "head.weight": (
            (50304, 768),
            False,
            "The head makes logits: each row belongs to one token, and how long it is says how frequent the token is.",
        ),
        "blocks.0.norm.weight": ((768,), False, "A vector has no singular vectors to keep; it needs a matrix."),
        "norm.weight": ((768,), False, "It is a vector, and in no block."),
        "blocks.7.attention.gate.weight": ((12, 768), True, "It is a matrix inside a block: what Muon is for."),
        "blocks.2.mlp.up.bias": ((3072,), False, "A bias is a vector; it needs a matrix."),
        "blocks.4.scale": ((), False, "One number has no singular vectors to keep; it needs a matrix."),
        "blocks.4.experts.up": ((8, 64, 64), False, "That has three dimensions: it is no matrix."),
        "memory_blocks.weight": ((64, 64), False, 'Only what begins with "blocks." is in a block.'),
    }
    for name, (shape, right, why) in cases.items():
        _given(theirs, name, shape, right, why)
    generated(
        lambda where, tail, shape: _given(
            theirs, where + tail, tuple(shape), where.startswith("blocks.") and len(shape) == 2,
            'What begins with "blocks." and has two dimensions is a matrix inside a block, whatever its name and size.',
        ),
        where=st.sampled_from(["blocks.0.", "blocks.23.attention.", "embed.", "lookup.", "head.", "my_blocks.0."]),
        tail=st.sampled_from(["weight", "q.weight", "bias", "scale", "gate", "experts.3.up"]),
        shape=st.lists(st.sampled_from([1, 4, 768]), max_size=3),
    )  # fmt: skip


def _given(theirs, name, shape, right, why):
    found = theirs(name, shape)
    truth = isinstance(found, (bool, np.bool_))
    expect(truth, f"Your function returned {found!r} for {name}; True or False is asked for.")
    expect(found == right, f"You give {name} {shape} to {'Muon' if found else 'AdamW'}. {why}")


@torch.no_grad()
def muon_step(theirs):
    for rows, columns in ((4, 6), (9, 4)):
        _muon(theirs, rows, columns, 0.1, 0.9, steps=3)
    for rows, columns, times in ((4, 1, 1.0), (2, 3, 1.0), (2, 3, 0.0)):
        _whole_numbers(theirs, rows, columns, times)
    generated(
        lambda rows, columns, lr, mu, steps, function: _muon(theirs, rows, columns, lr, mu, steps, function), most=30,
        rows=st.integers(1, 6), columns=st.integers(1, 6), lr=st.sampled_from([0.1, 0.02]),
        mu=st.sampled_from([0.9, 0.5, 0.0]), steps=st.integers(1, 3), function=st.sampled_from([_of_norm_one, _svd]),
    )  # fmt: skip


def _whole_numbers(theirs, rows, columns, times):
    """Numbers that nothing rounds, and a function that only turns the sign: no term is too small to be seen."""
    count = torch.arange(rows * columns).view(rows, columns).float()
    weight, gradient, buffer = count - 3, times * (8 * count - 16), times * (16 - 4 * count)
    start, moved = weight.clone(), 0.5 * buffer + 0.5 * gradient
    ahead = 0.5 * gradient + 0.5 * moved
    theirs(weight, gradient, buffer, 0.25, 0.5, lambda matrix: -matrix)
    off = (buffer - moved).abs().max().item()
    where = f"With {rows} × {columns}, momentum 0.5 and {'whole numbers' if times else 'a gradient of zero'} "
    expect(off == 0, f"{where}the buffer is {off:.2g} off: μ·buffer + (1 − μ)·gradient, and nothing else.")
    right = start + 0.25 * max(1, rows // columns) ** 0.5 * ahead
    off = (weight - right).abs().max().item()
    expect(off == 0, f"{where}the weight is {off:.2g} off: is there another term, such as a weight decay?")


def _of_norm_one(matrix):
    """In the place of an orthogonal matrix: what is rounded is not made larger by it."""
    return matrix / matrix.norm()


def _muon(theirs, rows, columns, lr, mu, steps, function=_svd):
    """Weight and buffer are views of flat buffers, as under every sharded strategy."""
    gradients = [_matrix(rows, columns, seed) for seed in range(1, steps + 1)]
    weight = torch.cat([torch.zeros(3), _matrix(rows, columns).flatten()])[3:].view(rows, columns)
    buffer, start = torch.zeros(rows * columns + 2)[:-2].view(rows, columns), weight.clone()
    calls, tolerance = Counted(function), 2e-3 if function is _svd else 1e-5
    for gradient in gradients:
        theirs(weight, gradient, buffer, lr, mu, calls)
    right, momentum = _trained(start, gradients, lr, mu, function=function)
    shown = f"({rows} × {columns}, {steps} steps, momentum {mu:g})"
    expect(
        calls.calls == steps or not torch.equal(weight, start),
        f"The weight has not changed {shown}: update it in place (sub_).",
    )
    if _same(weight, right, tolerance) and _same(buffer, momentum, 1e-5):
        expect(
            calls.calls == steps,
            f"Right, but orthogonalize was called {calls.calls} times in {steps} steps; once a step is due.",
        )
        return
    expect(not torch.equal(weight, start), "The weight has not changed: update it in place (sub_).")
    if _same(weight, 2 * start - right):
        raise Wrong("The weights go up where they should go down: weight − lr · …")
    if not buffer.any():
        raise Wrong("The buffer is still zero: the momentum has to stay in it, in place (lerp_ or mul_ and add_).")
    if _same(buffer, _orthogonal_momentum(gradients, mu)) and not _same(buffer, momentum):
        raise Wrong(
            "You orthogonalise each gradient and then take the momentum of that. The momentum comes first: a sum "
            "of orthogonal matrices is not orthogonal."
        )
    if not _same(buffer, momentum, 1e-5):
        summed = torch.zeros_like(start)
        for gradient in gradients:
            summed = mu * summed + gradient
        if _same(buffer, summed):
            raise Wrong(
                f"Your buffer is μ·buffer + gradient: it grows to 1/(1 − μ) gradients. Add (1 − μ)·gradient {shown}."
            )
        raise Wrong(f"The buffer is not the running mean of the gradients: μ·buffer + (1 − μ)·gradient {shown}.")
    alone = _trained(start, gradients, lr, mu, nesterov=False, function=function)[0]
    if _same(weight, alone) and not _same(alone, right):
        raise Wrong(f"Nesterov's look-ahead is missing: you orthogonalise the buffer alone {shown}.")
    if rows > columns and _same(weight, _trained(start, gradients, lr, mu, scaled=False, function=function)[0]):
        raise Wrong(f"The factor √max(1, rows / columns) is missing: a tall matrix moves too little {shown}.")
    for message, factor in {
        "The factor is that of rows / columns: yours is turned round.": max(1, columns / rows) ** 0.5,
        "The factor is the square root of max(1, rows / columns), not that itself.": max(1, rows / columns),
    }.items():
        due = max(1, rows / columns) ** 0.5
        expect(factor == due or not _same(weight, start + factor / due * (right - start)), f"{message[:-1]} {shown}.")
    raise Wrong(f"The buffer is right; the weight is up to {(weight - right).abs().max():.2g} off {shown}.")


def _trained(start, gradients, lr, mu, nesterov=True, scaled=True, function=_svd):
    weight, buffer = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        buffer = mu * buffer + (1 - mu) * gradient
        update = function(mu * buffer + (1 - mu) * gradient if nesterov else buffer)
        weight -= lr * (max(1, start.shape[0] / start.shape[1]) ** 0.5 if scaled else 1) * update
    return weight, buffer


def _orthogonal_momentum(gradients, mu):
    buffer = torch.zeros_like(gradients[0])
    for gradient in gradients:
        buffer = mu * buffer + (1 - mu) * _svd(gradient)
    return buffer


def state_bytes(theirs):
    m, o = 84_934_656, 38_633_472  # 12 blocks of width 768; embedding of 50304 rows
    mistakes = {
        "adamw": {
            "AdamW keeps two moments for every element, in float32; that is one.": 4 * (m + o),
            "That includes master weights. In float32 the weights are their own master.": 12 * (m + o),
        },
        "muon": {
            "That is AdamW's: Muon has no second moment.": 8 * (m + o),
            "Only the matrices inside the blocks go to Muon; embeddings, head and vectors stay with AdamW.": 4
            * (m + o),
            "The parameters that stay with AdamW have moments too.": 4 * m,
            "The two are exchanged: 4 bytes for Muon's matrices, 8 for AdamW's parameters.": 8 * m + 4 * o,
        },
    }
    right = {"adamw": 8 * (m + o), "muon": 4 * m + 8 * o}
    expect_numbers(theirs(m, o), right, f"{m:,} elements of block matrices and {o:,} others, in bytes", mistakes)
    generated(
        lambda m, o: expect_numbers(
            theirs(m, o), {"adamw": (m + o) * (4 + 4), "muon": m * 4 + o * (4 + 4)},
            f"{m} elements of block matrices and {o} others, in bytes", {},
        ),
        m=st.integers(0, 10**9), o=st.integers(0, 10**9),
    )  # fmt: skip


def exchange_bytes(theirs):
    for world_size in (6, 8, 4):
        n = 144_000_000
        shard = 4 * n // world_size
        others = world_size - 1
        mistakes = {
            "all_gather": {
                "That is the whole of all matrices. A rank has its own shard already: nobody sends it that.": 4 * n,
                "That is one shard, sent once. In a ring a rank passes on the shards of all others.": shard,
                "That also sends the result. Here every rank orthogonalises everything itself: one gather is all.": 2
                * shard
                * others,
            },
            "all_to_all": {
                "That is one way. The result has to come back to those who hold the weights.": shard
                * others
                // world_size,
                "That sends the part for oneself as well: of its shards a rank owns 1 / world_size, which stay.": 2
                * shard,
                "That sends every shard to every rank; each goes to its owner alone.": 2 * shard * others,
            },
        }
        right = {"all_gather": shard * others, "all_to_all": 2 * shard * others // world_size}
        found = theirs(n, world_size)
        expect_numbers(
            found, right, f"{n:,} elements on {world_size} ranks, in bytes sent by a rank", mistakes, world_size
        )
    generated(
        lambda pieces, world_size: expect_numbers(
            theirs(pieces * world_size**2, world_size),
            {"all_gather": (world_size - 1) * pieces * world_size * 4, "all_to_all": (world_size - 1) * pieces * 4 * 2},
            f"{pieces * world_size**2} elements on {world_size} ranks, in bytes sent by a rank", {}, world_size,
        ),
        pieces=st.integers(1, 10**6), world_size=st.integers(1, 16),
    )  # fmt: skip
    expect_number(theirs(n, 1)["all_to_all"], 0, "one rank")


def sharded_update(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    _update(theirs, rank, world_size, 4, 6, _svd)
    on_two_ranks(lambda: _update(theirs, rank, 2, 3, 5, _svd))
    # rows that know of their place, so that none can be exchanged or left out
    generated(
        lambda rows, columns, by_columns: _update(theirs, rank, world_size, rows, columns, _numbered, by_columns),
        most=12, rows=st.integers(1, 4), columns=st.integers(1, 5), by_columns=st.booleans(),
    )  # fmt: skip


def _numbered(matrix):
    return matrix.cumsum(0) + torch.arange(len(matrix))[:, None]


def _update(theirs, rank, world_size, rows, columns, function, by_columns=False):
    whole = _matrix(rows * world_size, columns)
    shard = whole.chunk(world_size)[rank].clone()
    if by_columns:
        shard = shard.T.contiguous().T
    with Meter() as meter:
        found = theirs(shard, function)
    sent, most = on_all_wires(meter), (world_size - 1) * (1 + 1 / world_size) * 4 * whole.numel()
    result = function(whole)
    right = result.chunk(world_size)[rank]
    _shape(found, shard, result)
    if _same(found, right, 1e-5):
        expect(
            sent <= most,
            f"Right, but the ranks send {sent:.0f} bytes for a matrix of {4 * whole.numel()}: an all-gather does it, "
            "or to an owner and back.",
        )
        return
    if _same(found, function(shard)):
        raise Wrong(
            f"You orthogonalise the shard by itself. It has singular vectors of its own; the result is "
            f"{(found - right).norm() / right.norm():.0%} away from this rank's rows of the whole matrix's."
        )
    for other in range(world_size):
        if _same(found, result.chunk(world_size)[other]):
            raise Wrong(f"Those are rank {other}'s rows of the right matrix, not rank {rank}'s.")
    if _same(found, function(sum(whole.chunk(world_size)))):
        raise Wrong("You add the shards up. They are different rows of one matrix: put them one below the other.")
    how = ", the shard stored by columns" if by_columns else ""
    off = (found - right).norm() / right.norm()
    raise Wrong(f"With {rows} × {columns} a rank{how}, your rows are {off:.0%} away from the whole matrix's.")


def _shape(found, shard, result):
    expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
    if found.shape == result.shape:
        raise Wrong("You return the whole matrix. This rank holds, and updates, only its own rows: cut them out.")
    expect(found.shape == shard.shape, f"Your result is {tuple(found.shape)}, the shard {tuple(shard.shape)}.")
    expect_tensor(found, shard)
