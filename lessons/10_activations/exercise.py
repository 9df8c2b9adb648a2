"""Lesson 10, Activations. Write the six functions; `shardrun lesson check 10` says what is right."""

from typing import Any

from torch import Tensor, nn


def layer_bytes(rows: int, length: int, width: int, heads: int, fused: bool) -> float:
    """Bytes that one transformer layer keeps for backward in 16 bits, as Korthikanti et al. count (dropout included).

    fused: attention is fused (flash and its like) and never stores a row's scores [heads, length, length].
    """
    raise NotImplementedError


def checkpointed_bytes(layers: int, rows: int, length: int, width: int) -> float:
    """Bytes of activations at the peak of backward if every layer is checkpointed; 16 bits, fused attention.

    Of the same layers as above; embedding, head and loss are left out.
    """
    raise NotImplementedError


def fit_rows(rows: int, per_row: float, rest: float, room: float) -> tuple[int, int]:
    """(micro_batch, accumulation): the fewest micro-batches in which a rank's `rows` can be taken.

    per_row: bytes of activations of one row; rest: bytes of all that does not depend on rows; room: bytes of the GPU.
    Micro-batches are equally large. Raises ValueError where not even one row fits.
    """
    raise NotImplementedError


def checkpoint(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which autograd keeps nothing but x; backward calls the block a second time.

    x: float32, any shape, requires grad. Gradients reach x and the block's parameters as without checkpointing (in the
    parameters' .grad). The block draws no random numbers. Without torch.utils.checkpoint.
    """
    raise NotImplementedError


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy of the logits hidden · weightᵀ, of which there are never more than `chunk` rows at once.

    hidden: float32 [tokens, width]; weight: float32 [vocabulary, width]; targets: int64 [tokens]; chunk: may not divide
    tokens. Neither forward nor backward may hold, or keep for later, more logits than that.
    torch.utils.checkpoint is allowed.
    """
    raise NotImplementedError


def self_ms(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds by operator, without the time of the operators that it called: "where did the time go?".

    events: traceEvents of a trace of torch.profiler, in any order. Operators have ph "X" and cat "cpu_op", and name, ts
    (start) and dur in microseconds, and tid; other events are not asked for. One operator was called by another if it
    lies within it, on the same tid. (Those that it called in turn are the other's business.)
    """
    raise NotImplementedError
