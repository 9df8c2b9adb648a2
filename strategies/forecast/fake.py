"""Standing in for the world: rank r of N without the other ranks, without data and without a GPU.

Tensors are fake (shapes, dtypes and storages of a size, but no bytes behind them) and so is the process group, whose
collectives end at once. What is patched, and undone on leaving, is only what asks for data that is not there: here for
all strategies, in a strategy's own fake.py for its engine.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from strategies import catalogue
from strategies.errors import UserError


@contextmanager
def fake_rank(rank: int, world_size: int, strategy: str) -> Iterator[None]:
    """Inside, this process is that rank, every new tensor is fake, and the strategy's engine starts as it does on gloo.

    Raises ValueError where a process group is running: the engine would use it.
    """
    if dist.is_initialized():
        raise UserError("A simulation needs a process without a process group, and here one is running already.")
    import torch.distributed._tools.fake_collectives  # noqa: F401  collectives of fake tensors, for torch.ops.c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with ExitStack() as stack:
        launched = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        stack.enter_context(warnings.catch_warnings())
        for unavoidable in ("Accessing the data pointer of FakeTensor", ".* is deprecated. Please use"):
            warnings.filterwarnings("ignore", message=unavoidable)
        stack.enter_context(mock.patch.dict(os.environ, {key: str(value) for key, value in launched.items()}))
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert_module))
        stack.enter_context(catalogue.fake(strategy))
        yield


def _convert_module(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's `to`, `bfloat16` and so on. Its own refuses to convert a fake parameter that others refer to."""
    for child in module.modules() if recurse else (module,):
        for parameter in child._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = fn(parameter.data)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = fn(buffer)
    return module


def gloo_copies(operator: str, args: Sequence[Any]) -> list[int]:
    """Bytes allocated and released inside an operator on CPU ranks, where a GPU with NCCL works in place.

    Seen with a counting allocator on 2 and 3 ranks. In gloo an all-gather goes through a flat copy of its output, a
    reduce-scatter clones its input (of a list of inputs all but the rank's own), the others work in place. FSDP2's copy
    of gradients into the reduce-scatter's input, one kernel on CUDA, pads uneven ones in copies of their own; and where
    it adds bf16 gradients to float32 ones, the CPU converts them first.
    """
    bytes = _gloo_copy(operator, args)
    return [bytes] if bytes else []


def _gloo_copy(operator: str, args: Sequence[Any]) -> int:
    if operator == "add_" and isinstance(args[1], Tensor) and args[0].dtype != args[1].dtype:
        return args[1].numel() * args[0].element_size()
    if operator == "chunk_cat":
        gradients, dim, chunks = args[:3]
        padded = {g: -(-g.shape[dim] // chunks) * chunks for g in gradients if g.shape[dim] % chunks}
        return sum(_bytes(g) // g.shape[dim] * rows for g, rows in padded.items())
    if operator in ("allgather_", "_allgather_base_"):
        return _bytes(args[0])
    if operator == "_reduce_scatter_base_":
        return _bytes(args[1])
    if operator == "reduce_scatter_":
        return _bytes(args[1]) - _bytes(args[0])
    return 0


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


@contextmanager
def gpu_kernels(version: tuple[int, int]) -> Iterator[None]:
    """See GPUKernels. Torch switches such a mode off within the calls that it handles, of which `backward` is one; but
    with gradient checkpointing the forward pass runs again in there.
    """
    run_backward = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with GPUKernels(version):
            return run_backward(*args, **kwargs)

    with mock.patch.object(torch.autograd, "_engine_run_backward", backward), GPUKernels(version):
        yield


class GPUKernels(TorchFunctionMode):
    """On CPU tensors, the choices that torch makes on CUDA tensors: of kernels, and of autocast's dtypes.

    Attention: the flash kernel for 16-bit inputs without a mask; the memory-efficient one otherwise, which wants a
    boolean mask as numbers of the inputs' dtype (on Hopper it is cuDNN's, which keeps as much). Norms: one kernel,
    which saves its input and one or two float32 numbers per row, where the CPU's RMSNorm is six operators. Autocast:
    CUDA's list of operators that run in float32 is longer than the CPU's (torch's ATen/autocast_mode.h); the entries
    that a transformer meets are repeated here. RMSNorm is on it since torch 2.12.

    version: torch's on the GPU.
    """

    FLOAT32 = frozenset(
        {
            F.layer_norm,
            F.softmax,
            F.log_softmax,
            F.cross_entropy,
            F.nll_loss,
            torch.layer_norm,
            torch.pow,
            torch.square,
            torch.softmax,
            torch.log_softmax,
            torch.exp,
            torch.log,
            torch.rsqrt,
            torch.reciprocal,
            torch.sum,
            Tensor.pow,
            Tensor.__pow__,
            Tensor.square,
            Tensor.softmax,
            Tensor.log_softmax,
            Tensor.exp,
            Tensor.log,
            Tensor.rsqrt,
            Tensor.reciprocal,
            Tensor.sum,
        }
    )

    def __init__(self, version: tuple[int, int]) -> None:
        super().__init__()
        self.float32 = self.FLOAT32 | ({F.rms_norm} if version >= (2, 12) else set())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in self.float32 and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        if func is F.rms_norm:
            return _Norm.apply(args[0], args[2] if len(args) > 2 else kwargs.get("weight"), None, 1)
        if func is F.layer_norm:
            weight, bias = (args[i] if len(args) > i else kwargs.get(key) for i, key in ((2, "weight"), (3, "bias")))
            return _Norm.apply(args[0], weight, bias, 2)
        return func(*args, **kwargs)


class _Norm(torch.autograd.Function):
    """What CUDA's kernels for LayerNorm and RMSNorm allocate, read, write and save; values are nobody's business
    here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, numbers_per_row: int) -> Tensor:
        numbers = [x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(numbers_per_row)]
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, *numbers)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *_ = ctx.saved_tensors
        of_weight = None if weight is None else torch.empty_like(weight)
        of_bias = None if ctx.bias is None else torch.empty(x.shape[-1:], dtype=ctx.bias)
        return torch.mul(gradients[0], x), of_weight, of_bias, None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, needs_backward, dropout_p, is_causal, scale=scale
    )[0]
