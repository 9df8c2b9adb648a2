"""Checkpointing changes what is kept, never what is computed: bit for bit, under every strategy."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shardrun.certify.equivalence import Case, Trace, run_strategy
from speedrun.config import Config, ModelConfig
from speedrun.model import GPT
from strategies import catalogue
from strategies.base import Settings, Strategy
from strategies.mesh import Place
from tests.ranks import RankPool

START = 0
MODERN = ModelConfig(vocab_size=31, layers=2, heads=2, width=32, mlp_width=64, zero_init_projections=False)
GPT2 = dataclasses.replace(
    MODERN, positions="learned", mlp="gelu", norm="layer", qk_norm=False, bias=True, tied_head=True, softcap=0.0
)
KINDS = pytest.mark.parametrize("kind", ["block", "selective"])
CONFIGS = pytest.mark.parametrize("config", [MODERN, GPT2], ids=["modern", "gpt2"])


def make(config: ModelConfig, kind: str) -> tuple[GPT, Tensor, Tensor]:
    model = GPT(dataclasses.replace(config, checkpointing=kind), document_start=START)
    model.init_weights(1)
    tokens = torch.randint(1, 31, (2, 25), generator=torch.Generator().manual_seed(2))
    tokens[0, 7] = tokens[1, 20] = START
    return model, tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(config: ModelConfig, kind: str, autocast: bool = False) -> list[Tensor]:
    model, tokens, targets = make(config, kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens, targets)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@KINDS
@CONFIGS
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_the_same_bits(config: ModelConfig, kind: str, autocast: bool) -> None:
    plain, checkpointed = (loss_and_gradients(config, k, autocast) for k in ("none", kind))
    assert len(plain) == len(checkpointed) == 1 + len(list(make(config, kind)[0].parameters()))
    for expected, got in zip(plain, checkpointed, strict=True):
        assert torch.equal(expected, got)


@KINDS
@torch.no_grad()
def test_without_gradients_nothing_is_different(kind: str) -> None:
    plain, tokens, _ = make(MODERN, "none")
    assert torch.equal(make(MODERN, kind)[0](tokens), plain(tokens))


@CONFIGS
def test_what_is_computed_again(config: ModelConfig) -> None:
    """FLOPs of matrix products and attention: per block all of the blocks' forward but its last product, selective none
    of it. (Backward stops computing again once it has all it needs: the last product's output is nobody's input.)"""

    def backward_flops(kind: str) -> int:
        model, tokens, targets = make(config, kind)
        loss = model(tokens, targets)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    model, tokens, targets = make(config, "none")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for block in model.blocks:
            block(torch.zeros(*tokens.shape, config.width))
    last_products = config.layers * 2 * tokens.numel() * config.mlp_width * config.width
    assert backward_flops("selective") == backward_flops("none")
    assert backward_flops("block") == backward_flops("none") + counter.get_total_flops() - last_products


@KINDS
def test_torch_compile_takes_it_in_one_graph(kind: str) -> None:
    plain = loss_and_gradients(MODERN, "none")
    model, tokens, targets = make(MODERN, kind)
    loss = torch.compile(model, backend="eager", fullgraph=True)(tokens, targets)
    loss.backward()
    for expected, got in zip(plain, [loss, *(p.grad for p in model.parameters())], strict=True):
        torch.testing.assert_close(got, expected)


@dataclass(frozen=True)
class Checkpointed(Case):
    kind: str = "none"

    def config(self) -> Config:
        config = super().config()
        return dataclasses.replace(config, model=dataclasses.replace(config.model, checkpointing=self.kind))


def make_strategy(name: str) -> Strategy:
    engine: dict[str, Any] = {}
    if name == "fsdp":
        engine = {"reshard_after_forward": True, "wrap": ["Block"]}
    if name.startswith("zero"):
        engine = {"zero_optimization": {"stage": int(name[-1])}}
    place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return catalogue.engine(name, Settings(place, "fp32", engine))


def train(name: str, case: Case) -> Trace:
    return run_strategy(case, make_strategy(name), dist.get_rank(), dist.get_world_size())


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_every_strategy_trains_the_same_weights(ranks: RankPool, name: str) -> None:
    for tied in (False, True):  # two models (see Case): the second has biases, which ZeRO-3 adds in place
        cases = [Checkpointed(accumulation=2, steps=3, tied=tied, kind=kind) for kind in ("none", "block", "selective")]
        plain, *others = (ranks.run(2, train, name, case)[0] for case in cases)
        for trace in others:
            assert trace.losses == plain.losses and trace.norms == plain.norms
            for parameter, weight in plain.weights.items():
                assert torch.equal(trace.weights[parameter], weight), parameter
