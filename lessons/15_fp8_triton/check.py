"""Checks of lesson 15."""

import inspect
import math
from importlib.util import find_spec

import torch

from lessons.beside import load_beside
from lessons.cases import generated, st
from lessons.checking import Wrong, expect, expect_number, expect_tensor
from lessons.meters import Largest
from speedrun.kernels.fp8 import quantize_reference, scale_reference
from speedrun.kernels.fp8_formats import E4M3

GUARD, UNTOUCHED = 4096, 12345.0
"""As in interpreter.py."""


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _same(a, b, tolerance=1e-5):
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item()))


def round_e4m3(theirs):
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    numbers = numbers[numbers.isfinite()].unique()
    cases = {
        "numbers between 1 and 448": torch.cat([torch.linspace(1, 448, 997), -torch.linspace(1, 448, 997)]),
        "numbers halfway between two of e4m3": (numbers[1:] + numbers[:-1]) / 2,
        "small numbers, below 2^−6": torch.linspace(-(2.0**-6), 2.0**-6, 999),
        "e4m3's own numbers": numbers,
        "numbers above 448": torch.tensor([449.0, 460.0, 480.0, 1e4, -464.0, -1e6]),
        "zero": torch.zeros(2),
        "numbers of every size, in a matrix": _random(40, 50) * torch.logspace(-6, 4, 50),
        "no numbers at all": torch.zeros(0),
        "a single number": torch.tensor(3.3),
    }
    for what, x in cases.items():
        with Largest() as memory:
            found = theirs(x)
        expect_tensor(found, x, f"With {what}: ")
        short = [dtype for dtype in memory.dtypes if dtype.itemsize == 1 and dtype.is_floating_point]
        expect(
            not short, f"That is torch's {short and short[0]}. Round by yourself: find the spacing, and count in it."
        )
        right = x.clamp(-448, 448).to(E4M3).float()
        if torch.equal(found, right):
            continue
        found, x, right = found.flatten(), x.flatten(), right.flatten()
        wrong = (found != right).nonzero()
        at = int(wrong[len(wrong) // 2, 0])
        here = f"Among {what}, {x[at]:.6g} becomes {found[at]:.6g}; "
        step = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 1).clamp(min=-6) - 3)
        if not found.isfinite().all():
            raise Wrong(here + "nothing should be infinite or NaN. (Is the spacing 0 where x is 0?)")
        if found.abs().max() > 448:
            raise Wrong(here + "e4m3 ends at 448: clamp.")
        if torch.equal(found, torch.trunc(x / step) * step) or torch.equal(found, torch.floor(x / step) * step):
            raise Wrong(here + "that is cut off, not rounded to the nearest.")
        if torch.equal(found, torch.floor(x / step + 0.5) * step):
            raise Wrong(here + "halves go to the even multiple, half of them down: torch.round does that.")
        fine = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 4)
        if torch.equal(found, (torch.round(x / fine) * fine).clamp(-448, 448)):
            raise Wrong(here + "below 2^−6 the spacing stays 2^−9: subnormal numbers. Yours grows finer for ever.")
        if torch.equal(found, torch.where(x.abs() < 2.0**-6, 0.0, right)):
            raise Wrong(here + "subnormal numbers are missing: e4m3 goes on below 2^−6, in steps of 2^−9.")
        coarse = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 1).clamp(min=-14) - 2)
        if torch.equal(found, torch.round(x / coarse) * coarse):
            raise Wrong(here + "that is e5m2: two bits of fraction. e4m3 has three, so the spacing is 2^(e − 3).")
        raise Wrong(here + f"it should be {right[at]:.6g}.")


