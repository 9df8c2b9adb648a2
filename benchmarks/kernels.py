"""The Triton kernels on this GPU, on the record's shapes, beside what they would have to beat.

    python -m benchmarks.kernels                  # a minute or two on one GPU
    python -m benchmarks.kernels --out FILE.md    # also write the table

Per kernel: its time (median of repeated runs, the L2 cache emptied in between), its rate, the share of what the GPU's
data sheet allows (`roofline`), and how many times faster it is than each rival: torch's matmul (cuBLAS),
torch._scaled_mm (cuBLASLt), or the same formula through torch.compile. Arithmetic counts as the formula has it, so that
X·Xᵀ, of which half is computed, can go beyond the roofline. Every result is compared with its rival's before it counts.

kernels.md is what one H100 said. What a run uses follows from it by way of speedrun/kernels/measured.py: whoever
measures again changes the rows there. The cross-entropy has not been measured yet, nor has FP8 since it was mended.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Triton's interpreter works on CPU tensors: only to see that this file runs."""


TOKENS, WIDTH, HIDDEN, WORDS, VOCABULARY, STACK = (
    (49_152, 768, 3_072, 50_304, 50_257, 44) if DEVICE == "cuda" else (32, 32, 64, 48, 41, 2)
)
"""Of one of eight GPUs at the record's largest batch, and its model; matrices that Muon orthogonalises together."""

WRONG = "**wrong**"
"""How a line begins that says that a kernel's result is not its rival's."""

COLUMNS = ("kernel", "ms", "TFLOP/s", "GB/s", "of the roofline", "times faster than")

PEAKS = {"H100": (989e12, 1979e12, 3.35e12), "H200": (989e12, 1979e12, 4.8e12)}
"""bf16 and FP8 operations and bytes of memory per second: dense peaks of NVIDIA's data sheets, SXM."""


@dataclass(frozen=True)
class Case:
    """ours and every rival compute the same; flops and bytes are what the formula needs at least; aim: times faster."""

    name: str
    ours: Callable[[], Any]
    rivals: dict[str, Callable[[], Any]]
    flops: float
    bytes: float
    fp8: bool = False
    tolerance: float = 0.02
    memory: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or find_spec("triton") is None:
        sys.exit("benchmarks.kernels needs an NVIDIA GPU and Triton; without them the kernels stay not measured.")
    properties = torch.cuda.get_device_properties(0)
    lines = [
        f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {TOKENS:,} tokens.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---:|---:|---:|---:|---|",
    ]
    print("\n".join(lines), flush=True)
    for make in CASES:
        for case in make():
            lines.append(f"| {' | '.join(row(case, properties.name).values())} |")
            print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text("# The kernels\n\n" + "\n".join(lines) + "\n")


def row(case: Case, gpu: str) -> dict[str, str]:
    """Check, measure and write one line of the table."""
    result = flat(case.ours())
    for name, rival in case.rivals.items():
        for got, want in zip(result, flat(rival()), strict=True):
            error = ((got.float() - want.float()).norm() / want.float().norm()).item()
            if not error <= case.tolerance:
                said = f"{WRONG}: differs from {name} by {error:.2%}, so not timed"
                return dict(zip(COLUMNS, (case.name, "–", "–", "–", "–", said), strict=True))
    del result
    seconds = median_seconds(case.ours)
    faster = {name: median_seconds(rival) / seconds for name, rival in case.rivals.items()}
    peaks = next((rates for name, rates in PEAKS.items() if name in gpu), None)
    share = "unknown"
    if peaks:
        share = f"{max(case.flops / peaks[1 if case.fp8 else 0], case.bytes / peaks[2]) / seconds:.0%}"
    rivals = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in faster.items())
    if case.memory and DEVICE == "cuda":
        ours, *others = (peak_memory(function) for function in (case.ours, *case.rivals.values()))
        rivals += f"; peak memory {ours / 2**20:,.0f} MiB against {', '.join(f'{o / 2**20:,.0f}' for o in others)}"
    rates = (f"{seconds * 1e3:.3f}", f"{case.flops / seconds / 1e12:.0f}", f"{case.bytes / seconds / 1e9:.0f}")
    return dict(zip(COLUMNS, (case.name, *rates, share, rivals), strict=True))


def median_seconds(function: Callable[[], Any]) -> float:
    """Of repeated runs, the L2 cache emptied in between; in the interpreter of a single one."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return do_bench(function, return_mode="median") / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch; in the interpreter as it is."""
    return torch.compile(function) if DEVICE == "cuda" else function


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that a run allocates above what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def symmetric_cases() -> list[Case]:
    from speedrun.kernels import symmetric

    cases = []
    for count, rows, columns in ((STACK, WIDTH, WIDTH), (STACK // 2, WIDTH, HIDDEN)):
        x = random(count, rows, columns)
        cases.append(
            Case(
                f"X·Xᵀ, {count} × {rows} × {columns}",
                lambda x=x: symmetric.gram(x),
                {"torch.bmm": lambda x=x: torch.bmm(x, x.mT)},
                2 * count * rows * rows * columns,
                2 * count * rows * (rows + columns),
            )
        )
    a = symmetric.gram(random(STACK, WIDTH, WIDTH, scale=0.03))
    cases.append(
        Case(
            f"b·A + c·A², {STACK} × {WIDTH} × {WIDTH}",
            lambda: symmetric.polynomial(a, -2.8, 0.5),
            {"torch.baddbmm": lambda: torch.baddbmm(a, a, a, beta=-2.8, alpha=0.5)},
            2 * STACK * WIDTH**3,
            2 * STACK * 2 * WIDTH**2,
        )
    )
    return cases


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], list[Tensor]]:
    """Forward and backward: the output and the gradients of the inputs."""
    upstream = torch.ones_like(function(*inputs))

    def run() -> list[Tensor]:
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    return run


