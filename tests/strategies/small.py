"""What the tests of strategies share: a strategy over the ranks, and a small model whose sizes divide by nothing."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardrun.certify.equivalence import Case
from speedrun.model import GPT
from speedrun.optim.policy import ParameterGroup, parameter_groups
from strategies import catalogue
from strategies.base import Precision, Settings, Strategy
from strategies.mesh import Place
from strategies.zero.engine import import_deepspeed

STRATEGIES = catalogue.spread()


def place() -> Place:
    return Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def make(name: str, precision: Precision = "fp32", engine: dict[str, Any] | None = None, **zero: Any) -> Strategy:
    """A strategy on CPU over the ranks of this process's group; engine: further settings; zero: of DeepSpeed's
    zero_optimization.
    """
    settings: dict[str, Any] = {}
    if name.startswith(("fsdp", "hsdp")):
        settings = {"reshard_after_forward": name != "fsdp_no_reshard", "wrap": ["Block"]}
    if name == "hsdp":
        settings["replicas"] = 2
    settings |= engine or {}
    if name.startswith("zero"):
        if precision == "fp16":
            allow_fp16()
        settings |= {"zero_optimization": {"stage": int(name[-1]), **zero}}
    return catalogue.engine(name.partition("_")[0], Settings(place(), precision, settings))


def allow_fp16() -> None:
    """Patch DeepSpeed's check of the device, for this process: it refuses fp16 on processors without AVX512_FP16, which
    torch emulates there. Nothing else of DeepSpeed is touched."""
    import_deepspeed(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def build(case: Case) -> GPT:
    """The case's model, weights from its seed."""
    config = case.config()
    model = GPT(config.model, document_start=256)
    model.init_weights(config.seed)
    return model


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in build(case).named_parameters()}


def recipe_of(case: Case) -> list[ParameterGroup]:
    return parameter_groups(shapes_of(case), case.config().optimizer)


def prepared(strategy: Strategy, case: Case, recipe: list[ParameterGroup] | None = None) -> Strategy:
    """The strategy with the case's model, which no rank builds, and its optimizer."""
    config = case.config()
    with torch.device("meta"):
        model = GPT(config.model, document_start=256)
    recipe = recipe or recipe_of(case)
    strategy.prepare(model, recipe, config.optimizer.clip, case.accumulation, model.initial(config.seed))
    return strategy


def batch(step: int, rank: int, rows: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, int64 [rows, length], different for every step and rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, 256, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def forward_backward(strategy: Strategy, step: int, last: bool = True) -> None:
    """One micro-batch."""
    with strategy.micro_batch(last=last):
        strategy.backward(strategy.model(*batch(step, dist.get_rank())))
