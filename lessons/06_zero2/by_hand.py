"""ZeRO-2 by hand: gradients go to the rank that needs them while backward still runs, and are freed at once.

    zero = HandZero2(model, groups, clip=1.0)
    for i, batch in enumerate(micro_batches):
        zero.backward(model(batch) / len(micro_batches), last=i == len(micro_batches) - 1)
    zero.step()             # clip, update the slices, all-gather the parameters

Flat buffers, slices and the update are lesson 5's. New: a gradient that is complete goes into a bucket; a full bucket
is cut by owners, each owner gets its part reduced, and the gradients are let go but for this rank's part. With nowhere
to keep whole gradients, that has to happen in every micro-batch. As DeepSpeed does it with
`use_multi_rank_bucket_allreduce: false`, in float32. A test holds the weights against one process, and the bytes
against the books.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class Group:
    """One group's flat buffer, whole on every rank, and this rank's slice of it."""

    parameters: list[nn.Parameter]
    flat: Tensor
    master: nn.Parameter


class HandZero2:
    """Shard AdamW and gradients over all ranks.

    model: the same architecture on every rank, float32; rank 0's weights are given to all. groups: for each a
    dictionary with `params`, a list of parameters, and torch.optim.AdamW's options; clip: the largest global norm;
    bucket: elements of gradients that wait for each other. Every parameter must get a gradient.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], clip: float, bucket: int = 2**17) -> None:
        self.model, self.clip, self.bucket_size = model, clip, bucket
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.bucket: list[nn.Parameter] = []
        self.owners: dict[nn.Parameter, list[tuple[int, int, int]]] = {}  # (owner, start, stop) of its elements
        self.mine: dict[nn.Parameter, Tensor] = {}  # this rank's part of the mean gradient, summed over micro-batches
        self.padding: list[Tensor] = []
        self.groups = [self._flatten(group["params"]) for group in groups]
        self.optimizer = torch.optim.AdamW(
            [{**group, "params": [g.master]} for group, g in zip(groups, self.groups, strict=True)]
        )

    def _flatten(self, parameters: list[nn.Parameter]) -> Group:
        total = sum(p.numel() for p in parameters)
        part = math.ceil(total / (2 * self.world_size)) * 2
        flat = torch.zeros(part * self.world_size, device=parameters[0].device)
        offset = 0
        for p in parameters:
            p.data = flat[offset : offset + p.numel()].view_as(p).copy_(p.data)
            first, last = offset // part, (offset + p.numel() - 1) // part
            cuts = [
                (r, max(r * part - offset, 0), min((r + 1) * part - offset, p.numel())) for r in range(first, last + 1)
            ]
            self.owners[p] = cuts
            p.register_post_accumulate_grad_hook(self._arrived)
            offset += p.numel()
        dist.broadcast(flat, 0)
        return Group(parameters, flat, nn.Parameter(flat.chunk(self.world_size)[self.rank].clone()))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; gradients are on their owners when it returns."""
        loss.backward()
        self._reduce_bucket()  # what did not fill a bucket any more
        if last:
            for g in self.groups:
                filled = sum(self.mine[p].numel() for p in g.parameters if p in self.mine)
                self.padding.append(torch.zeros(g.master.numel() - filled, device=g.flat.device))

    def _arrived(self, p: nn.Parameter) -> None:
        """A gradient is complete. Where the bucket has no room for it, those that wait go first."""
        if sum(q.numel() for q in self.bucket) + p.numel() > self.bucket_size:
            self._reduce_bucket()
        self.bucket.append(p)

    def _reduce_bucket(self) -> None:
        """Reduce to every owner its part of the bucket, keep this rank's, and let all the rest go."""
        parts: dict[int, list[Tensor]] = {}
        for p in self.bucket:
            for owner, start, stop in self.owners[p]:
                parts.setdefault(owner, []).append(p.grad.view(-1)[start:stop])
        for owner, pieces in sorted(parts.items()):
            message = torch.cat(pieces)
            dist.reduce(message, owner)  # blocks: afterwards nobody needs the gradients any more
            if owner == self.rank:
                message /= self.world_size
                for piece, mean in zip(pieces, message.split([len(piece) for piece in pieces]), strict=True):
                    piece.copy_(mean)
        for p in self.bucket:
            for owner, start, stop in self.owners[p]:
                if owner == self.rank and p in self.mine:
                    self.mine[p] += p.grad.view(-1)[start:stop]
                elif owner == self.rank:
                    self.mine[p] = p.grad.view(-1)[start:stop]  # a view: of a parameter that is cut, all stays
            p.grad = None
        self.bucket = []

    def step(self) -> None:
        """Clip by the global norm, update this rank's slices, and gather everybody's."""
        square = torch.zeros((), device=self.groups[0].flat.device)
        for piece in self.mine.values():
            square += piece.square().sum()
        dist.all_reduce(square)
        scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for g, padding in zip(self.groups, self.padding, strict=True):
            g.master.grad = torch.cat([*(self.mine[p] for p in g.parameters if p in self.mine), padding]) * scale
        self.mine, self.padding = {}, []
        self.optimizer.step()
        for g in self.groups:
            g.master.grad = None
            dist.all_gather(list(g.flat.chunk(self.world_size)), g.master.data)

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        waiting = [p.grad for p in self.owners if p.grad is not None]
        return {
            "parameters": [g.flat for g in self.groups],
            "master parameters": [g.master.data for g in self.groups],
            "gradients": [*self.mine.values(), *self.padding, *waiting],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }

    def full_weights(self) -> dict[str, Tensor]:
        """Name → a copy of the whole parameter on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}