def relu2_cases() -> list[Case]:
    from speedrun.kernels import relu2

    x, weight = random(TOKENS, WIDTH).requires_grad_(), random(HIDDEN, WIDTH, scale=0.02).requires_grad_()
    rival = compiled(relu2.linear_relu2_reference)
    product, traffic = 2 * TOKENS * WIDTH * HIDDEN, 2 * (TOKENS * (WIDTH + HIDDEN) + WIDTH * HIDDEN)

    def forward(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(x.detach(), weight.detach())

    return [
        Case("linear + ReLU², forward", forward(relu2.linear_relu2), {"compiled": forward(rival)}, product, traffic),
        Case(
            "linear + ReLU², forward and backward",
            with_gradients(relu2.linear_relu2, x, weight),
            {"compiled": with_gradients(rival, x, weight)},
            3 * product,
            3 * traffic,
        ),
    ]


def cross_entropy_cases() -> list[Case]:
    from speedrun.kernels import cross_entropy as module

    hidden, weight = random(TOKENS, WIDTH).requires_grad_(), random(WORDS, WIDTH, scale=0.05).requires_grad_()
    rival = compiled(module.cross_entropy_reference)
    cases = []
    for name, cap, form, future in (
        ("cross-entropy from hidden states, forward and backward", 15.0, "tanh", ()),
        ("the same of three tokens to come, the softcap's sigmoid form", 23.0, "sigmoid", (0.5, 0.25)),
    ):
        targets = torch.randint(0, VOCABULARY, (TOKENS, 1 + len(future)), device=DEVICE)
        further = {"form": form, "future": future}

        def run(
            function: Callable[..., Tensor], targets: Tensor = targets, cap: float = cap, further: Any = further
        ) -> Callable[[], list[Tensor]]:
            return with_gradients(
                lambda h, w: function(h, w, targets, VOCABULARY, cap, "mean", **further), hidden, weight
            )

        cases.append(
            Case(
                name,
                run(module.cross_entropy),
                {"compiled": run(rival)},
                6 * TOKENS * WIDTH * WORDS,
                6 * (TOKENS + WORDS) * WIDTH,
                memory=True,
            )
        )
    return cases


def fp8_cases() -> list[Case]:
    from speedrun.kernels import fp8

    cases = []
    for name, depth, columns in (("MLP up", WIDTH, HIDDEN), ("MLP down", HIDDEN, WIDTH), ("head", WIDTH, WORDS)):
        x, weight = random(TOKENS, depth), random(columns, depth, scale=0.02)

        def quantized(t: Tensor) -> tuple[Tensor, Tensor]:
            scale = fp8.scale_reference(t.abs().amax(), fp8.E4M3)
            return fp8.quantize_reference(t, scale, fp8.E4M3), scale

        def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
            return torch._scaled_mm(a, b.mT, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)

        quantize = compiled(quantized)
        (a, scale_a), (b, scale_b) = quantized(x), quantized(weight)

        def product(a=a, b=b, scale_a=scale_a, scale_b=scale_b) -> Tensor:  # type: ignore[no-untyped-def]
            return fp8.product(a, b, scale_a, scale_b, torch.bfloat16, False, "triton")

        def linear(way: str, x: Tensor = x, weight: Tensor = weight) -> Tensor:
            x8, _, x_scale = fp8.quantize(x, 0.0, fp8.E4M3, False, way)
            w8, _, w_scale = fp8.quantize(weight, 0.0, fp8.E4M3, False, way)
            return fp8.product(x8, w8, x_scale, w_scale, torch.bfloat16, False, way)

        def rival(x=x, weight=weight, quantize=quantize) -> Tensor:  # type: ignore[no-untyped-def]
            (x8, x_scale), (w8, w_scale) = quantize(x), quantize(weight)
            return scaled_mm(x8, w8, x_scale, w_scale)

        flops, traffic = 2.0 * TOKENS * depth * columns, TOKENS * depth + columns * depth + 2.0 * TOKENS * columns
        cases.append(
            Case(
                f"FP8 product, {name}",
                product,
                {"torch._scaled_mm": lambda a=a, b=b, s=scale_a, t=scale_b: scaled_mm(a, b, s, t)},
                flops,
                traffic,
                fp8=True,
            )
        )
        rivals = {
            "torch._scaled_mm, compiled quantisation": rival,
            "torch.matmul in bf16": lambda x=x, weight=weight: x @ weight.mT,
        }
        for title, way in (("in our kernels", "triton"), ("as runs have it, torch._scaled_mm", "scaled_mm")):
            cases.append(
                Case(
                    f"FP8 linear with current scales, {title}, {name}",
                    lambda linear=linear, way=way: linear(way),
                    rivals,
                    flops,
                    traffic + TOKENS * depth + columns * depth,
                    fp8=True,
                    tolerance=0.06,
                )
            )
    return cases


CASES = (symmetric_cases, relu2_cases, cross_entropy_cases, fp8_cases)


if __name__ == "__main__":
    main()
