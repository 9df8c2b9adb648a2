"""The capstone of lesson 7: ZeRO-3, written by you, in the real trainer.

    shardrun lesson check 7 my_zero3  # how far it is: right, right bytes, overlapped, and with Muon
    shardrun lesson hint 7 my_zero3  # the next hint for the level that you are at
    shardrun compare --with learning/07_zero3/my_zero3.py  # trained beside DeepSpeed's ZeRO-3 and the others

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

LIKE = "zero3"


class MyZero3:
    """A rank keeps a cut of every parameter; a module's are whole from just before it runs until just after."""

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
        """Of one micro-batch; loss is divided by their number. Every micro-batch is reduced and added up."""
        raise NotImplementedError

    def wait(self) -> None:
        """Until all gradients are on the ranks that update them: the mean, summed over the micro-batches."""
        raise NotImplementedError

    def parts(self) -> list[Portion]:
        """What this rank updates: Portion(parameter, first element, weight, gradient), flat views, not copies.

        Each element of each parameter belongs to one rank. Of a parameter a rank has one interval, or nothing.
        """
        raise NotImplementedError

    def norm(self) -> Tensor:
        """The L2 norm of the mean gradient of the whole model, the same on all ranks."""
        raise NotImplementedError

    def update(self) -> None:
        """One step of every group's rule on this rank's elements; the next forward pass gathers them.

        Muon (rule.whole_matrix): `accumulate` works on any elements, `transform` needs the whole matrix.
        """
        raise NotImplementedError

    def clear(self) -> None:
        """Forget the gradients: a step ends, or is left out."""
        raise NotImplementedError

    def held(self) -> dict[str, list[Tensor]]:
        """All tensors that this rank keeps now: "parameters", "master parameters" (a copy of what it updates, if you
        keep one), "gradients", "communication buffers", "optimizer states".

        A view stands for all of the memory behind it, which is counted once.
        """
        raise NotImplementedError
