"""What fully_shard, where it offloads, and DeepSpeed ask of a GPU beside operators."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def engines() -> Iterator[None]:
    """DeepSpeed takes the machine for one with CUDA (process.py has told it so); models for it have to be on the (fake)
    GPU already, since it moves them in place.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard

    properties = SimpleNamespace(total_memory=80 * 2**30)
    with contextlib.ExitStack() as stack:
        for module in (_fsdp_init, _fully_shard):  # in the one or the other, by torch's version
            if hasattr(module, "_get_managed_states"):
                moving = _moving(module._get_managed_states)
                stack.enter_context(mock.patch.object(module, "_get_managed_states", moving))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
        stack.enter_context(mock.patch.object(torch.cuda.nccl, "version", lambda: (2, 27, 0)))
        for marker in ("range_push", "range_pop"):
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, marker, lambda *_: None))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", lambda *_: None))
        yield


def _moving(find: Callable[..., Any]) -> Callable[..., Any]:
    """fully_shard moves what it shards by changing a parameter's data in place, and data that are real cannot become
    fake: here a new parameter takes the place of the old one beforehand.
    """

    def find_moved(modules: list[nn.Module], *args: Any) -> Any:
        new: dict[Tensor, nn.Parameter] = {}
        for module in modules:
            for name, p in module._parameters.items():
                if p is not None and not p.is_meta:
                    module._parameters[name] = new.setdefault(p, nn.Parameter(p.detach().to("cuda")))
        return find(modules, *args)

    return find_moved
