"""A few steps of a strategy that offloads, on fake GPUs: where every tensor that it holds lies."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from shardrun.certify.equivalence import Case
from strategies import catalogue
from strategies.base import Precision, Settings
from strategies.ledger.memory import measure_apart
from strategies.mesh import Place
from tests.fake_cuda.device import GPUS, fake_gpus
from tests.fake_cuda.engines import engines
from tests.strategies.small import batch, build, recipe_of

Devices = dict[str, dict[str, list[str]]]
"""Moment → category → the devices on which its tensors lie."""

HostBytes = dict[str, dict[str, int]]
"""Moment → category → bytes in host memory."""


def devices(name: str, engine: dict[str, Any], precision: Precision, case: Case) -> tuple[Devices, HostBytes]:
    """Of rank 0 of GPUS in its second step, of two micro-batches. What lies on the (fake) device has no bytes."""
    with warnings.catch_warnings(), fake_gpus(), engines(), _rank_0(name):
        warnings.simplefilter("ignore")
        return _train(name, engine, precision, case)


def _train(name: str, engine: dict[str, Any], precision: Precision, case: Case) -> tuple[Devices, HostBytes]:
    place = Place(0, GPUS, torch.device("cuda", 0))
    strategy: Any = catalogue.engine(name, Settings(place, precision, engine))
    model = build(case)
    if name.startswith("zero"):
        model.to(place.device)
    strategy.prepare(model, recipe_of(case), clip=1.0, accumulation=2)
    found: Devices = {}
    bytes: HostBytes = {}

    def look(moment: str) -> None:
        held = strategy.held()
        found[moment] = {category: _devices(tensors) for category, tensors in held.items() if tensors}
        bytes[moment] = measure_apart(held, {}, place.device)[1]

    look("after prepare")
    for step in range(2):
        for i in range(2):
            with strategy.micro_batch(last=i == 1):
                loss = strategy.model(*(tensor.to(place.device) for tensor in batch(step, 0)))
                look(f"after forward {i}")
                strategy.backward(loss)
        look("after backward")
        strategy.step()
        look("after step")
    return found, bytes


def _devices(tensors: list[Tensor]) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors if tensor.numel() and tensor.untyped_storage().nbytes()})


@contextlib.contextmanager
def _rank_0(name: str) -> Iterator[None]:
    """A process group whose collectives end at once."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  of fake tensors, for torch.ops.c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(GPUS), "LOCAL_WORLD_SIZE": str(GPUS)}
    with mock.patch.dict(os.environ, environment), contextlib.ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=GPUS)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(mock.patch.object(dist, "get_backend", lambda group=None: "nccl"))
        stack.enter_context(catalogue.fake(name))
        yield
