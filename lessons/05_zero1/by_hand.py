"""ZeRO-1 by hand: each rank computes whole gradients, keeps AdamW's state of a slice, updates it, and gathers the rest.

    zero = HandZero1(model, groups, clip=1.0)
    for batch in micro_batches:
        zero.backward(model(batch) / len(micro_batches), last=batch is micro_batches[-1])
        # after the last one: all-reduce the gradients; keep those that this rank's slices need
    zero.step()  # clip, update the slices, all-gather the parameters

As DeepSpeed lays it out, in float32: the parameters of a group lie in one flat buffer, padded to a multiple of 2 · N,
and the slice that a rank updates is a copy of its part ("master" weights: in bf16 the copy is what has the precision).
A test trains with it and holds the weights against one process, and the bytes against the books.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class Slice:
    """One group's flat buffer, whole on every rank, and this rank's slice of it."""

    parameters: list[nn.Parameter]
    flat: Tensor
    master: nn.Parameter
    gradient: list[Tensor]
    """After reduce(): views of the gradients that make up the slice, in order, and zeros for its padding."""


class HandZero1:
    """Shard AdamW over all ranks.

    model: the same architecture on every rank, float32; rank 0's weights are given to all. groups: for each a
    dictionary with `params`, a list of parameters, and torch.optim.AdamW's options; clip: the largest global norm.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], clip: float) -> None:
        self.model, self.clip = model, clip
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.slices = [self._flatten(group["params"]) for group in groups]
        self.optimizer = torch.optim.AdamW(
            [{**group, "params": [s.master]} for group, s in zip(groups, self.slices, strict=True)]
        )

    def _flatten(self, parameters: list[nn.Parameter]) -> Slice:
        total = sum(p.numel() for p in parameters)
        part = math.ceil(total / (2 * self.world_size)) * 2
        flat = torch.zeros(part * self.world_size, device=parameters[0].device)
        offset = 0
        for p in parameters:
            view = flat[offset : offset + p.numel()].view_as(p)
            p.data = view.copy_(p.data)  # the model computes with the buffer: gathering it updates the model
            offset += p.numel()
        dist.broadcast(flat, 0)
        return Slice(parameters, flat, nn.Parameter(flat.chunk(self.world_size)[self.rank].clone()), [])

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; gradients add up, whole, and are reduced after the last one."""
        loss.backward()
        if last:
            self.reduce()

    def reduce(self) -> None:
        """Average all gradients over the ranks (DeepSpeed does it in buckets), and drop those of other ranks' slices.

        Raises RuntimeError where a parameter has no gradient.
        """
        for s in self.slices:
            part, offset = s.master.numel(), 0
            for p in s.parameters:
                if p.grad is None:
                    raise RuntimeError(f"A parameter of shape {tuple(p.shape)} got no gradient.")
                dist.all_reduce(p.grad)
                start = max(self.rank * part - offset, 0)
                stop = min((self.rank + 1) * part - offset, p.numel())
                if start < stop:
                    p.grad /= self.world_size
                    s.gradient.append(p.grad.view(-1)[start:stop])  # a view: all of p.grad stays
                else:
                    p.grad = None
                offset += p.numel()
            if padding := part - sum(piece.numel() for piece in s.gradient):
                s.gradient.append(torch.zeros(padding, device=s.flat.device))

    def step(self) -> None:
        """Clip by the global norm, update this rank's slices, and gather everybody's."""
        square = torch.stack([piece.square().sum() for s in self.slices for piece in s.gradient]).sum()
        dist.all_reduce(square)  # norms do not add up over the ranks, squares do
        scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for s in self.slices:
            s.master.grad = torch.cat(s.gradient) * scale
            s.gradient = []
            for p in s.parameters:
                p.grad = None
        self.optimizer.step()
        for s in self.slices:
            s.master.grad = None
            dist.all_gather(list(s.flat.chunk(dist.get_world_size())), s.master.data)

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        return {
            "parameters": [s.flat for s in self.slices],
            "master parameters": [s.master.data for s in self.slices],
            "gradients": [piece for s in self.slices for piece in s.gradient],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }

    def full_weights(self) -> dict[str, Tensor]:
        """Name → a copy of the whole parameter on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}
