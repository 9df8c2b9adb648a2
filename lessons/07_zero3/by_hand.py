"""ZeRO-3 by hand: a rank keeps an equal cut of every parameter; whole ones exist for the moment of their use.

    zero = HandZero3(model, groups, clip=1.0)
    for i, batch in enumerate(micro_batches):
        zero.backward(model(batch) / len(micro_batches), last=i == len(micro_batches) - 1)
    zero.step()             # clip, update the cuts: nothing to gather, the next forward pass does

Before a module runs, in forward and in backward, its parameters are gathered, and those of the next module are asked
for (prefetch). After its forward they are let go, and again when their gradients have come, which are reduce-scattered
at once. As DeepSpeed does it, in float32: every parameter is flattened, padded and cut, and the optimizer works on a
copy of the cuts. A test holds the weights against one process, and the bytes against the books.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(eq=False)
class Cut:
    """A parameter, and what this rank keeps of it. Sizes in elements: whole N · part, the others part."""

    whole: Tensor
    """The memory behind the parameter, with padding; freed while nobody needs it."""
    mine: Tensor
    master: Tensor
    gradient: Tensor
    """Of the mean over the ranks, summed over micro-batches; like master a piece of its group's flat tensor."""
    work: dist.Work | None = None
    """The gathering, while it is under way."""

    @property
    def gathered(self) -> bool:
        return self.whole.untyped_storage().nbytes() > 0

    def free(self) -> None:
        """Let go of the memory. What autograd saved points to it, and finds it filled again in backward."""
        self.whole.untyped_storage().resize_(0)


class HandZero3:
    """Shard AdamW, gradients and parameters over all ranks.

    model: the same weights on every rank, float32. groups: for each a dictionary with `params`, a list of parameters,
    and torch.optim.AdamW's options; clip: the largest global norm; keep: leave parameters gathered from forward to
    backward; prefetch: ask for the next module's parameters one module early. Every parameter must get a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        clip: float,
        keep: bool = False,
        prefetch: bool = True,
    ) -> None:
        self.model, self.clip, self.keep, self.prefetch = model, clip, keep, prefetch
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.cuts: dict[nn.Parameter, Cut] = {}
        self.masters = [self._cut(group["params"]) for group in groups]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        for group, gradients in zip(groups, self.gradients, strict=True):
            parts = [self.cuts[p].mine.numel() for p in group["params"]]
            for p, gradient in zip(group["params"], gradients.split(parts), strict=True):
                self.cuts[p].gradient = gradient
        self.optimizer = torch.optim.AdamW(
            [{**group, "params": [master]} for group, master in zip(groups, self.masters, strict=True)]
        )
        self.observe: Callable[[str, nn.Module], None] = lambda phase, module: None  # told when a module may run
        self.next_module: dict[tuple[str, nn.Module], nn.Module] = {}  # learned in the first pass
        self.previous: tuple[str, nn.Module] | None = None
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, _: self._gather("forward", module))
                module.register_forward_hook(lambda module, _, output: self._after_forward(module, output))

    def _cut(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        """Cut a group's parameters; returns the optimizer's copy of this rank's cuts, end to end."""
        parts = [math.ceil(p.numel() / self.world_size) for p in parameters]
        flat = torch.zeros(sum(parts), device=parameters[0].device)
        for p, part, master in zip(parameters, parts, flat.split(parts), strict=True):
            whole = torch.zeros(part * self.world_size, device=p.device)
            whole[: p.numel()] = p.detach().flatten()
            mine = self._parts(whole)[self.rank].clone()
            master.copy_(mine)
            self.cuts[p] = Cut(whole, mine, master, mine)
            p.data = whole[: p.numel()].view_as(p)
            self.cuts[p].free()
            p.register_post_accumulate_grad_hook(self._reduce)
        return nn.Parameter(flat)

    def _parts(self, whole: Tensor) -> list[Tensor]:
        """Views of the parts of all ranks."""
        return list(whole.chunk(self.world_size))

    def _ask(self, module: nn.Module) -> None:
        """Begin to gather what is missing of a module's own parameters."""
        for p in module.parameters(recurse=False):
            cut = self.cuts[p]
            if not cut.gathered:
                cut.whole.untyped_storage().resize_(cut.whole.numel() * cut.whole.element_size())
                cut.work = dist.all_gather(self._parts(cut.whole), cut.mine, async_op=True)

    def _gather(self, phase: str, module: nn.Module) -> None:
        """Before a module runs: its parameters have to be there, and the next module's may be on their way."""
        self._ask(module)
        if self.previous and self.previous[0] == phase:
            self.next_module[self.previous] = module
        self.previous = (phase, module)
        if self.prefetch and self.previous in self.next_module:
            self._ask(self.next_module[self.previous])
        for p in module.parameters(recurse=False):
            if work := self.cuts[p].work:
                work.wait()
                self.cuts[p].work = None
        self.observe(phase, module)

    def _after_forward(self, module: nn.Module, output: Tensor) -> None:
        output.register_hook(lambda _: self._gather("backward", module))  # its gradient has come: now backward enters
        if not self.keep:
            for p in module.parameters(recurse=False):
                self.cuts[p].free()

    def _reduce(self, p: nn.Parameter) -> None:
        """A gradient is complete, so that all that needed its parameter has run: reduce the one, let go of both."""
        cut = self.cuts[p]
        padded = torch.zeros_like(cut.whole)
        padded[: p.numel()] = p.grad.flatten()
        summed = torch.empty_like(cut.mine)
        dist.reduce_scatter(summed, self._parts(padded))
        cut.gradient += summed / self.world_size
        p.grad = None
        cut.free()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; last makes no difference: every micro-batch is reduced by itself."""
        loss.backward()

    def step(self) -> None:
        """Clip by the global norm, and update this rank's cuts."""
        square = torch.stack([gradient.square().sum() for gradient in self.gradients]).sum()
        dist.all_reduce(square)
        scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient.mul_(scale)
        self.optimizer.step()
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = None
            gradient.zero_()
        for cut in self.cuts.values():
            cut.mine.copy_(cut.master)

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        whole = [p.grad for p in self.cuts if p.grad is not None]
        return {
            "parameters": [t for cut in self.cuts.values() for t in (cut.mine, cut.whole)],
            "master parameters": [master.data for master in self.masters],
            "gradients": [*self.gradients, *whole],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }

    def full_weights(self) -> dict[str, Tensor]:
        """Name → a copy of the whole parameter on the CPU. Call it on every rank."""
        weights = {}
        for name, p in self.model.named_parameters():
            whole = torch.empty_like(self.cuts[p].whole, device=p.device)
            dist.all_gather(self._parts(whole), self.cuts[p].mine)
            weights[name] = whole[: p.numel()].view(p.shape).cpu()
        return weights
