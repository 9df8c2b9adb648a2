"""The sick trainers, a bug each. SPOILERS: first find out from outside what is wrong with them."""

import torch
from torch import Tensor, nn
from zoo import BATCH, ROWS, Model, Trainer, newton_schulz


class Badger(Trainer):
    """Local clip norm."""

    def gradient_norm(self) -> Tensor:
        return torch.stack([p.grad.square().sum() for p in self.shards.values()]).sum().sqrt()


class Crane(Trainer):
    """Untied: as when each layer is wrapped, and copied, by itself."""

    def shard(self) -> None:
        self.model.head = nn.Parameter(self.model.embed.detach().clone())
        super().shard()


class Dingo(Trainer):
    """No gradient reaches the optimizer: it was built over the whole parameters, and theirs are let go of."""

    def prepare(self, seed: int) -> None:
        self.model = Model(seed).to(self.device)
        self.build_optimizer(dict(self.model.named_parameters()))
        self.shard()


class Egret(Trainer):
    """Data repeated: the rank has been forgotten."""

    def rows(self, step: int) -> Tensor:
        first = step * BATCH % ROWS
        return self.data.order[first : first + BATCH // self.ranks.world_size]


class Ferret(Trainer):
    """The graph of validation is kept: no_grad is missing, and the losses stay in a list."""

    def validate(self) -> None:
        self.add_validation()


class Gecko(Trainer):
    """Accumulation scaled twice: in the loss and once more here."""

    def reduce(self) -> None:
        super().reduce()
        for p in self.shards.values():
            p.grad /= self.accumulation


class Heron(Trainer):
    """The parameters are averaged over the ranks, the gradients are not."""

    def reduce(self) -> None:
        for name, p in self.whole.items():
            self.shards[name].data = self.ranks.reduce_scatter(p, "gradients") / self.ranks.world_size
            self.shards[name].grad = self.mine(p.grad).clone()
            p.grad = None


class Ibis(Trainer):
    """One rank validates, and the validation has a collective in it."""

    def due(self, step: int) -> bool:
        return self.ranks.rank == 0 and super().due(step)


class Jackal(Trainer):
    """A seed of its own on every rank."""

    def prepare(self, seed: int) -> None:
        super().prepare(seed + self.ranks.rank)


class Koala(Trainer):
    """Gradients summed, not averaged."""

    def reduce(self) -> None:
        super().reduce()
        for p in self.shards.values():
            p.grad *= self.ranks.world_size


class Lynx(Trainer):
    """Target off by one: the model has to say what it is given."""

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs, _ = super().split(tokens)
        return inputs, inputs


class Marmot(Trainer):
    """Newton–Schulz on shards."""

    def orthogonalized(self, momentum: Tensor) -> Tensor:
        return newton_schulz(momentum[None], 5, torch.float32)[0]


ANIMALS = {
    kind.__name__.lower(): kind
    for kind in (Badger, Crane, Dingo, Egret, Ferret, Gecko, Heron, Ibis, Jackal, Koala, Lynx, Marmot)
}
