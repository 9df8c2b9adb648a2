"""Lesson 10, Activations: one way to solve the exercises."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_bytes(rows: int, length: int, width: int, heads: int, fused: bool) -> float:
    """34·s·b·h, and 5·a·s²·b of scores where they are stored."""
    return 34 * length * rows * width + (0 if fused else 5 * heads * length**2 * rows)


def checkpointed_bytes(layers: int, rows: int, length: int, width: int) -> float:
    """All inputs, and the rest of one layer."""
    return (2 * layers + 32) * length * rows * width


def fit_rows(rows: int, per_row: float, rest: float, room: float) -> tuple[int, int]:
    """From one micro-batch on, to more and smaller ones."""
    for accumulation in range(1, rows + 1):
        micro_batch, left = divmod(rows, accumulation)
        if not left and rest + micro_batch * per_row <= room:
            return micro_batch, accumulation
    raise ValueError(f"one row needs {rest + per_row:,.0f} bytes and there are {room:,.0f}")


class _Checkpoint(torch.autograd.Function):
    """Autograd sees one operation that keeps its input."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)  # inside a Function nothing is recorded

    @staticmethod
    def backward(ctx, gradient):
        inner = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.block(inner)
        output.backward(gradient)
        return None, inner.grad


def checkpoint(block: nn.Module, x: Tensor) -> Tensor:
    """Compute, forget, compute again."""
    return _Checkpoint.apply(block, x)


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Sums of chunks, each checkpointed, divided once."""

    def part(some, weight, wanted):
        return F.cross_entropy(some @ weight.T, wanted, reduction="sum")

    total = hidden.new_zeros(())
    for some, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(part, some, weight, wanted, use_reentrant=False)
    return total / len(targets)


def self_ms(events: list[dict[str, Any]]) -> dict[str, float]:
    """A stack of open operators per thread; every operator's time is taken from the one that called it."""
    operators = [event for event in events if event.get("ph") == "X" and event.get("cat") == "cpu_op"]
    found: dict[str, float] = {}
    stacks: dict[Any, list[dict[str, Any]]] = {}
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        stack = stacks.setdefault(event["tid"], [])
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            found[stack[-1]["name"]] -= event["dur"] / 1e3
        found[event["name"]] = found.get(event["name"], 0.0) + event["dur"] / 1e3
        stack.append(event)
    return found
