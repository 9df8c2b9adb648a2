"""FlexAttention: always compiled, or not at all.

Uncompiled it holds all scores at once, without a backward pass. torch.compile leaves a function as it is inside a
dispatch mode (the counted step of a run, selective checkpointing), past its limit of variants, or where it is switched
off: so modes are taken off around the compiled code, and what would run uncompiled all the same ends the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import wrap_torch_function
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves

from speedrun.model.masks import Mask
from speedrun.model.unseen import made_unseen
from strategies.errors import UserError

UNFUSED = (
    "FlexAttention would run uncompiled here, and hold all scores at once: {}; use --model.attention sdpa or varlen"
)
BACKEND = "inductor"
"""What compiles it. Tests without a GPU put one of dynamo's debugging backends here."""


@wrap_torch_function(lambda q, k, v, mask, scale: (q, k, v))
def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """softmax(scale · q·kᵀ)·v under a block mask.

    q, k, v: [batch, heads, time, head_dim], of one dtype; scale: None for 1 / √head_dim. A scale is multiplied into q,
    because the compiled function would be another one for every number.

    Raises ValueError where it would run uncompiled.
    """
    if scale is not None:
        q = q * scale
    if torch.compiler.is_compiling():  # a whole block is compiled, and this becomes a part of it
        return _attention(q, k, v, mask.blocks, scale is not None)
    return _Flex.apply(q, k, v, mask, scale is not None)  # type: ignore[no-any-return]


def _attention(q: Tensor, k: Tensor, v: Tensor, blocks: Any, scaled: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.compiler.is_compiling():
        raise UserError(UNFUSED.format("torch.compile did not take it (TORCH_COMPILE_DISABLE, or a dispatch mode)"))
    return flex_attention(q, k, v, block_mask=blocks, scale=1.0 if scaled else None)  # type: ignore[return-value]


@cache
def _compiled(backend: Any) -> Any:
    return torch.compile(_attention, dynamic=False, fullgraph=True, backend=backend)


@contextmanager
def _without_modes() -> Iterator[None]:
    """No dispatch mode is on, and torch.compile knows: before torch 2.11 it goes by a flag that the mode has set."""
    with _python_dispatch._disable_current_modes():
        flag = _python_dispatch._is_in_any_mode_without_ignore_compile_internals
        _python_dispatch._is_in_any_mode_without_ignore_compile_internals = False
        try:
            yield
        finally:
            _python_dispatch._is_in_any_mode_without_ignore_compile_internals = flag


class _Flex(torch.autograd.Function):
    """Compiled FlexAttention and its compiled backward pass, each without the dispatch modes that are on.

    The compiled code has a graph of its own inside. What that would keep is kept here instead: so whoever watches what
    autograd keeps, or drops it (checkpointing), sees q, k, v, the output, the log-sum-exp and the mask's tensors.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaled: bool) -> Tensor:
        if is_fake(q):
            y, kept = _stand_in(q, k, v, mask)
        else:
            kept, ctx.given = [], []
            learns = any(ctx.needs_input_grad)

            def keep(tensor: Tensor) -> int:
                kept.append(tensor.detach())
                return len(kept) - 1

            with (
                _without_modes(),
                torch.set_grad_enabled(learns),
                saved_tensors_hooks(keep, ctx.given.__getitem__),
            ):
                inputs = [x.detach().requires_grad_(learns) for x in (q, k, v)]
                try:
                    y = _compiled(BACKEND)(*inputs, mask.blocks, scaled)
                except torch._dynamo.exc.FailOnRecompileLimitHit:
                    limit = torch._dynamo.config.recompile_limit
                    raise UserError(UNFUSED.format(f"torch.compile's limit of {limit} variants is used up")) from None
                if learns:
                    ctx.inner = [torch.autograd.graph.get_gradient_edge(x) for x in (y, *inputs)]
                for x in inputs:  # the inner graph holds them, whatever becomes of what is kept
                    x.data = x.new_empty(0)
                y = y.detach()
        made_unseen([y, *kept])
        ctx.save_for_backward(*kept)
        kept.clear()  # the inner graph's hooks may hold on to the list
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        if is_fake(gradients[0]):
            of_inputs = tuple(torch.empty_like(x) for x in kept[:3])
        else:
            y, *inputs = ctx.inner
            ctx.given[:] = kept
            with _without_modes():
                of_inputs = torch.autograd.grad(y, inputs, gradients[0])
            ctx.given.clear()
            made_unseen(list(of_inputs))
        return *of_inputs, None, None


def _stand_in(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, list[Tensor]]:
    """For tensors without data, which nothing can be compiled for: the output, and what the kernel would keep."""
    log_sum_exp = q.new_empty(q.shape[:3], dtype=torch.float32)
    lists = [x for x in tree_leaves(mask.blocks.as_tuple()) if isinstance(x, Tensor)]
    y = torch.empty_like(q)
    assert mask.first is not None
    return y, [q, k, v, y.detach(), log_sum_exp, mask.first, *lists]