def delayed_scales(theirs):
    largest = [1.0, 1.7, 2.3, 6.1, 2.9, 3.7]
    for headroom, bootstrap in ((1.8, 1), (1.12, 3), (1.5, 0), (1.5, 9)):
        found = theirs(largest, headroom, bootstrap)
        expect(isinstance(found, list), f"Your function returned {found!r}; a list of numbers is asked for.")
        expect(len(found) == len(largest), f"Your list has {len(found)} scales for {len(largest)} passes.")
        for i, now in enumerate(largest):
            before = largest[i - 1] if i else now
            current = i < max(bootstrap, 1)
            right = (now if current else before * headroom) / 448
            where = f"pass {i} (headroom {headroom}, bootstrap {bootstrap}, magnitudes {largest})"
            expect_number(
                found[i],
                right,
                where,
                {
                    "Pass 0 has no pass before it (largest[-1] is the last one's): it uses the current scale.": (
                        largest[-1] * headroom / 448 if i == 0 else -1
                    ),
                    "That is the largest magnitude of all passes so far; only that of the pass before counts.": (
                        max(largest[:i]) * headroom / 448 if i else -1
                    ),
                    "That is the current scale: the tensor's own magnitude is not known yet, only that of the pass "
                    "before.": now / 448,
                    "The headroom is missing: a tensor that has grown since would saturate.": before / 448,
                    "The current scale needs no headroom: it knows the magnitude.": now * headroom / 448,
                    "This pass still bootstraps: its own magnitude counts.": before * headroom / 448,
                    "That is the inverse: the tensor is divided by the scale.": 448 / right / 448,
                    "Dividing by the headroom makes it worse: what has grown saturates sooner.": before
                    / headroom
                    / 448,
                },
            )
    generated(
        lambda largest, headroom, bootstrap: _delayed(theirs, largest, headroom, bootstrap),
        largest=st.lists(st.sampled_from([0.5, 1.0, 2.5, 7.0, 300.0, 1e-6]), max_size=6),
        headroom=st.sampled_from([1.0, 1.1, 2.0]), bootstrap=st.integers(0, 7),
    )  # fmt: skip


def _delayed(theirs, largest, headroom, bootstrap):
    right = [now / 448 for now in largest[: max(1, bootstrap)]]
    right += [before * headroom / 448 for before in largest[max(1, bootstrap) - 1 : -1]][: len(largest) - len(right)]
    found = theirs(largest, headroom, bootstrap)
    expect(
        isinstance(found, list) and len(found) == len(right) and all(map(math.isclose, found, right)),
        f"For magnitudes {largest}, headroom {headroom}, bootstrap {bootstrap} you say {found}; it is {right}.",
    )


def fp8_linear(theirs):
    small = 1e-5 * _random(8, 32, seed=1)
    uneven = torch.logspace(-2, 2, 8)[:, None]
    for name, x, weight in (
        ("x around 1, weights around 0.001", _random(24, 64), 0.001 * _random(16, 64, seed=1)),
        ("x around 5000, weights around 1", 5000 * _random(8, 32), _random(8, 32, seed=1)),
        ("rows of x of very different size", uneven * _random(8, 32), _random(8, 32, seed=1)),
        ("rows of the weight of very different size", _random(8, 32), uneven * _random(8, 32, seed=1)),
        ("x around 1, weights around 0.00001", _random(8, 32), small),
        ("x around 10⁻⁹", 1e-9 * _random(8, 32), _random(8, 32, seed=1)),
        ("x all zeros", torch.zeros(4, 32), _random(8, 32, seed=1)),
        ("weights all zeros, as a projection begins", _random(4, 32), torch.zeros(8, 32)),
        ("both all zeros", torch.zeros(4, 32), torch.zeros(8, 32)),
    ):
        _linear(theirs, name, x, weight)
    _whole_numbers(theirs)
    generated(
        lambda rows, inputs, outputs: _linear(
            theirs, f"x of {rows} × {inputs} and weights of {outputs} × {inputs}, stored by columns",
            _random(inputs, rows).T, _random(inputs, outputs, seed=1).T,
        ),
        most=20, rows=st.integers(1, 9), inputs=st.integers(1, 9), outputs=st.integers(1, 9),
    )  # fmt: skip


def _whole_numbers(theirs):
    """Numbers of e4m3 with 448 among them: both scales are one, nothing is rounded, nothing may be off."""
    smallest = 2.0**-9
    x = torch.tensor([[448.0, 3 * smallest, 0.5], [-448.0, smallest, -12.0]])
    weight = torch.tensor([[0.0, 448.0, 0.25], [0.0, -2.0, 5 * smallest], [0.0, 1.0, 1.0], [0.0, 0.0, -16.0]])
    off = (theirs(x, weight) - x @ weight.T).abs().max().item()
    expect(off == 0, f"With e4m3's own numbers, of 448 at most, your result is {off:.3g} off: it should be exact. Does "
           "the largest magnitude become 448, and nothing else?")  # fmt: skip


def _scale(x, rows=False):
    largest = x.abs().amax(-1, keepdim=True) if rows else x.abs().amax()
    return scale_reference(largest, E4M3)


