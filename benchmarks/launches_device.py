"""A Hopper GPU that is not there, on which inductor writes its code: for benchmarks/launches.py.

Tensors are fake and no driver answers, so nothing is compiled by Triton and nothing runs. Blocks go through dynamo, AOT
autograd and inductor down to the generated Python, which is where launches can be counted: a `.run(` per Triton kernel,
an `extern_kernels` or `torch.ops` call per kernel of a library. Attention is one opaque operator in each direction.

Runs in a process that tests/fake_cuda/process.py has started: torch's C++ asks the shim there for the device.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import device_interface
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad

from speedrun.model import attend, masks
from strategies.forecast.fake import _convert_module, _Norm
from tests.fake_cuda.device import _CUDA

HOPPER = SimpleNamespace(
    name="a Hopper GPU that is not there",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)

Compiled = Callable[[int, int], None]
"""Told of every call of generated code: how many launches it has, and how many bytes they read and write."""


@torch.library.custom_op("launches::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for a fused attention kernel: the output, and log-sum-exps."""
    raise NotImplementedError


@torch.library.custom_op("launches::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for its backward pass."""
    raise NotImplementedError


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


attention.register_autograd(
    lambda ctx, gradient, _: torch.ops.launches.attention_backward(gradient, *ctx.saved_tensors), setup_context=_keep
)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Tensor:
    return torch.ops.launches.attention(q if scale is None else q * scale, k, v)[0]  # type: ignore[no-any-return]


def _of_its_own(answer: Any) -> Any:
    """The same under another identity: dynamo has a table of torch's functions, and wants them to differ."""
    return (
        type("Event", (answer,), {}) if isinstance(answer, type) else lambda *args, **options: answer(*args, **options)
    )


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    """New tensors are fake, "cuda" is a Hopper, and inductor writes code for it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    answers = {
        **{name: _of_its_own(answer) for name, answer in _CUDA.items()},
        "get_device_properties": lambda *_: HOPPER,
        "set_rng_state": lambda *_, **__: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
    }
    asked: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_compute_capability": lambda device=None: 90,
        "get_device_properties": lambda device=None: HOPPER,
        "is_bf16_supported": lambda including_emulation=False: True,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "get_raw_stream": lambda device: 0,
        "synchronize": lambda device=None: None,
    }
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    interface = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.cuda, "_get_device_properties", lambda *_: HOPPER, create=True))
        for name, answer in asked.items():
            stack.enter_context(mock.patch.object(interface, name, staticmethod(answer)))
        stack.enter_context(
            mock.patch.object(interface.Worker, "get_device_properties", staticmethod(lambda device=None: HOPPER))
        )
        # Patterns that inductor looks for are traced on real tensors of the device.
        for module, name in (
            (fuse_attention, "_sfdp_init"),
            (pad_mm, "_pad_mm_init"),
            (misc_patterns, "_misc_patterns_init"),
        ):
            stack.enter_context(mock.patch.object(module, name, lambda *_, **__: None))
        stack.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: "none"))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert_module))
        # Constants are folded by computing them.
        stack.enter_context(torch._inductor.config.patch(joint_graph_constant_folding=False))
        # Foreach is for torch's own class of tensors, and fake ones have another.
        stack.enter_context(mock.patch.object(clip_grad, "_has_foreach_support", lambda *_: True))
        stack.enter_context(mock.patch.object(F, "rms_norm", _rms_norm))
        stack.enter_context(mock.patch.object(attend, "flex", _flex))
        stack.enter_context(mock.patch.object(masks, "document_lengths", _lengths))
        # Tensors made from numbers are made on the host and copied.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """CUDA's one kernel in each direction, where a torch without CUDA has a formula; inductor makes its own of that.
    From torch 2.12 on it is in autocast's list of float32 operators.
    """
    if torch.compiler.is_compiling():
        return _formula(x, shape, weight, eps)
    wide = torch.is_autocast_enabled("cuda") and torch.__version__ >= "2.12"
    return _Norm.apply(x.float() if wide else x, weight, None, 1)  # type: ignore[no-any-return]


_formula = F.rms_norm


def _lengths(documents: Tensor | None, batch: int, time: int, device: torch.device) -> Tensor:
    return torch.empty(batch + 1, dtype=torch.int32, device=device)


def backend(told: Compiled) -> Callable[..., Any]:
    """For torch.compile: inductor as far as its generated code. The graph itself then runs on fake tensors, unseen."""

    def inner(graph: fx.GraphModule, inputs: Any, **options: Any) -> Callable[[list[Any]], Any]:
        launches, moved = generated(graph, inputs, options)

        def run(arguments: list[Any]) -> Any:
            told(launches, moved)
            with uncounted():
                return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=inner)  # type: ignore[arg-type]


def generated(graph: fx.GraphModule, inputs: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Launches, and bytes read and written, of the code that inductor generates."""
    module = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node, original in zip(module.graph.nodes, graph.graph.nodes, strict=True):
        node.meta = dict(original.meta)
    kind = {name: options.get(name, False) for name in ("is_backward", "is_inference")}
    compile_fx.view_to_reshape(module)
    with torch.no_grad():
        fakes = compile_fx.fake_tensor_prop(module, inputs)
    compile_fx._recursive_record_original_output_strides(module)
    with DebugContext(), V.set_fake_mode(fakes):
        compile_fx._recursive_post_grad_passes(module, is_inference=kind["is_inference"])
        shapes = compile_fx.shape_env_from_inputs(inputs)
        lowering = GraphLowering(module, example_inputs=inputs, shape_env=shapes, **kind)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code = lowering.codegen()[0].value
            moved = lowering.count_bytes()[0]
    return launches_in(code), int(moved)


def launches_in(code: str) -> int:
    """Launches in generated code: Triton kernels, and calls of a library's."""
    body = code[code.index("def call(") :]
    return len(re.findall(r"\.run\(|extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+\.\w+\(", body))


_paused = False


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What operators run inside belong to generated code that is counted already."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


def paused() -> bool:
    """Inside `uncounted`."""
    return _paused
