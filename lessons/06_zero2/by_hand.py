"""ZeRO-2 by hand: gradients go to the rank that needs them while backward still runs, and are freed at once.

    zero = HandZero2(model, groups)
    for i, batch in enumerate(micro_batches):
        zero.backward(model(batch) / len(micro_batches), last=i == len(micro_batches) - 1)
    zero.wait()
    zero.norm()
    zero.update()           # update the slices, all-gather the parameters
    zero.clear()

The capstone's solution; my_zero2.py has the interface in words. Flat buffers, slices and the update are lesson 5's.
New: a gradient that is complete goes into a bucket; a full bucket is cut by owners, each owner gets its part reduced,
and the gradients are let go but for this rank's part. With nowhere to keep whole gradients, that has to happen in every
micro-batch. While a bucket travels the next one fills. As DeepSpeed does it with `use_multi_rank_bucket_allreduce:
false`, in float32. A test holds the weights against one process, and the bytes against the books.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrun.own import Portion, new_state

LIKE = "zero2"


@dataclass
class Group:
    """One group's flat buffer, whole on every rank, and this rank's slice of it."""

    group: dict[str, Any]
    flat: Tensor
    master: Tensor
    pieces: list[tuple[nn.Parameter, int, int]] = field(default_factory=list)
    """(parameter, first, stop): the elements that make up the slice, in order; its end may be padding."""
    state: dict[str, Tensor] = field(default_factory=dict)

    def cut(self, like_master: Tensor) -> list[Tensor]:
        """Views of the pieces in something that lies like the slice."""
        sizes = [stop - first for _, first, stop in self.pieces]
        return list(like_master[: sum(sizes)].split(sizes))


@dataclass
class Message:
    """What is on its way to an owner; `pieces`, where this rank is the owner: where it belongs."""

    work: dist.Work
    flat: Tensor
    pieces: list[tuple[nn.Parameter, Tensor]]


class HandZero2:
    """Shard the optimizer and gradients over all ranks.

    model: the same architecture on every rank, float32; rank 0's weights are given to all. groups: as of an optimizer,
    each with its `rule`. bucket: elements of gradients that wait for each other. Every parameter must get a gradient.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], bucket: int = 2**14) -> None:
        self.model, self.bucket_size = model, bucket
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.bucket: list[nn.Parameter] = []
        self.sent: list[Message] = []
        self.owners: dict[nn.Parameter, list[tuple[int, int, int]]] = {}  # (owner, start, stop) of its elements
        self.mine: dict[nn.Parameter, Tensor] = {}  # this rank's part of the mean gradient, summed over micro-batches
        self.padding: list[Tensor] = []
        self.groups = [self._flatten(group) for group in groups]

    def _flatten(self, group: dict[str, Any]) -> Group:
        parameters = group["params"]
        total = sum(p.numel() for p in parameters)
        part = math.ceil(total / (2 * self.world_size)) * 2
        flat = torch.zeros(part * self.world_size, device=parameters[0].device)
        offset, pieces = 0, []
        for p in parameters:
            p.data = flat[offset : offset + p.numel()].view_as(p).copy_(p.data)
            first, last = offset // part, (offset + p.numel() - 1) // part
            cuts = [
                (r, max(r * part - offset, 0), min((r + 1) * part - offset, p.numel())) for r in range(first, last + 1)
            ]
            self.owners[p] = cuts
            pieces += [(p, start, stop) for owner, start, stop in cuts if owner == self.rank]
            p.register_post_accumulate_grad_hook(self._arrived)
            offset += p.numel()
        dist.broadcast(flat, 0)
        return Group(group, flat, flat.chunk(self.world_size)[self.rank].clone(), pieces)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; last makes no difference: every micro-batch is reduced by itself."""
        loss.backward()
        self._send_bucket()  # what did not fill a bucket any more
        self._receive()

    def _arrived(self, p: nn.Parameter) -> None:
        """A gradient is complete. Where the bucket has no room for it, those that wait go first."""
        if sum(q.numel() for q in self.bucket) + p.numel() > self.bucket_size:
            self._send_bucket()
        self.bucket.append(p)

    def _send_bucket(self) -> None:
        """Reduce to every owner its part of the bucket, and let go of what is not this rank's."""
        self._receive()  # of the bucket before: two are in memory at most
        parts: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        for p in self.bucket:
            for owner, start, stop in self.owners[p]:
                parts.setdefault(owner, []).append((p, p.grad.view(-1)[start:stop]))
            p.grad = None
        for owner, pieces in sorted(parts.items()):
            flat = torch.cat([piece for _, piece in pieces])
            work = dist.reduce(flat, owner, async_op=True)
            self.sent.append(Message(work, flat, pieces if owner == self.rank else []))
        self.bucket = []

    def _receive(self) -> None:
        """Wait for the messages that are on their way, and add this rank's parts to what it has."""
        for message in self.sent:
            message.work.wait()
            if not message.pieces:
                continue
            message.flat /= self.world_size
            sizes = [len(piece) for _, piece in message.pieces]
            for (p, piece), mean in zip(message.pieces, message.flat.split(sizes), strict=True):
                if p in self.mine:
                    self.mine[p] += mean
                else:
                    self.mine[p] = piece.copy_(mean)  # a view of the gradient: of one that is cut, all stays
        self.sent = []

    def wait(self) -> None:
        """Nothing is on its way any more. The slice's padding gets a gradient of zeros."""
        for g in self.groups:
            filled = sum(self.mine[p].numel() for p, _, _ in g.pieces)
            self.padding.append(torch.zeros(g.master.numel() - filled, device=g.flat.device))

    def parts(self) -> list[Portion]:
        """What the slices are made of."""
        return [
            Portion(p, first, weight, self.mine.get(p))
            for g in self.groups
            for (p, first, _), weight in zip(g.pieces, g.cut(g.master), strict=True)
        ]

    def norm(self) -> Tensor:
        """Norms do not add up over the ranks, squares do."""
        square = torch.zeros((), device=self.groups[0].flat.device)
        for piece in self.mine.values():
            square += piece.square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def update(self) -> None:
        """Update this rank's slices, and gather everybody's."""
        for g, padding in zip(self.groups, self.padding, strict=True):
            rule = g.group["rule"]
            gradient = torch.cat([*(self.mine[p] for p, _, _ in g.pieces), padding])
            g.state = g.state or new_state(rule, g.master)
            if rule.whole_matrix:
                rule.accumulate([gradient], [g.state], g.group)
                self._transform(g, gradient)
            else:
                rule.step([g.master], [gradient], [g.state], g.group)
            dist.all_gather(list(g.flat.chunk(self.world_size)), g.master)

    def _transform(self, g: Group, gradient: Tensor) -> None:
        """Muon needs whole matrices: gather the slices, and transform every matrix of which this rank has a part."""
        whole = torch.empty_like(g.flat)
        dist.all_gather(list(whole.chunk(self.world_size)), gradient)
        offsets, offset = {}, 0
        for p in g.group["params"]:
            offsets[p], offset = offset, offset + p.numel()
        for (p, first, stop), weight in zip(g.pieces, g.cut(g.master), strict=True):
            matrix = whole[offsets[p] : offsets[p] + p.numel()].view_as(p)
            update = g.group["rule"].transform(matrix[None], g.group)[0]
            g.group["rule"].apply(weight, update.flatten()[first:stop], g.group)

    def clear(self) -> None:
        """Let go of all gradients."""
        self.mine, self.padding = {}, []

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        waiting = [p.grad for p in self.owners if p.grad is not None]
        pieces = [piece for message in self.sent for _, piece in message.pieces]
        return {
            "parameters": [g.flat for g in self.groups],
            "master parameters": [g.master for g in self.groups],
            "gradients": [*self.mine.values(), *self.padding, *waiting, *pieces],
            "communication buffers": [message.flat for message in self.sent],
            "optimizer states": [t for g in self.groups for t in g.state.values()],
        }