def _linear(theirs, name, x, weight):
    found = theirs(x, weight)
    expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
    shape = (x.shape[0], weight.shape[0])
    expect(found.shape == shape, f"Your result is {tuple(found.shape)} in place of {shape} ({name}).")
    expect_tensor(found, x.new_empty(shape), f"With {name}: ")
    exact = x @ weight.T
    x_scale, w_scale = _scale(x), _scale(weight)
    x8, w8 = (quantize_reference(t, s, E4M3).float() for t, s in ((x, x_scale), (weight, w_scale)))
    right = x8 @ w8.T * x_scale * w_scale
    if not found.isfinite().all():
        raise Wrong(f"With {name} there are NaN in your result: what is above 448 becomes NaN, and 0 / 0 does too.")
    if _same(found, right, 1e-3):
        return
    if _same(found, exact):
        raise Wrong(f"With {name} your result is that of float32: nothing has been rounded to 8 bits.")

    def product(x_scale, w_scale):
        return (quantize_reference(x, x_scale, E4M3).float() @ quantize_reference(weight, w_scale, E4M3).float().T) * (
            x_scale * w_scale.T if w_scale.dim() else x_scale * w_scale
        )

    mistakes = {
        "The scales have not come back: multiply the product by both.": x8 @ w8.T,
        "Only the weight's scale has come back; multiply by that of x too.": x8 @ w8.T * w_scale,
        "Only the scale of x has come back; multiply by the weight's too.": x8 @ w8.T * x_scale,
        "Nothing has been scaled: small weights fall below e4m3's smallest number, 2^−9, and become 0.": (
            x.clamp(-448, 448).to(E4M3).float() @ weight.clamp(-448, 448).to(E4M3).float().T
        ),
        "You divide by the scales after the product; q ≈ x / scale, so it has to be multiplied.": x8
        @ w8.T
        / (x_scale * w_scale),
        "You have a scale for every row of x; one scale a tensor is asked for, of its largest magnitude.": product(
            _scale(x, rows=True), w_scale
        ),
        "You have a scale for every row of the weight; one scale a tensor is asked for, of its largest magnitude.": (
            product(x_scale, _scale(weight, rows=True))
        ),
        "You have a scale for every row, of both; one scale a tensor is asked for, of its largest magnitude.": product(
            _scale(x, rows=True), _scale(weight, rows=True)
        ),
        "The product itself is rounded to 8 bits: multiply the quantised matrices in float32 (.float()).": (
            (x8 @ w8.T).clamp(-448, 448).to(E4M3).float() * x_scale * w_scale
        ),
    }
    for message, value in mistakes.items():
        expect(not _same(found, value, 1e-3) or _same(value, right, 1e-3), f"With {name}: {message}")
    error = ((found - exact).norm() / exact.norm()).item()
    due = ((right - exact).norm() / exact.norm()).item()
    if error > 0.5:
        raise Wrong(
            f"With {name} your result is {error:.0%} from that of float32; with one current scale a tensor it is "
            f"{due:.1%}. Is the product in float32, and does each tensor's largest magnitude become 448, however small?"
        )
    raise Wrong(
        f"With {name} your result is another than that of one current scale a tensor (it is {error:.2%} from "
        f"float32's, that one {due:.2%}): each tensor's largest magnitude has to become 448, and the product "
        "is in float32."
    )


