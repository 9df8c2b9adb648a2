"""This GPT's own kernels on tensors without data, for strategies.forecast.simulate: what they save and hold inside.

The fused operators of speedrun/kernels run as they are (torch asks them for shapes alone), and FlexAttention stands in
for itself (speedrun/model/flex.py). So does torch's variable-length attention, and for FlashAttention-3 too, which
saves the same: q, k, v, the output, a log-sum-exp and where documents begin.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import speedrun.kernels
import speedrun.kernels.fp8_linear as fp8_linear
import speedrun.model.attend as attend
import speedrun.model.gpt as gpt
import speedrun.model.masks as masks
from speedrun.books import fp8
from speedrun.books.activations import fused_loss_inside
from speedrun.books.kernels import Kernels
from strategies.errors import UserError
from strategies.forecast.simulate import StandIns


def stand_ins(kernels: Kernels) -> StandIns:
    """For a run with these kernels. The model must ask for them: `model.kernels` triton or torch, not auto.

    Raises ValueError where Triton, which the fused operators are defined with, is not installed here.
    """
    if kernels.triton and not speedrun.kernels.INSTALLED:
        raise UserError("a simulation with Triton's kernels needs Triton, which is not installed here.")
    return StandIns(lambda: _patches(kernels), inside)


@contextmanager
def _patches(kernels: Kernels) -> Iterator[None]:
    with ExitStack() as stack:
        # Triton's interpreter takes CPU tensors; without data nothing is interpreted.
        stack.enter_context(mock.patch.object(speedrun.kernels, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(gpt, "where", lambda device, dtype: kernels.where))
        stack.enter_context(mock.patch.object(masks, "document_lengths", _document_lengths))
        stack.enter_context(mock.patch.object(attend, "flash_function", lambda: _flash))
        stack.enter_context(mock.patch.object(fp8_linear, "choose_way", lambda kernels, device: "scaled_mm"))
        yield


def _document_lengths(documents: Tensor | None, batch: int, time: int, device: torch.device) -> Tensor:
    """As if every row were one document: how many there are only data says."""
    return torch.empty(batch + 1, dtype=torch.int32, device=device)


def _flash(*rows_and_ends: Any, softmax_scale: float | None, causal: bool, window_size: tuple[int, int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    y = varlen_attn(*rows_and_ends, scale=softmax_scale, window_size=window_size)
    assert isinstance(y, Tensor)
    return y


def inside(operator: str, arguments: Sequence[Any]) -> list[int]:
    """Bytes of every tensor that an operator of ours holds inside, where it holds most."""
    if operator == "cross_entropy_and_gradients":
        hidden, weight, *_, in_fp8 = arguments
        (tokens, width), rows, size = hidden.shape, weight.shape[0], hidden.element_size()
        held = fused_loss_inside(tokens, rows, width, size, weight.dtype != hidden.dtype, in_fp8)
        return [bytes for _, bytes in held]
    if operator.startswith("fp8_") and arguments[-1] == "scaled_mm":  # emulated it is a CPU's, where nobody asks
        return fp8_inside(operator, arguments)
    return []


def fp8_inside(operator: str, arguments: Sequence[Any]) -> list[int]:
    """The same of FP8's operators by plain torch (speedrun/kernels/fp8.py): two float32 copies of what is quantised;
    the product before its ReLU is squared, and the ReLU.
    """
    first, second = arguments[:2]
    if operator in ("fp8_quantize", "fp8_quantize_delayed"):
        return [fp8.QUANTIZING * first.numel()]
    if operator == "fp8_linear" and arguments[6]:
        return [2 * first.shape[0] * second.shape[0] * first.element_size()]
    return []
