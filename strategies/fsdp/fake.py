"""What FSDP2 needs to run on tensors without data: a real device mesh, and streams with names."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPCommContext
from torch.utils._python_dispatch import _disable_current_modes

from strategies.fsdp import engine


@contextmanager
def fake() -> Iterator[None]:
    """A device mesh is a tensor of ranks whose numbers are read: it has to be a real one. And on CPU, where streams are
    empty shells, FSDP2's get names, by which the tracer tells what runs beside the computation.
    """
    make_mesh, make_streams = engine.init_device_mesh, FSDPCommContext.lazy_init
    make_smaller_mesh = _fully_shard._get_post_forward_mesh_info

    def real_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily(), _disable_current_modes():
            return make_mesh(*args, **kwargs)

    def real_smaller_mesh(*args: Any) -> Any:
        with unset_fake_temporarily(), _disable_current_modes():
            return make_smaller_mesh(*args)

    def named_streams(context: Any, *args: Any) -> None:
        make_streams(context, *args)
        for name, value in vars(context).items():
            if isinstance(value, torch.cpu.Stream):
                value.name = name.removesuffix("_stream")  # type: ignore[attr-defined]

    with (
        mock.patch.object(engine, "init_device_mesh", real_mesh),
        mock.patch.object(_fully_shard, "_get_post_forward_mesh_info", real_smaller_mesh),
        mock.patch.object(FSDPCommContext, "lazy_init", named_streams),
    ):
        yield