def product_bytes(theirs):
    for rows, columns, depth, high, wide, element in ((4096, 8192, 1024, 64, 256, 1), (512, 1024, 768, 64, 32, 2)):
        tiles = (rows // high) * (columns // wide)
        result = 2 * rows * columns
        right = tiles * (high + wide) * depth * element + result
        expect_number(
            theirs(rows, columns, depth, high, wide, element),
            right,
            f"{rows} × {columns} × {depth} in tiles of {high} × {wide} with {element} byte(s) an element, in bytes",
            {
                "That is every operand once. A program knows nothing of the others: each reads its own rows again.": (
                    (rows + columns) * depth * element + result
                ),
                "That is without tiles: a row and a column for every number of the result.": (
                    rows * columns * 2 * depth * element + result
                ),
                "The result is missing: it has to be written.": right - result,
                "The result is in bfloat16, 2 bytes each.": right - result + rows * columns * element,
                "The result is in bfloat16, not in float32.": right + result,
                "The operands' bytes per element are missing.": tiles * (high + wide) * depth + result,
                "A program reads tile_rows rows of A and tile_columns rows of B: their sum, not their product.": (
                    tiles * high * wide * depth * element + result
                ),
                "Only A has been counted.": tiles * high * depth * element + result,
                "Only B has been counted.": tiles * wide * depth * element + result,
                "Rows and columns are exchanged: A's rows are read once per tile across, columns / tile_columns.": (
                    (rows // high * rows + columns // wide * columns) * depth * element + result
                ),
            },
        )
    sizes = st.integers(1, 8)
    generated(
        lambda across, down, depth, high, wide, element: expect_number(
            theirs(down * high, across * wide, depth, high, wide, element),
            element * depth * (down * high * across + across * wide * down) + 2 * down * high * across * wide,
            f"{down * high} × {across * wide} × {depth} in tiles of {high} × {wide}, {element} bytes an element",
        ),
        across=sizes, down=sizes, depth=st.integers(1, 999), high=sizes, wide=sizes, element=st.sampled_from([1, 2, 4]),
    )  # fmt: skip


def product_kernel(theirs):
    if find_spec("triton") is None:
        raise Wrong(
            "Triton is not installed here, so this kernel cannot be run (on Linux: pip install 'shardrun[kernels]'). "
            "The other exercises need none."
        )
    shapes = ((32, 32, 32), (40, 50, 150), (16, 70, 20), (33, 1, 31))
    cases = []
    for around in (0.0, math.nan):
        for rows, columns, depth in shapes:
            a, b = _random(rows, depth).to(E4M3), _random(columns, depth, seed=1).to(E4M3)
            cases.append({"a": a, "b": b, "scale": 0.25, "block": 32, "around": around})
        a, b = _random(70, 33).to(E4M3), _random(66, 33, seed=1).to(E4M3)
        cases.append({"a": a, "b": b, "scale": -3.0, "block": 64, "around": around})
    found = _interpreted(theirs, cases)
    for i, case in enumerate(cases[: len(shapes) + 1]):
        buffers, outside, undefined = zip(*found[i :: len(shapes) + 1], strict=True)
        _compare(case, *buffers, read_beyond=max(outside), undefined=any(undefined))


def _interpreted(kernel, cases):
    """Run the learner's kernel by interpreter.py, which lies beside this file; returns the buffers of the results."""
    interpreter = load_beside(__file__, "interpreter")
    found = []
    for case in cases:
        try:
            found.append(interpreter.launch(inspect.unwrap(kernel), **case))
        except interpreter.TooFar as error:
            raise Wrong(f"{_what(case)}{error}. tl.load and tl.store need masks.") from None
    return found


def _what(case):
    (rows, depth), columns = case["a"].shape, case["b"].shape[0]
    return f"A is {rows} × {depth}, B {columns} × {depth}, BLOCK {case['block']}: "


def _compare(case, buffer, *others, read_beyond, undefined):
    """A kernel's result in its buffer, and the same with other numbers around the operands in memory.

    read_beyond: the operand that has been read beyond its end, "" for none; undefined: a load has no `other`.
    """
    a, b, scale, block = case["a"].float(), case["b"].float(), case["scale"], case["block"]
    (rows, depth), columns = a.shape, b.shape[0]
    what = _what(case)
    found, right = buffer[GUARD:-GUARD].view(rows, columns), a @ b.T * scale
    outside = torch.cat([buffer[:GUARD], buffer[GUARD + rows * columns :]])
    expect(bool((outside == UNTOUCHED).all()), what + "you write beyond the result; tl.store needs a mask.")
    expect(
        not undefined or bool(found.isfinite().all()),
        what + "a tl.load has a mask but no other: what stands in the place of the numbers that it leaves out is "
        "undefined, and comes into the sum (here as nan). Give it other=0.0.",
    )
    if not all(torch.equal(buffer, other) for other in others):
        raise Wrong(
            what
            + "the result depends on what lies behind A or B in memory: you read beyond them. tl.load needs a mask, "
            "also where the last piece of the sum is shorter than BLOCK, and other=0.0."
        )
    if _same(found, right):
        expect(
            not read_beyond,
            f"{what}the numbers are right, but you read beyond {read_beyond}: on a GPU that is an illegal access, "
            "or a nan that lies there comes into the sum. tl.load needs a mask for the rows and for the depth.",
        )
        return
    if missing := int((found == UNTOUCHED).sum()):
        raise Wrong(what + f"{missing} numbers of the result were never written.")
    if _same(found, right / scale):
        raise Wrong(what + "the scale is missing.")
    if depth > block and _same(found, a[:, :block] @ b[:, :block].T * scale):
        raise Wrong(what + f"only the first {block} terms of the sum are there: loop over depth.")
    pieces = math.ceil(depth / block)
    if depth > block and _same(found, a[:, (pieces - 1) * block :] @ b[:, (pieces - 1) * block :].T * scale):
        raise Wrong(what + "only the last terms of the sum are there: give tl.dot the total to add to.")
    first_rows = slice(0, min(rows, block))
    if _same(found[first_rows], right[first_rows]):
        raise Wrong(what + f"the first {block} rows are right, others are not: are both program_ids in use?")
    if not found.any():
        raise Wrong(what + "the result is all zeros.")
    raise Wrong(what + f"your result is {(found - right).norm() / right.norm():.0%} away from A · Bᵀ · scale.")
