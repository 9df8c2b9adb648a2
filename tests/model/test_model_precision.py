"""Every kind of mixed precision that the strategies use runs, and stays near float64."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from speedrun.config import ModelConfig
from speedrun.model import GPT

MODERN = ModelConfig(layers=2, width=32, heads=2, zero_init_projections=False)
GPT2 = dataclasses.replace(MODERN, positions="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False, softcap=0.0)
CONFIGS = pytest.mark.parametrize(
    "config",
    [MODERN, dataclasses.replace(MODERN, positions="rope", tied_head=True), GPT2],
    ids=["half_rope", "rope", "gpt2"],
)
TIME = 600  # far enough for RoPE tables in bfloat16 to be wrong by whole radians


def make(config: ModelConfig) -> tuple[GPT, Tensor, Tensor]:
    model = GPT(config, document_start=256)
    model.init_weights(1)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))  # logits worth comparing
    tokens = torch.randint(0, 256, (2, TIME + 1), generator=torch.Generator().manual_seed(2))
    tokens[0, 0] = tokens[1, 5] = 256
    return model, tokens[:, :-1], tokens[:, 1:]


def double(model: GPT) -> GPT:
    twin = GPT(model.config, document_start=model.document_start).double()
    twin.load_state_dict(model.state_dict())
    return twin


def assert_close(loss: Tensor, model: GPT, expected_loss: Tensor, expected_model: GPT) -> None:
    """The loss within 0.3 %, every matrix's gradient within 5 % in norm (a bias's is a sum of much that cancels)."""
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, rtol=3e-3, atol=0)
    for name, parameter in model.named_parameters():
        gradient, expected = parameter.grad, expected_model.get_parameter(name).grad
        assert gradient is not None and expected is not None
        if parameter.ndim == 2:
            error = (gradient.double() - expected).norm() / expected.norm()
            assert error < 0.05, f"{name}: {error:.3f}"


@CONFIGS
def test_autocast_bfloat16_is_close_to_float64(config: ModelConfig) -> None:
    model, tokens, targets = make(config)
    reference = double(model)
    expected = reference(tokens, targets)
    expected.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, targets)
        assert model(tokens).dtype == torch.float32
    loss.backward()
    assert_close(loss, model, expected, reference)


@CONFIGS
def test_parameters_in_bfloat16_are_close_to_float64_on_the_same_values(config: ModelConfig) -> None:
    model, tokens, targets = make(config)
    model.bfloat16()
    reference = double(model)
    expected = reference(tokens, targets)
    expected.backward()
    loss = model(tokens, targets)
    loss.backward()
    assert_close(loss, model, expected, reference)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@CONFIGS
def test_fsdp2_in_bfloat16_equals_the_model_in_bfloat16(config: ModelConfig, one_rank: None) -> None:
    """fully_shard casts parameters and every float argument of a block; the outcome must be that of `.bfloat16()`."""
    model, tokens, targets = make(config)
    plain = GPT(config, document_start=256)
    plain.load_state_dict(model.state_dict())
    plain.bfloat16()
    expected = plain(tokens, targets)
    expected.backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    loss = model(tokens, targets)
    loss.backward()
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        gradient, expected_gradient = parameter.grad, plain.get_parameter(name).grad
        assert isinstance(gradient, DTensor) and expected_gradient is not None
        torch.testing.assert_close(gradient.full_tensor(), expected_gradient.float(), rtol=0, atol=0)
