"""The capstone of lesson 4: DDP, written by you, in the real trainer.

    shardrun lesson check 4 my_ddp  # how far it is: right, right bytes, overlapped, and with Muon
    shardrun lesson hint 4 my_ddp  # the next hint for the level that you are at
    shardrun compare --with learning/04_ddp/my_ddp.py  # trained beside torch's DDP and the others

This is what the trainer does with it in a step; all ranks do the same, each with rows of its own:

    for each micro-batch:
        loss = model(rows)
        backward(loss, last)            last: whether it is the last micro-batch of the step
    wait()                              from now on parts() has the mean gradients
    norm()                              then the trainer scales what parts() gives, in place, where it has to clip
    update()
    clear()

`wait`, `norm`, `update` and `clear` are called without autograd. A forward pass may also come alone: validation.
"""

from typing import Any

import torch.distributed as dist  # noqa: F401
from torch import Tensor, nn

from shardrun.own import Portion, new_state  # noqa: F401

LIKE = "ddp"
BUCKET = 2**18
"""Bytes of gradients that travel together, at most: small, so that a small model has several buckets."""


class MyDDP:
    """Every rank holds the whole model; the mean of all ranks' gradients is formed while backward still runs."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        """model: float32 parameters, which the trainer calls by itself. Rank 0's weights are the ones that count.
        Keep the parameters as objects: hooks go on them; what may change is p.data and p.grad.

        groups: as of an optimizer. Each has "params" (a list of parameters), "rule" and the rule's options. The trainer
        writes another "lr" into it before each step, so keep the groups, and no copy of them. A rule works in place, on
        lists that run in parallel; `state = new_state(rule, weight)`, made in the first update, is what it keeps of a
        weight:

            rule.step(weights, gradients, states, group)        AdamW, on any elements of a parameter
            rule.accumulate(gradients, states, group)           Muon (rule.whole_matrix): momentum, left in gradients;
            new = rule.transform(gradient[None], group)[0]      a whole matrix [rows, columns]
            rule.apply(weight, new, group)
        """
        raise NotImplementedError

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; loss is divided by their number. Gradients add up; in the last one they are sent."""
        raise NotImplementedError

    def wait(self) -> None:
        """Until all gradients are there: the mean over the ranks."""
        raise NotImplementedError

    def parts(self) -> list[Portion]:
        """What this rank updates, here all: Portion(parameter, 0, weight, gradient), flat views, not copies."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """The L2 norm of the mean gradient of the whole model, the same on all ranks."""
        raise NotImplementedError

    def update(self) -> None:
        """One step of every group's rule."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget the gradients: a step ends, or is left out."""
        raise NotImplementedError

    def held(self) -> dict[str, list[Tensor]]:
        """All tensors that this rank keeps now: "parameters", "gradients", "optimizer states".

        A view stands for all of the memory behind it, which is counted once.
        """
        raise NotImplementedError
