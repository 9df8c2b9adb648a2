"""What the functions that a GPU runs accept, as assertions, and stand-ins for those that cannot run on fake tensors.

scaled_dot_product_attention   q, k, v of one dtype, once autocast has cast them: it is in autocast's list of functions
                               in lower precision (torch, ATen/autocast_mode.h, and validate_sdpa_input in
                               ATen/native/transformers/attention.cpp); a mask is boolean or of their dtype
flex_attention                 q, k, v of one dtype: torch 2.9 and 2.10 refuse others (_validate_sdpa_input in
                               torch/nn/attention/flex_attention.py) and are not cast by autocast, later ones are. It is
                               fused only where compiled; uncompiled all scores exist, and within a dispatch mode
                               that knows no rule for it it ends with NotImplementedError
varlen_attn (torch ≥ 2.10)     q, k, v of one dtype, float16 or bfloat16, heads of a multiple of 8 channels up to 256,
                               lengths int32 (ATen/native/transformers/cuda/flash_attn/flash_api.cpp); autocast does not
                               know it
flash_attn_varlen_func         the same (hopper/flash_api.cpp of the flash-attention repository)
our operators                  what their docstrings say: one floating-point dtype for all operands of a product, and
                               int64 targets

Compiled code does not run within a dispatch mode: torch then runs the function as it is. So do the stand-ins.
"""

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from speedrun.model.attend import flash_function
from speedrun.model.flex import _compiled as _compiled_flex

SIXTEEN_BITS = (torch.float16, torch.bfloat16)

PRODUCTS = {"linear_relu2": 2, "gram": 1, "symmetric_polynomial": 1}
"""Operators of ours that are products → how many of their arguments are operands."""


def check(func: Any, args: Any, kwargs: dict[str, Any], calls: Counter[str]) -> None:
    """Assert what an operator accepts, where it is one of ours or torch's variable-length attention."""
    if func.namespace not in ("speedrun", "torch_attn"):
        return
    name = func._opname
    calls[name] += 1
    if name == "_varlen_attn":
        q, k, v, of_queries, of_keys = args[:5]
        _check_lengths("varlen_attn", q, k, v, of_queries, of_keys)
    elif name in PRODUCTS:
        _check_dtypes(name, *args[: PRODUCTS[name]])
    elif name.startswith("cross_entropy"):
        hidden, weight, targets = args[:3]
        assert hidden.is_floating_point() and weight.is_floating_point() and targets.dtype == torch.int64, (
            f"{name} gets {hidden.dtype}, {weight.dtype} and targets of {targets.dtype}"
        )


@contextlib.contextmanager
def stand_ins(calls: Counter[str], device: TorchDispatchMode, flash: bool) -> Iterator[None]:
    """Put them in the place of torch's functions. device: the mode that makes the GPU; flash: FlashAttention-3 is
    installed.
    """

    def sdpa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        calls["scaled_dot_product_attention"] += 1
        _check_dtypes("scaled_dot_product_attention", q, k, v)
        assert attn_mask is None or attn_mask.dtype in (torch.bool, q.dtype), f"a mask of {attn_mask.dtype}"
        return _Attention.apply(q, k, v)

    def flex_attention(
        q: Tensor, k: Tensor, v: Tensor, score_mod: Any = None, block_mask: Any = None, scale: float | None = None
    ) -> Tensor:
        calls["flex_attention"] += 1
        _check_dtypes("flex_attention", q, k, v)
        if not _compiled.get():
            if modes := _other_modes(device):
                raise NotImplementedError(f"There was no rule registered for flex_attention and mode {modes[0]}")
            raise AssertionError("flex_attention is not compiled: all scores would exist")
        return _Attention.apply(q, k, v)

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls["flash_attn_varlen_func"] += 1
        _check_lengths("flash_attn_varlen_func", q, k, v, options["cu_seqlens_q"], options["cu_seqlens_k"])
        return _Attention.apply(q, k, v)

    def compile(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return lambda function: compile(function)

        def run(*args: Any, **kwargs: Any) -> Any:
            token = _compiled.set(not _other_modes(device))
            try:
                return function(*args, **kwargs)
            finally:
                _compiled.reset(token)

        return run

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    _forget()
    with (
        mock.patch.object(F, "scaled_dot_product_attention", sdpa),
        mock.patch.object(flex, "flex_attention", flex_attention),
        mock.patch.object(torch, "compile", compile),
        mock.patch.object(torch.compiler, "is_compiling", _compiled.get),
        # For simulations FlexAttention has a stand-in of its own; here it goes the way of tensors that are there.
        mock.patch("speedrun.model.flex.is_fake", lambda tensor: False),
        _importable(package) if flash else contextlib.nullcontext(),
    ):
        yield
    _forget()


@contextlib.contextmanager
def _importable(package: types.ModuleType) -> Iterator[None]:
    """Of sys.modules nothing else is put back: some of torch cannot be imported twice."""
    sys.modules[package.__name__] = package
    try:
        yield
    finally:
        del sys.modules[package.__name__]


def _forget() -> None:
    """What a process finds out once: whether there is FlashAttention, and what it has compiled."""
    flash_function.cache_clear()
    _compiled_flex.cache_clear()


class _Attention(torch.autograd.Function):
    """Some attention: a result and gradients of the right shapes and dtypes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


_compiled: ContextVar[bool] = ContextVar("compiled", default=False)
"""Whether compiled code is running."""


def _other_modes(device: TorchDispatchMode) -> list[Any]:
    """Dispatch modes that are on beside those of fake tensors."""
    return [mode for mode in _get_current_dispatch_mode_stack() if mode is not device and not mode.is_infra_mode()]


def _check_dtypes(name: str, *tensors: Tensor) -> None:
    dtypes = [x.dtype for x in tensors]
    assert len(set(dtypes)) == 1 and dtypes[0].is_floating_point, f"{name} gets {dtypes}"


def _check_lengths(name: str, q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor) -> None:
    _check_dtypes(name, q, k, v)
    assert q.dtype in SIXTEEN_BITS, f"{name} takes 16 bits and gets {q.dtype}"
    assert q.dim() == 3 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"{name} gets heads {tuple(q.shape)}"
    assert all(x.dtype == torch.int32 for x in lengths), f"{name} gets lengths of {[x.dtype for x in lengths]}"
