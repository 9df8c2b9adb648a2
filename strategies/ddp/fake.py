"""What DistributedDataParallel needs to run on tensors without data, and without the other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as torch_ddp
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from strategies.ddp import engine


@contextmanager
def fake() -> Iterator[None]:
    """DistributedDataParallel compares the ranks' shapes and broadcasts weights, which needs both, and sends a list of
    buckets around, which needs real numbers. Its reducer waits for collectives in C++: a hook in Python does not.
    """

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
        mock.patch.object(engine, "DistributedDataParallel", FakeDDP),
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
