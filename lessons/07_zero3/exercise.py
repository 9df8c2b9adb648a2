"""Lesson 7, ZeRO-3. Write the six functions; `shardrun lesson check 7` starts the ranks for you."""

import torch  # noqa: F401
import torch.distributed as dist  # noqa: F401
from torch import Tensor


def rank_bytes(parameters: int, ranks: int) -> float:
    """Bytes of model states on a rank under ZeRO-3 with AdamW, between steps, as the ZeRO paper counts them.

    bf16 parameters and gradients; float32 master weights and two float32 moments. Without padding.
    """
    raise NotImplementedError


def wire_bytes(parameters: int, ranks: int, accumulation: int, keep: bool) -> float:
    """Bytes that one rank puts on the wire of a ring in one optimizer step of ZeRO-3; all of it in bf16.

    accumulation: micro-batches of a step; keep: gathered parameters stay from forward to backward, as DeepSpeed does
    with models of less than 10⁹ parameters; else they are let go after forward and gathered again.
    """
    raise NotImplementedError


def most_gathered(numels: list[int], ahead: int) -> int:
    """Elements of whole parameters at most at the same time, in a forward pass.

    numels: elements of the modules' parameters, in the order of their use; before a module begins, its parameters and
    those of the next `ahead` modules are gathered; after it its own are let go.
    """
    raise NotImplementedError


def cut(parameter: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's part of a parameter of any shape, as a new flat tensor.

    The parameter is flattened, filled up with zeros to a multiple of world_size, and cut into equal parts.
    """
    raise NotImplementedError


def whole(mine: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The parameter of that shape, from the parts of all ranks; mine: this rank's part, as `cut` makes it."""
    raise NotImplementedError


def linear_backward(x: Tensor, upstream: Tensor, mine: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The backward pass of y = x · Wᵀ under ZeRO-3.

    x: this rank's input, float32 [rows, inputs]; upstream: the loss's gradient with respect to y, float32
    [rows, outputs]; mine: this rank's part of W, whose shape is [outputs, inputs], as `cut` makes it. Returns the
    gradient of x, [rows, inputs], and this rank's part of the mean over all ranks of the gradient of W, cut like W.
    """
    raise NotImplementedError
