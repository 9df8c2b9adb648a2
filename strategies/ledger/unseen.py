"""Saying that tensors are there which no dispatch mode has seen being made.

Compiled code allocates past torch's dispatcher. Whoever calls it announces what came out, and the ledger's modes (the
tracer, the recorder of activations) take it down as if an operator had made it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "shardrun::made_unseen"


@torch.library.custom_op(NAME, mutates_args=())
def made_unseen(tensors: Sequence[Tensor]) -> None:
    """These may be new. Those that a mode knows already, it leaves as they are."""


@made_unseen.register_fake
def _(tensors: Sequence[Tensor]) -> None:
    pass
