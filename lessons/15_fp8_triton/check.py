"""Checks of lesson 15."""

import inspect
import math
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from lessons.checking import Wrong, expect, expect_number
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
    }
    for what, x in cases.items():
        found = theirs(x.clone())
        expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
        expect(found.dtype == torch.float32, f"Your result is in {found.dtype}; float32 is asked for.")
        right = x.clamp(-448, 448).to(E4M3).float()
        wrong = (found != right).nonzero()
        if not len(wrong):
            continue
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
    largest = [1.0, 1.5, 2.0, 6.0, 3.0, 3.5]
    for headroom, bootstrap in ((1.8, 1), (1.12, 3), (1.5, 0)):
        found = theirs(list(largest), headroom, bootstrap)
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


def fp8_linear(theirs):
    for name, x, weight in (
        ("x around 1, weights around 0.001", _random(24, 64), 0.001 * _random(16, 64, seed=1)),
        ("x around 5000, weights around 1", 5000 * _random(8, 32), _random(8, 32, seed=1)),
        ("x all zeros", torch.zeros(4, 32), _random(8, 32, seed=1)),
    ):
        found = theirs(x.clone(), weight.clone())
        expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
        shape = (x.shape[0], weight.shape[0])
        expect(found.shape == shape, f"Your result is {tuple(found.shape)} in place of {shape} ({name}).")
        exact = x @ weight.T
        x_scale, w_scale = (scale_reference(t.abs().amax(), E4M3) for t in (x, weight))
        x8, w8 = (quantize_reference(t, s, E4M3).float() for t, s in ((x, x_scale), (weight, w_scale)))
        right = x8 @ w8.T * x_scale * w_scale
        if not found.isfinite().all():
            raise Wrong(f"With {name} there are NaN in your result: what is above 448 becomes NaN, and 0 / 0 does too.")
        if _same(found.float(), right, 1e-3):
            continue
        if _same(found.float(), exact):
            raise Wrong(f"With {name} your result is that of float32: nothing has been rounded to 8 bits.")
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
        }
        for message, value in mistakes.items():
            expect(not _same(found.float(), value), f"With {name}: {message}")
        error = ((found - exact).norm() / exact.norm()).item()
        raise Wrong(f"With {name} your result is {error:.1%} from that of float32; FP8 should be about 4 % from it.")


def product_bytes(theirs):
    for rows, columns, depth, high, wide, element in ((4096, 8192, 1024, 128, 256, 1), (512, 512, 768, 64, 32, 2)):
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
            },
        )


def product_kernel(theirs):
    if find_spec("triton") is None:
        raise Wrong(
            "Triton is not installed here, so this kernel cannot be run (on Linux: pip install 'shardrun[kernels]'). "
            "The other exercises need none."
        )
    shapes = ((32, 32, 32), (40, 50, 70), (16, 70, 20))
    cases = []
    for around in (0.0, 448.0):
        for rows, columns, depth in shapes:
            a, b = _random(rows, depth).to(E4M3), _random(columns, depth, seed=1).to(E4M3)
            cases.append({"a": a, "b": b, "scale": 0.25, "block": 32, "around": around})
    found = _interpreted(theirs, cases)
    for i, case in enumerate(cases[: len(shapes)]):
        _compare(case, found[i], found[i + len(shapes)])


def _interpreted(kernel, cases):
    """Run the learner's kernel by interpreter.py; returns the buffers of the results."""
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "cases.pt", Path(folder) / "results.pt"
        torch.save(cases, given)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("interpreter.py")), inspect.getfile(inspect.unwrap(kernel)),
             kernel.__name__, str(given), str(results)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True, text=True,
        )  # fmt: skip
        if not results.exists():
            end = (done.stderr.strip() or "it ended without a word").splitlines()[-1]
            raise Wrong(
                f"The interpreter's process ended in the middle of your kernel (status {done.returncode}): {end}"
            )
        found = torch.load(results)
    if found == "unsolved":
        raise NotImplementedError
    if isinstance(found, str):
        raise Wrong(found)
    return found


def _compare(case, buffer, with_other_surroundings):
    """A kernel's result in its buffer, and the same with other numbers around the operands in memory."""
    a, b, scale, block = case["a"].float(), case["b"].float(), case["scale"], case["block"]
    (rows, depth), columns = a.shape, b.shape[0]
    what = f"A is {rows} × {depth}, B {columns} × {depth}, BLOCK {block}: "
    found, right = buffer[GUARD:-GUARD].view(rows, columns), a @ b.T * scale
    outside = torch.cat([buffer[:GUARD], buffer[GUARD + rows * columns :]])
    expect(bool((outside == UNTOUCHED).all()), what + "you write beyond the result; tl.store needs a mask.")
    if not torch.equal(buffer, with_other_surroundings):
        raise Wrong(
            what
            + "the result depends on what lies behind A or B in memory: you read beyond them. tl.load needs a mask, "
            "also where the last piece of the sum is shorter than BLOCK, and other=0.0."
        )
    if _same(found, right):
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
