"""Saying that tensors are there which no dispatch mode has seen being made.

Compiled code allocates past torch's dispatcher. Whoever calls it announces what came out, and the ledger's modes (the
tracer, the recorder of activations) take it down as if an operator had made it. They know it by its name, `UNSEEN` in
strategies/ledger/tracer.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("shardrun::made_unseen", mutates_args=())
def made_unseen(tensors: Sequence[Tensor]) -> None:
    """These may be new. Those that a mode knows already, it leaves as they are."""


@made_unseen.register_fake
def _(tensors: Sequence[Tensor]) -> None:
    pass
