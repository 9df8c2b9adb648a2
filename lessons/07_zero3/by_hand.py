"""ZeRO-3 by hand: a rank keeps an equal cut of every parameter; whole ones exist for the moment of their use.

    zero = HandZero3(model, groups)
    for i, batch in enumerate(micro_batches):
        zero.backward(model(batch) / len(micro_batches), last=i == len(micro_batches) - 1)
    zero.wait()
    zero.norm()
    zero.update()           # update the cuts: nothing to gather, the next forward pass does
    zero.clear()

The capstone's solution; my_zero3.py has the interface in words. Before a module runs, in forward and in backward, its
parameters are gathered, and those of the next module are asked for (prefetch). After its forward they are let go, and
again when their gradients have come, which are reduce-scattered at once, while backward goes on. As DeepSpeed does it,
in float32: every parameter is flattened, padded and cut, and the optimizer works on a copy of the cuts. A test holds
the weights against one process, and the bytes against the books.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrun.own import Portion, new_state

LIKE = "zero3"


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


@dataclass
class Reduction:
    """A gradient on its way: all ranks' parts go in, the sum of this rank's comes out."""

    work: dist.Work
    parts: Tensor
    summed: Tensor
    cut: Cut


class HandZero3:
    """Shard the optimizer, gradients and parameters over all ranks.

    model: the same architecture on every rank, float32; rank 0's weights are given to all. groups: as of an optimizer,
    each with its `rule`. keep: leave parameters gathered from forward to backward; prefetch: ask for the next module's
    parameters one module early. Every parameter must get a gradient.
    """

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], keep: bool = False, prefetch: bool = True
    ) -> None:
        self.model, self.groups, self.keep, self.prefetch = model, groups, keep, prefetch
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.cuts: dict[nn.Parameter, Cut] = {}
        self.masters = [self._cut(group["params"]) for group in groups]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        for group, gradients in zip(groups, self.gradients, strict=True):
            parts = [self.cuts[p].mine.numel() for p in group["params"]]
            for p, gradient in zip(group["params"], gradients.split(parts), strict=True):
                self.cuts[p].gradient = gradient
        self.states: list[dict[str, Tensor]] = [{} for _ in groups]
        self.sent: list[Reduction] = []
        self.observe: Callable[[str, nn.Module], None] = lambda phase, module: None  # told when a module may run
        self.next_module: dict[tuple[str, nn.Module], nn.Module] = {}  # learned in the first pass
        self.previous: tuple[str, nn.Module] | None = None
        model.register_forward_pre_hook(lambda *_: self._begin())
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, _: self._gather("forward", module))
                module.register_forward_hook(lambda module, _, output: self._after_forward(module, output))

    def _cut(self, parameters: list[nn.Parameter]) -> Tensor:
        """Cut a group's parameters; returns the optimizer's copy of this rank's cuts, end to end."""
        parts = [math.ceil(p.numel() / self.world_size) for p in parameters]
        flat = torch.zeros(sum(parts), device=parameters[0].device)
        for p, part, master in zip(parameters, parts, flat.split(parts), strict=True):
            whole = torch.zeros(part * self.world_size, device=p.device)
            whole[: p.numel()] = p.detach().flatten()
            dist.broadcast(whole, 0)
            mine = self._parts(whole)[self.rank].clone()
            master.copy_(mine)
            self.cuts[p] = Cut(whole, mine, master, mine)
            p.data = whole[: p.numel()].view_as(p)
            self.cuts[p].free()
            p.register_post_accumulate_grad_hook(self._reduce)
        return flat

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

    def _begin(self) -> None:
        """A forward pass begins. No module comes before its first, after a validation either, which has no backward."""
        self.previous = None

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
        if output.requires_grad:  # its gradient comes: then backward enters the module. (Not so in a validation.)
            output.register_hook(lambda _: self._gather("backward", module))
        if not (self.keep and output.requires_grad):
            for p in module.parameters(recurse=False):
                self.cuts[p].free()

    def _reduce(self, p: nn.Parameter) -> None:
        """A gradient is complete, so that all that needed its parameter has run: send the one, let go of both."""
        cut = self.cuts[p]
        padded = torch.zeros_like(cut.whole)
        padded[: p.numel()] = p.grad.flatten()
        p.grad = None
        cut.free()
        summed = torch.empty_like(cut.mine)
        work = dist.reduce_scatter(summed, self._parts(padded), async_op=True)
        self.sent.append(Reduction(work, padded, summed, cut))
        while len(self.sent) > 1:
            self._receive()

    def _receive(self) -> None:
        """Wait for the oldest gradient that is on its way, and add this rank's part to what it has."""
        done = self.sent.pop(0)
        done.work.wait()
        done.cut.gradient += done.summed / self.world_size

    def backward(self, loss: Tensor, last: bool) -> None:
        """Of one micro-batch; last makes no difference: every micro-batch is reduced by itself."""
        loss.backward()
        while self.sent:
            self._receive()

    def wait(self) -> None:
        """Nothing is on its way any more."""

    def parts(self) -> list[Portion]:
        """The cuts, without their padding."""
        found = []
        for p, cut in self.cuts.items():
            first = self.rank * cut.mine.numel()
            count = min(cut.mine.numel(), p.numel() - first)
            if count > 0:
                found.append(Portion(p, first, cut.master[:count], cut.gradient[:count]))
        return found

    def norm(self) -> Tensor:
        """Norms do not add up over the ranks, squares do. (Padding is zero.)"""
        square = torch.stack([gradient.square().sum() for gradient in self.gradients]).sum()
        dist.all_reduce(square)
        return square.sqrt()

    def update(self) -> None:
        """Update this rank's cuts."""
        for i, (group, master, gradient) in enumerate(zip(self.groups, self.masters, self.gradients, strict=True)):
            rule = group["rule"]
            self.states[i] = self.states[i] or new_state(rule, master)
            if rule.whole_matrix:
                rule.accumulate([gradient], [self.states[i]], group)
                self._transform(group, gradient)
            else:
                rule.step([master], [gradient], [self.states[i]], group)
        for cut in self.cuts.values():
            cut.mine.copy_(cut.master)

    def _transform(self, group: dict[str, Any], gradient: Tensor) -> None:
        """Muon needs whole matrices: gather the cuts of all, and apply this rank's part of every update."""
        everybody = gradient.new_empty(self.world_size, gradient.numel())
        dist.all_gather(list(everybody), gradient)
        columns = everybody.split([self.cuts[p].mine.numel() for p in group["params"]], dim=1)
        for p, column in zip(group["params"], columns, strict=True):
            cut = self.cuts[p]
            matrix = column.flatten()[: p.numel()].view(p.shape)
            update = group["rule"].transform(matrix[None], group)[0].flatten()
            mine = update[self.rank * cut.mine.numel() :][: cut.mine.numel()]
            group["rule"].apply(cut.master[: len(mine)], mine, group)

    def clear(self) -> None:
        """The memory of gradients stays."""
        for gradient in self.gradients:
            gradient.zero_()

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank, by category, as the books name them."""
        whole = [p.grad for p in self.cuts if p.grad is not None]
        return {
            "parameters": [t for cut in self.cuts.values() for t in (cut.mine, cut.whole)],
            "master parameters": self.masters,
            "gradients": [*self.gradients, *whole],
            "communication buffers": [t for reduction in self.sent for t in (reduction.parts, reduction.summed)],
            "optimizer states": [t for state in self.states for t in state.values()],
        }
