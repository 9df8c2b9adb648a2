"""Standing in for the world: rank r of N without the other ranks, without data and without a GPU.

Tensors are fake (shapes, dtypes and storages of a size, but no bytes behind them) and so is the process group, whose
collectives end at once. What is patched here, and undone on leaving, is only what asks for data that is not there.
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
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_rank(rank: int, world_size: int, deepspeed: bool = False) -> Iterator[None]:
    """Inside, this process is that rank, every new tensor is fake, and engines start as they do on gloo.

    Raises ValueError where a process group is running: it would be the one that the engines find.
    """
    if dist.is_initialized():
        raise ValueError("A simulation needs a process without a process group, and here one is running already.")
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
        for patches in (_fsdp, _ddp, *([_deepspeed] if deepspeed else [])):
            stack.enter_context(patches())
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


@contextmanager
def _fsdp() -> Iterator[None]:
    """A device mesh is a tensor of ranks whose numbers are read: it has to be a real one. And on CPU, where streams are
    empty shells, FSDP2's get names, by which the tracer tells what runs beside the computation.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPCommContext

    import strategies.fsdp as fsdp

    make_mesh, make_streams = fsdp.init_device_mesh, FSDPCommContext.lazy_init

    def real_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily(), _disable_current_modes():
            return make_mesh(*args, **kwargs)

    def named_streams(context: Any, *args: Any) -> None:
        make_streams(context, *args)
        for name, value in vars(context).items():
            if isinstance(value, torch.cpu.Stream):
                value.name = name.removesuffix("_stream")  # type: ignore[attr-defined]

    with (
        mock.patch.object(fsdp, "init_device_mesh", real_mesh),
        mock.patch.object(FSDPCommContext, "lazy_init", named_streams),
    ):
        yield


@contextmanager
def _ddp() -> Iterator[None]:
    """DistributedDataParallel compares the ranks' shapes and broadcasts weights, which needs both, and sends a list of
    buckets around, which needs real numbers. Its reducer waits for collectives in C++: a hook in Python does not.
    """
    import torch.nn.parallel.distributed as torch_ddp

    import strategies.ddp as ddp

    class FakeDDP(torch_ddp.DistributedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, _all_reduce)

        def _pre_forward(self, *args: Any, **kwargs: Any) -> Any:
            with _RealIntegers():
                return super()._pre_forward(*args, **kwargs)

    with (
        mock.patch.object(torch_ddp, "_verify_param_shape_across_processes", lambda *args: None),
        mock.patch.object(torch_ddp, "_sync_module_states", lambda *args, **kwargs: None),
        mock.patch.object(ddp, "DistributedDataParallel", FakeDDP),
    ):
        yield


def _all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    dist.all_reduce(bucket.buffer(), async_op=True)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class _RealIntegers(TorchDispatchMode):
    """Integer tensors made in C++, whose numbers are read there, are real ones, in the host's memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kwargs.get("dtype") is torch.int32 if not tensors else not any(map(is_fake, tensors)):
            if not tensors:
                kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
            with unset_fake_temporarily(), _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _deepspeed() -> Iterator[None]:
    """DeepSpeed compares lists of integers with rank 0's, which it does not get here; the broadcasts remain. And what
    it leaves behind for the whole process is taken back: the process groups in its modules, which end with ours, and
    ZeRO-3's own linear layer.
    """
    from strategies.zero import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    import deepspeed.comm.comm as comm
    import deepspeed.runtime.zero.utils as utils
    from deepspeed.utils import groups

    def from_rank_0(integers: list[int]) -> list[int]:
        dist.broadcast(torch.tensor(integers), src=0)
        return integers

    no_groups = {name: None for name, value in vars(groups).items() if isinstance(value, dist.ProcessGroup)}
    with (
        mock.patch.object(comm, "cdb", None),
        mock.patch.object(F, "linear", F.linear),
        mock.patch.dict(vars(groups), no_groups),
        mock.patch.object(utils, "assert_lst_len_same_as_other_ranks", lambda ints: from_rank_0([len(ints)])),
        mock.patch.object(utils, "get_lst_from_rank0", from_rank_0),
    ):
        yield


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
