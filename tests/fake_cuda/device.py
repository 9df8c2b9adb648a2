"""The device: what is asked of CUDA in Python, and the mode under which tensors on it are fake."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # looks at all of torch.cuda when it is first imported: not at what stands in for it here
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.fake_cuda import functions

aten = torch.ops.aten

GPUS = 8
HOPPER = (9, 0)


@contextlib.contextmanager
def fake_gpus(flash: bool = False) -> Iterator[Counter[str]]:
    """A machine with GPUS of them, and with FlashAttention-3 where `flash` says so. Returns how often each function of
    `functions.py` was called, by name.
    """
    calls: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for name, answer in _CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # Tensors made from numbers are made on the host and copied, where the mode below sees the copy.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert_module))
        # In the thread that fetches rows there is no mode; it asks for memory of the host that only a driver can give.
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor))
        mode = FakeCUDA(calls)
        stack.enter_context(functions.stand_ins(calls, mode, flash))
        stack.enter_context(mode)
        yield calls


class FakeCUDA(TorchDispatchMode):
    """Tensors on "cuda" are fake, all others real; what goes from one to the other is made up here."""

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls = calls
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # which works on local tensors, and those that are fake stay so
            return func(*args, **kwargs or {})
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # memory of the host that only a driver can give
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if func.namespace == "c10d" and func._opname != "barrier":
            sent = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel()]
            there = [t for t in sent if t.is_floating_point() and not is_fake(t)]  # integers: the fakes' own, of sizes
            assert not there, f"NCCL moves nothing in host memory, but {func} is asked to"
        if self._waits(func, FakeTensor in types, to_gpu, args, kwargs):
            self.calls[f"waits: {func._opname}"] += 1
        if FakeTensor not in types:
            if func is aten._pin_memory.default:
                return args[0].clone()
            if not to_gpu:
                return func(*args, **kwargs)
            args, kwargs = tree_map_only(Tensor, self.fakes.from_tensor, (args, kwargs))
        elif func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 0
        elif func is aten._to_copy.default and device is not None and not to_gpu:
            return _made_up(torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype))
        elif func is aten.copy_.default and not is_fake(args[0]):
            return _made_up(args[0])
        elif func is aten.nonzero.default:
            func, args, kwargs = (
                aten.empty.memory_format,
                ([2, args[0].ndim],),
                {"dtype": torch.int64, "device": "cuda"},
            )
        elif func is aten.record_stream.default:
            return None
        functions.check(func, args, kwargs, self.calls)
        return self.fakes.__torch_dispatch__(func, types, args, kwargs)

    @staticmethod
    def _waits(func: Any, there: bool, to_gpu: bool, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the host stands until the device has done what it was given: for a number, for how many places there
        are, and for a copy in either direction that nobody has called non-blocking."""
        if func is aten.copy_.default:
            one_way = is_fake(args[0]) != is_fake(args[1])
            return one_way and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if func is aten._to_copy.default:
            device = torch.device(kwargs.get("device") or args[0].device)
            leaves = there and device.type != "cuda"
            return (leaves or (to_gpu and not there)) and not kwargs.get("non_blocking")
        return there and func in (aten._local_scalar_dense.default, aten.nonzero.default)


def _made_up(host: Tensor) -> Tensor:
    """What a copy from the device holds."""
    return host.fill_(1 if host.is_floating_point() else 0)


def _convert_module(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's `to` and so on. Its own changes a parameter's data in place, and data that are real cannot become
    fake: here a new parameter takes the place of a real one, the same for all modules that share it.
    """
    new: dict[Tensor, nn.Parameter] = {}
    for child in module.modules() if recurse else (module,):
        for name, parameter in child._parameters.items():
            if parameter is not None:
                if is_fake(parameter):
                    parameter.data = convert(parameter.data)
                    continue
                if parameter not in new:
                    new[parameter] = nn.Parameter(_converted(parameter.detach(), convert), parameter.requires_grad)
                child._parameters[name] = new[parameter]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = convert(buffer)
    for child in module.modules() if recurse else ():
        if isinstance(child, FSDPModule):  # as its own `_apply` does, once the parameters are others
            for parameter_group in child._get_fsdp_state()._fsdp_param_groups:
                for sharded in parameter_group.fsdp_params:
                    sharded.reset_sharded_param()
    return module


def _converted(tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a DTensor that which it is made of: torch would convert it outside of the mode."""
    if not isinstance(tensor, DTensor):
        return convert(tensor)
    return DTensor(convert(tensor._local_tensor), tensor._spec, requires_grad=False)


class Stream:
    """A stream or an event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, stream: Any = None) -> "Stream":
        return self

    def record_event(self, event: Any = None) -> "Stream":
        return self

    def query(self) -> bool:
        return True


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "device_count": lambda: GPUS,
    "get_device_capability": lambda device=None: HOPPER,
    "get_device_name": lambda device=None: "a GPU that is not there",
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "Stream": Stream,
    "Event": Stream,
    **dict.fromkeys(("_lazy_init", "current_device", "set_device", "synchronize", "empty_cache"), _nothing),
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), _nothing),
    "reset_peak_memory_stats": _nothing,
}
"""What torch.cuda answers."""
