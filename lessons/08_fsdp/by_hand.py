"""FSDP by hand: a rank keeps some rows of every parameter; a block's parameters are gathered in one message.

    fsdp = HandFSDP(model, [*model.blocks], groups, clip=1.0)
    for i, batch in enumerate(micro_batches):
        fsdp.backward(model(batch) / len(micro_batches), last=i == len(micro_batches) - 1)
    fsdp.step()

As torch's `fully_shard` does it: parameters are cut by rows (dimension 0) and stay what they are, tensors with rows,
so that the optimizer updates them in place and there is no second copy. A *unit* (a block; what no block holds is the
root's) is gathered, let go and reduced together. With `dtype` bfloat16 the message is bf16, while the rows that a rank
keeps, and the gradients when they are added up, are float32. During accumulation whole gradients wait for the last
micro-batch. A test holds the weights against one process, and the bytes against the books.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(eq=False)
class Rows:
    """A parameter, and the rows of it that this rank keeps."""

    parameter: nn.Parameter
    whole: Tensor
    """The memory behind the parameter, [N · block, ...] in the compute dtype; empty while nobody needs it."""
    padded: Tensor
    """Float32 [block, ...]: this rank's rows, and zeros where there are none left."""
    mine: nn.Parameter
    """The rows themselves, a view of `padded`: what the optimizer updates."""
    gradient: Tensor | None = None
    """Float32, whole: the sum over the micro-batches so far."""


@dataclass(eq=False)
class Unit:
    """What is gathered together. `kept`: from forward to backward too."""

    kept: bool
    rows: list[Rows] = field(default_factory=list)
    missing: int = 0
    """Gradients that have not come yet in this backward pass."""

    @property
    def gathered(self) -> bool:
        return self.rows[0].whole.untyped_storage().nbytes() > 0

    def free(self) -> None:
        for rows in self.rows:
            rows.whole.untyped_storage().resize_(0)


class HandFSDP:
    """Shard AdamW, gradients and parameters over all ranks, by rows.

    model: the same weights on every rank, float32; blocks: modules of it that are gathered one at a time; groups: for
    each a dictionary with `params`, a list of parameters, and torch.optim.AdamW's options; clip: the largest global
    norm; reshard: let go of a block's parameters after its forward pass; dtype: to compute in. Every parameter must
    get a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        groups: list[dict[str, Any]],
        clip: float,
        reshard: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.clip, self.dtype, self.sync = model, clip, dtype, True
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.rows: dict[nn.Parameter, Rows] = {}
        self.units = [self._shard(block, Unit(kept=not reshard)) for block in blocks]
        self.units.append(self._shard(model, Unit(kept=True)))  # backward begins where forward ended: with the root
        self.optimizer = torch.optim.AdamW(
            [{**group, "params": [self.rows[p].mine for p in group["params"]]} for group in groups]
        )

    def _shard(self, module: nn.Module, unit: Unit) -> Unit:
        """Cut a module's parameters that no other unit has, and gather them around its forward and backward pass."""
        for p in module.parameters():
            if p in self.rows:
                continue
            block = math.ceil(p.shape[0] / self.world_size)
            padded = torch.zeros(block, *p.shape[1:], device=p.device)
            mine = p.detach()[self.rank * block : (self.rank + 1) * block]
            view = padded[: len(mine)].copy_(mine)
            whole = torch.empty(self.world_size * block, *p.shape[1:], dtype=self.dtype, device=p.device)
            p.data = whole[: p.shape[0]]
            self.rows[p] = Rows(p, whole, padded, nn.Parameter(view))
            unit.rows.append(self.rows[p])
            p.register_post_accumulate_grad_hook(lambda p, unit=unit: self._arrived(p, unit))
        unit.free()
        module.register_forward_pre_hook(lambda *_: self._gather(unit))
        module.register_forward_hook(lambda _, __, output: self._after_forward(unit, output))
        return unit

    def _gather(self, unit: Unit) -> None:
        """One all-gather for the unit: this rank's rows of all its parameters in, those of all ranks out."""
        if unit.gathered:
            return
        message = torch.cat([rows.padded.flatten() for rows in unit.rows]).to(self.dtype)
        received = message.new_empty(self.world_size, message.numel())
        dist.all_gather(list(received), message)
        columns = received.split([rows.padded.numel() for rows in unit.rows], dim=1)
        for rows, parts in zip(unit.rows, columns, strict=True):
            rows.whole.untyped_storage().resize_(rows.whole.numel() * rows.whole.element_size())
            rows.whole.copy_(parts.reshape(rows.whole.shape))  # rank after rank, and so row after row

    def _after_forward(self, unit: Unit, output: Tensor) -> None:
        unit.missing = len(unit.rows)
        if not unit.kept:
            unit.free()
            output.register_hook(lambda _: self._gather(unit))  # when backward comes to this unit

    def _arrived(self, p: nn.Parameter, unit: Unit) -> None:
        """A gradient is complete; after the unit's last one, let go of its parameters, and reduce if it is time."""
        gradient, rows = p.grad.float(), self.rows[p]
        rows.gradient = gradient if rows.gradient is None else rows.gradient.add_(gradient)
        p.grad = None
        unit.missing -= 1
        if not unit.missing:
            unit.free()
            if self.sync:
                self._reduce(unit)

    def _reduce(self, unit: Unit) -> None:
        """One reduce-scatter for the unit, in float32 whatever the compute dtype."""
        columns = []
        for rows in unit.rows:
            padded = rows.padded.new_zeros(rows.whole.shape)
            padded[: len(rows.gradient)] = rows.gradient
            columns.append(padded.view(self.world_size, -1))  # a line for each rank
            rows.gradient = None
        message = torch.cat(columns, dim=1)
        reduced = torch.empty_like(message[0])
        dist.reduce_scatter(reduced, list(message))
        reduced /= self.world_size
        for rows, part in zip(unit.rows, reduced.split([rows.padded.numel() for rows in unit.rows]), strict=True):
            rows.mine.grad = part.view(rows.padded.shape)[: len(rows.mine)]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; all but the last only add up."""
        self.sync = last
        loss.backward()

    def step(self) -> None:
        """Clip by the global norm, and update this rank's rows."""
        gradients = [rows.mine.grad for rows in self.rows.values()]
        square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square)
        scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient *= scale
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        shards = self.rows.values()
        kept = [rows.mine.grad for rows in shards if rows.mine.grad is not None]
        return {
            "parameters": [t for rows in shards for t in (rows.padded, rows.whole)],
            "master parameters": [],
            "gradients": [*kept, *(rows.gradient for rows in shards if rows.gradient is not None)],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }

    def full_weights(self) -> dict[str, Tensor]:
        """Name → a copy of the whole parameter on the CPU, float32. Call it on every rank."""
        weights = {}
        for name, p in self.model.named_parameters():
            parts = [torch.empty_like(self.rows[p].padded) for _ in range(self.world_size)]
            dist.all_gather(parts, self.rows[p].padded)
            weights[name] = torch.cat(parts)[: len(p)].cpu()
        return weights
