"""ZeRO-1 by hand: each rank computes whole gradients, keeps the state of a slice, updates it, and gathers the rest.

    zero = HandZero1(model, groups)
    for i, batch in enumerate(micro_batches):
        zero.backward(model(batch) / len(micro_batches), last=i == len(micro_batches) - 1)
    zero.wait()             # gradients are reduced; kept are those that this rank's slices need
    zero.norm()
    zero.update()           # update the slices, all-gather the parameters
    zero.clear()

The capstone's solution; my_zero1.py has the interface in words. As DeepSpeed lays it out, in float32: the parameters of
a group lie in one flat buffer, padded to a multiple of 2 · N, and the slice that a rank updates is a copy of its part
("master" weights: in bf16 the copy is what has the precision). A test trains with it and holds the weights against one
process, and the bytes against the books.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrun.own import Portion, new_state

LIKE = "zero1"


@dataclass
class Slice:
    """One group's flat buffer, whole on every rank, and this rank's slice of it."""

    group: dict[str, Any]
    flat: Tensor
    master: Tensor
    pieces: list[tuple[nn.Parameter, int, int]]
    """(parameter, first, stop): the elements that make up the slice, in order; its end may be padding."""
    state: dict[str, Tensor] = field(default_factory=dict)

    def cut(self, like_master: Tensor) -> list[Tensor]:
        """Views of the pieces in something that lies like the slice."""
        sizes = [stop - first for _, first, stop in self.pieces]
        return list(like_master[: sum(sizes)].split(sizes))


class HandZero1:
    """Shard the optimizer over all ranks.

    model: the same architecture on every rank, float32; rank 0's weights are given to all. groups: as of an optimizer,
    each with its `rule`. Every parameter must get a gradient.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        self.model, self.last = model, False
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.works: list[dist.Work] = []
        self.slices = [self._flatten(group) for group in groups]
        self.needed = {p for s in self.slices for p, _, _ in s.pieces}
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self._arrived)

    def _flatten(self, group: dict[str, Any]) -> Slice:
        parameters = group["params"]
        total = sum(p.numel() for p in parameters)
        part = math.ceil(total / (2 * self.world_size)) * 2
        flat = torch.zeros(part * self.world_size, device=parameters[0].device)
        offset, pieces = 0, []
        for p in parameters:
            view = flat[offset : offset + p.numel()].view_as(p)
            p.data = view.copy_(p.data)  # the model computes with the buffer: gathering it updates the model
            first, stop = max(self.rank * part - offset, 0), min((self.rank + 1) * part - offset, p.numel())
            if first < stop:
                pieces.append((p, first, stop))
            offset += p.numel()
        dist.broadcast(flat, 0)
        return Slice(group, flat, flat.chunk(self.world_size)[self.rank].clone(), pieces)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; gradients add up, whole, and are reduced in the last one."""
        self.last = last
        loss.backward()

    def _arrived(self, p: nn.Parameter) -> None:
        """A gradient is complete: send it off and go on. (DeepSpeed does it in buckets.)"""
        if self.last:
            self.works.append(dist.all_reduce(p.grad, async_op=True))

    def wait(self) -> None:
        """Wait for what is under way; keep the means that this rank's slices need, and let the others go.

        Raises RuntimeError where a parameter has no gradient.
        """
        for work in self.works:
            work.wait()
        self.works = []
        for p in self.model.parameters():
            if p.grad is None:
                raise RuntimeError(f"A parameter of shape {tuple(p.shape)} got no gradient.")
            if p in self.needed:
                p.grad /= self.world_size  # a boundary may cut it: all of it stays
            else:
                p.grad = None

    def parts(self) -> list[Portion]:
        """What the slices are made of."""
        return [
            Portion(p, first, weight, None if p.grad is None else p.grad.view(-1)[first:stop])
            for s in self.slices
            for (p, first, stop), weight in zip(s.pieces, s.cut(s.master), strict=True)
        ]

    def norm(self) -> Tensor:
        """Norms do not add up over the ranks, squares do."""
        square = torch.zeros((), device=self.slices[0].flat.device)
        for part in self.parts():
            square += part.gradient.square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def _gradient(self, s: Slice) -> Tensor:
        """That of the slice, end to end, with zeros for its padding."""
        gradient = torch.zeros_like(s.master)
        for (p, first, stop), view in zip(s.pieces, s.cut(gradient), strict=True):
            view.copy_(p.grad.view(-1)[first:stop])
        return gradient

    def update(self) -> None:
        """Update this rank's slices, and gather everybody's."""
        for s in self.slices:
            rule, gradient = s.group["rule"], self._gradient(s)
            s.state = s.state or new_state(rule, s.master)
            if rule.whole_matrix:
                rule.accumulate([gradient], [s.state], s.group)
                self._transform(s, gradient)
            else:
                rule.step([s.master], [gradient], [s.state], s.group)
            dist.all_gather(list(s.flat.chunk(self.world_size)), s.master)

    def _transform(self, s: Slice, gradient: Tensor) -> None:
        """Muon needs whole matrices: gather the slices, and transform every matrix of which this rank has a part."""
        whole = torch.empty_like(s.flat)
        dist.all_gather(list(whole.chunk(self.world_size)), gradient)
        offsets, offset = {}, 0
        for p in s.group["params"]:
            offsets[p], offset = offset, offset + p.numel()
        for (p, first, stop), weight in zip(s.pieces, s.cut(s.master), strict=True):
            matrix = whole[offsets[p] : offsets[p] + p.numel()].view_as(p)
            update = s.group["rule"].transform(matrix[None], s.group)[0]
            s.group["rule"].apply(weight, update.flatten()[first:stop], s.group)

    def clear(self) -> None:
        """Let go of all gradients."""
        for p in self.model.parameters():
            p.grad = None

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        padding = [s.master.new_zeros(s.master.numel() - sum(b - a for _, a, b in s.pieces)) for s in self.slices]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return {
            "parameters": [s.flat for s in self.slices],
            "master parameters": [s.master for s in self.slices],
            "gradients": gradients + (padding if gradients else []),
            "optimizer states": [t for s in self.slices for t in s.state.values()],
        }
