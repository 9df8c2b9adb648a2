"""DDP by hand: buckets, overlap and accumulation in about forty lines.

    ddp = HandDDP(model)
    for i, batch in enumerate(micro_batches):
        ddp.sync = i == len(micro_batches) - 1
        (model(batch) / len(micro_batches)).backward()
    ddp.finish()            # now every p.grad is the mean over all ranks
    optimizer.step()
    ddp.zero_grad()

A test trains with it and holds the weights against one process, and the bytes against the books.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class Bucket:
    """Gradients that travel together: `flat` is their memory, every p.grad a view of it."""

    parameters: list[nn.Parameter]
    flat: Tensor
    missing: int
    work: dist.Work | None = None


class HandDDP:
    """Average a model's gradients over all ranks while backward is still running.

    model: the same architecture on every rank, float32; rank 0's weights are given to all. sync: set it to False for
    micro-batches whose gradients are only added up (torch's no_sync). Every parameter must get a gradient.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int = 25 * 2**20) -> None:
        self.model, self.sync = model, True
        self.observe: Callable[[str, Bucket | None], None] = lambda event, bucket: (
            None
        )  # told of what happens, and when
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

    def _arrived(self, bucket: Bucket) -> None:
        """A gradient of this bucket is complete; if it was the last one, send the bucket off and go on."""
        self.observe("arrived", bucket)
        bucket.missing -= self.sync
        if self.sync and not bucket.missing:
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
            self.observe("sent", bucket)

    def finish(self) -> None:
        """Wait for what is under way, and turn sums into means. Raises RuntimeError where a gradient is missing."""
        self.observe("waiting", None)
        for bucket in self.buckets:
            if bucket.work is None:
                raise RuntimeError(f"{bucket.missing} parameters of a bucket got no gradient in the last micro-batch.")
            bucket.work.wait()
            bucket.flat /= dist.get_world_size()
            bucket.missing, bucket.work = len(bucket.parameters), None
        self.observe("finished", None)

    def zero_grad(self) -> None:
        """Clear the buckets. (Setting p.grad to None, as optimizers do, would cut it from its bucket.)"""
        for bucket in self.buckets:
            bucket.flat.zero_()
