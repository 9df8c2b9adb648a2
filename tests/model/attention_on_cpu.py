"""GPU attention functions on CPU tensors, with gradients, for tests alone: what is ours around them is the real thing.

- FlexAttention: torch.compile as on a GPU but for what it compiles to: one of dynamo's own backends, which runs the
  operators one by one. Torch refuses gradients on CPUs because its CPU kernel has no backward pass; its operators have.
- Variable-length attention: the real `varlen_attn`, with its real autograd formula, on a kernel in plain torch. It is
  registered where FlashAttention-3 and -4 register theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.attention.flex_attention
from torch import Tensor

from speedrun.model import flex

VARLEN = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
needs_varlen = pytest.mark.skipif(not VARLEN, reason="torch's variable-length attention has windows from 2.11 on")


@contextmanager
def flex_on_cpu(backend: Any = "aot_eager") -> Iterator[None]:
    """backend: what compiles it."""
    anywhere = mock.patch.object(torch.nn.attention.flex_attention, "_validate_device", lambda *args: None)
    with mock.patch.object(flex, "BACKEND", backend), anywhere:
        yield


@contextmanager
def varlen_on_cpu() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield


def _scores(q: Tensor, k: Tensor, ends: Tensor, left: int, scale: float | None) -> Tensor:
    """[heads, rows, rows], in float32 at least; −∞ where a query may not look."""
    rows = torch.arange(len(q))
    document = torch.bucketize(rows, ends[1:], right=True)
    distance = rows[:, None] - rows
    seen = (distance >= 0) & (document[:, None] == document)
    if left >= 0:
        seen &= distance <= left
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), k.to(dtype)) * (scale or q.shape[-1] ** -0.5)
    return scores.masked_fill(~seen, float("-inf"))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, longest: int, *__: Any, **options: Any
) -> tuple[Tensor, ...]:
    assert ends.dtype == torch.int32 and options["window_size_right"] == 0 and int(ends.diff().max()) <= longest
    scores = _scores(q, k, ends, options["window_size_left"], options["scale"])
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.to(scores.dtype)).to(q.dtype)
    return y, scores.logsumexp(-1).float(), torch.empty(0), torch.empty(0), torch.empty(0)


def _backward(
    towards: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, ends: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4, without its blocks."""
    scores = _scores(q, k, ends, options["window_size_left"], options["scale"])
    weights, scale = scores.softmax(-1), options["scale"] or q.shape[-1] ** -0.5
    torch.testing.assert_close(scores.logsumexp(-1).float(), lse)  # what was kept belongs to q and k
    towards, y, q_, k_, v_ = (x.to(scores.dtype) for x in (towards, y, q, k, v))
    of_weights = torch.einsum("qhd,khd->hqk", towards, v_)
    of_scores = weights * (of_weights - (towards * y).sum(-1).T[:, :, None]) * scale
    of_q = torch.einsum("hqk,khd->qhd", of_scores, k_)
    of_k = torch.einsum("hqk,qhd->khd", of_scores, q_)
    of_v = torch.einsum("hqk,qhd->khd", weights, towards)
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype)
