"""DDP by hand: buckets, overlap and accumulation. The capstone's solution; my_ddp.py has the interface in words.

    ddp = HandDDP(model, groups)
    for i, batch in enumerate(micro_batches):
        ddp.backward(model(batch) / len(micro_batches), last=i == len(micro_batches) - 1)
    ddp.wait()              # now every p.grad is the mean over all ranks
    ddp.norm()
    ddp.update()
    ddp.clear()

Tests train with it and hold the weights against one process, and the bytes against the books.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrun.own import Portion, new_state

LIKE = "ddp"


@dataclass
class Bucket:
    """Gradients that travel together: `flat` is their memory, every p.grad a view of it."""

    parameters: list[nn.Parameter]
    flat: Tensor
    missing: int
    work: dist.Work | None = None


class HandDDP:
    """Average a model's gradients over all ranks while backward is still running.

    model: the same architecture on every rank, float32; rank 0's weights are given to all. groups: as of an optimizer,
    each with its `rule`. bucket_bytes: of gradients that travel together. Every parameter must get a gradient.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], bucket_bytes: int = 2**18) -> None:
        self.model, self.groups, self.last = model, groups, True
        self.observe: Callable[[str, Bucket | None], None] = lambda event, bucket: None
        """Told of what happens, and when."""
        self.states: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.buckets: list[Bucket] = []
        for p in model.parameters():
            dist.broadcast(p.data, 0)
        for parameters in self._share_out(list(model.parameters()), bucket_bytes):
            flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
            bucket = Bucket(parameters, flat, len(parameters))
            for p, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = view.view_as(p)  # backward adds into the bucket: no copy, no second set of gradients
                p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._arrived(bucket))
            self.buckets.append(bucket)

    def _share_out(self, parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
        buckets: list[list[nn.Parameter]] = [[]]
        for p in reversed(parameters):  # about the order in which backward makes their gradients
            if buckets[-1] and 4 * sum(q.numel() for q in [*buckets[-1], p]) > bucket_bytes:
                buckets.append([])
            buckets[-1].append(p)
        return buckets

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; gradients add up in the buckets, which are sent in the last one."""
        self.last = last
        loss.backward()

    def _arrived(self, bucket: Bucket) -> None:
        """A gradient of this bucket is complete; if it was the last one, send the bucket off and go on."""
        self.observe("arrived", bucket)
        bucket.missing -= self.last
        if self.last and not bucket.missing:
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
            self.observe("sent", bucket)

    def wait(self) -> None:
        """Wait for what is under way, and turn sums into means. Raises RuntimeError where a gradient is missing."""
        self.observe("waiting", None)
        for bucket in self.buckets:
            if bucket.work is None:
                raise RuntimeError(f"{bucket.missing} parameters of a bucket got no gradient in the last micro-batch.")
            bucket.work.wait()
            bucket.flat /= dist.get_world_size()
            bucket.missing, bucket.work = len(bucket.parameters), None
        self.observe("finished", None)

    def parts(self) -> list[Portion]:
        """Everything, on every rank."""
        return [Portion(p, 0, p.data.view(-1), p.grad.view(-1)) for p in self.model.parameters()]

    def norm(self) -> Tensor:
        """Every rank has all gradients: nothing to send."""
        return torch.stack([bucket.flat.square().sum() for bucket in self.buckets]).sum().sqrt()

    def update(self) -> None:
        """The same on every rank, out of the same gradients."""
        for group in self.groups:
            rule, parameters = group["rule"], group["params"]
            for p in parameters:
                if p not in self.states:
                    self.states[p] = new_state(rule, p.data)
            gradients, states = [p.grad for p in parameters], [self.states[p] for p in parameters]
            if not rule.whole_matrix:
                rule.step([p.data for p in parameters], gradients, states, group)
                continue
            rule.accumulate(gradients, states, group)
            for p, gradient in zip(parameters, gradients, strict=True):
                rule.apply(p.data, rule.transform(gradient[None], group)[0], group)

    def clear(self) -> None:
        """Clear the buckets. (Setting p.grad to None, as optimizers do, would cut it from its bucket.)"""
        for bucket in self.buckets:
            bucket.flat.zero_()

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        return {
            "parameters": list(self.model.parameters()),
            "gradients": [bucket.flat for bucket in self.buckets],
            "optimizer states": [tensor for state in self.states.values() for tensor in state.values()],
        }
