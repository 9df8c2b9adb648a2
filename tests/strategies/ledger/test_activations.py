"""The measured account against hand counts, autograd's own graph and what backward frees."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from speedrun.config import ModelConfig
from speedrun.model import GPT
from strategies.ledger.activations import WEIGHT_CASTS, SavedTensor, measure_activations

N, WIDTH, HIDDEN = 10, 8, 32


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def short(rows: tuple[SavedTensor, ...]) -> list[tuple[str, str, str, int]]:
    return [(row.module, row.operator, row.kernel, row.bytes) for row in rows]


def test_what_two_functions_keep_counts_once_for_the_first_and_inputs_and_parameters_never() -> None:
    model, x = MLP(), torch.randn(N, WIDTH)
    book = measure_activations(model, lambda: model(x))
    # relu keeps its output and `down` its input: the same tensor. `up` keeps x: an input.
    assert short(book.rows) == [("", "relu", "relu", 4 * N * HIDDEN)]
    # When relu runs, its input is still there.
    assert short(book.peak_rows) == [("up", "linear", "addmm", 4 * N * HIDDEN), ("", "relu", "relu", 4 * N * HIDDEN)]
    assert (book.total, book.peak) == (4 * N * HIDDEN, 8 * N * HIDDEN)


def test_parts_layers_and_the_largest() -> None:
    model = nn.Sequential(MLP(), MLP())
    x = torch.randn(N, WIDTH)
    book = measure_activations(model, lambda: model(x), lambda module, operator, kernel: operator)
    assert book.by_part() == {"relu": 8 * N * HIDDEN, "linear": 4 * N * WIDTH}
    assert book.by_module() == {"0": 4 * N * HIDDEN, "1": 4 * N * HIDDEN, "1.up": 4 * N * WIDTH}
    assert book.largest(1) == [("relu", 8 * N * HIDDEN)]


def test_views_and_operations_in_place_are_no_new_memory_and_a_freed_tensor_is_gone() -> None:
    weight = nn.Parameter(torch.randn(N))
    model = nn.ParameterList([weight])

    def forward() -> Tensor:
        a = weight * 2
        a.add_(1)
        b = a.view(2, N // 2).t().exp()  # keeps its result
        del a
        return (b * 3).sum()

    book = measure_activations(model, forward)
    assert short(book.rows) == [("", "exp", "exp", 4 * N)]
    assert book.peak == 8 * N + 4  # exp, times 3 and their sum, or two before: never three tensors of N


def test_checkpoints_keep_inputs_and_selective_ones_their_cache() -> None:
    model, x = MLP(), torch.randn(N, WIDTH)

    def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operator == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def run(**options: Any) -> Tensor:
        return checkpoint(model, x * 1, use_reentrant=False, **options)

    book = measure_activations(model, run)
    assert short(book.rows) == [("", "checkpoint", "mul", 4 * N * WIDTH)]
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    book = measure_activations(model, lambda: run(context_fn=contexts).sum())
    assert short(book.rows) == [
        ("", "checkpoint", "mul", 4 * N * WIDTH),
        ("up", "linear", "addmm", 4 * N * HIDDEN),
        ("down", "linear", "addmm", 4 * N * WIDTH),
    ]


def test_autocast_copies_of_weights_stand_on_a_line_of_their_own() -> None:
    model, x = MLP(), torch.randn(N, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        book = measure_activations(model, lambda: model(x))
    assert book.by_part()[WEIGHT_CASTS] == 2 * sum(p.numel() for p in model.parameters())
    assert book.total - book.by_part()[WEIGHT_CASTS] == 2 * N * WIDTH + 2 * N * HIDDEN  # x cast, relu's output


def test_backward_frees_all_of_it() -> None:
    model, x = MLP(), torch.randn(N, WIDTH)

    def forward_and_backward() -> None:
        for gradient in torch.autograd.grad(model(x).sum(), model.parameters()):
            del gradient

    assert measure_activations(model, forward_and_backward).rows == ()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def test_functions_of_ones_own_are_named() -> None:
    weight = nn.Parameter(torch.randn(N))
    book = measure_activations(nn.ParameterList([weight]), lambda: Square.apply(weight * 3))
    assert short(book.rows) == [("", "Square", "mul", 4 * N)]


def saved_by_graph(loss: Tensor, known: set[int]) -> int:
    """Bytes of the distinct storages that the nodes of the autograd graph hold."""
    seen, storages, stack = set(), {}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += getattr(node, "saved_tensors", ())  # of an autograd.Function, as the squared ReLU is
        for tensor in saved:
            if not isinstance(tensor, Tensor):
                continue
            if tensor.dtype != torch.float64:  # the softcap, a Python number
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(size for key, size in storages.items() if key not in known)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_total_is_what_the_nodes_of_the_graph_hold(norm: Any) -> None:
    model = GPT(ModelConfig(layers=2, width=32, heads=2, norm=norm, zero_init_projections=False), document_start=0)
    tokens = torch.randint(0, 257, (2, 20))
    known = {t.untyped_storage().data_ptr() for t in (tokens, *model.parameters())}
    expected = saved_by_graph(model(tokens, tokens), known)
    assert measure_activations(model, lambda: model(tokens, tokens)).total == expected > 100_000


@pytest.fixture
def one_rank() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parameters_that_fsdp_gathers_are_not_activations(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    config = ModelConfig(layers=2, width=32, heads=2, tied_head=True)
    tokens = torch.randint(0, 257, (2, 20))
    plain = GPT(config).bfloat16()
    expected = measure_activations(plain, lambda: plain(tokens, tokens))
    model = GPT(dataclasses.replace(config))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    book = measure_activations(model, lambda: model(tokens, tokens))
    assert book.by_part() == expected.by_part()
