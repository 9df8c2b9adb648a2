"""A data-parallel trainer, small enough to be read whole, and what can be seen of it from outside.

    reports = run(Trainer, ranks=2, accumulation=2, steps=12)      # one Report per rank

Every rank computes whole gradients of its rows and keeps, of everything that the optimizer touches, its rows alone:
ZeRO-2, for matrices whose first dimension divides by the ranks. Inner matrices are updated by Muon, the embedding,
which is the head as well, by AdamW.

The sick ones are in animals.py. Do not read that before you have made your diagnoses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from ranks import Mismatch, Ranks, on_threads
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from speedrun.optim.orthogonalize import newton_schulz

VOCAB, WIDTH, HIDDEN, LENGTH = 64, 32, 64, 32
ROWS, BATCH, VALIDATION_ROWS = 1024, 16, 32
"""Rows of LENGTH + 1 tokens: to train with, of one step over all ranks, and to validate with."""
FOLLOWERS = 4
"""Each token is followed by one of four, all equally likely: no honest model gets below log 4 nats per token."""
MUON = ("up", "down")
ADAMW_LR, MUON_LR, MOMENTUM, CLIP = 0.01, 0.05, 0.9, 0.1
VALIDATE_EVERY = 5

DIAGNOSES = {
    "target off by one": "the targets are the inputs themselves, not the tokens after them",
    "gradient summed": "gradients are added up over the ranks, and not divided by their number",
    "parameter reduced": "the average over the ranks is taken of the parameters, not of the gradients",
    "accumulation scaled twice": "gradients are divided by the number of micro-batches twice",
    "shards orthogonalised": "Newton–Schulz runs on each rank's rows, not on whole matrices",
    "optimizer first": "the optimizer was built before sharding, and updates what nobody reads",
    "untied": "the head is no longer the embedding: tied at first, two parameters afterwards",
    "seeds differ": "every rank draws its weights with a seed of its own",
    "data repeated": "the ranks train on the same rows",
    "local clip norm": "every rank clips by the norm of its own rows of the gradient",
    "no_grad missing": "validation keeps its graph",
    "one rank validates": "only rank 0 validates, although validation has a collective in it",
}


@dataclass
class Report:
    """What one rank showed."""

    losses: list[float] = field(default_factory=list)
    """Of each step, the mean over this rank's rows, in nats per token."""
    val_losses: list[float] = field(default_factory=list)
    """Over all validation rows of all ranks, every VALIDATE_EVERY steps."""
    grad_norms: list[float] = field(default_factory=list)
    """Of each step, before clipping: what this rank clipped by."""
    rows: list[list[int]] = field(default_factory=list)
    """Of each step, which rows of the data this rank trained on."""
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """Name → whole weight: at first, and after each step. A tied head is there under both names."""
    held: dict[str, int] = field(default_factory=dict)
    """"parameters" and "optimizer states" → bytes after the last step."""
    graph: list[int] = field(default_factory=list)
    """After each step, bytes that autograd still keeps for a backward pass."""
    sent: dict[str, int] = field(default_factory=dict)
    """Collective → bytes that this rank sent in the last step that did not validate, on a ring."""
    stuck: str = ""
    """Which rank waits where, if the run did not come to its end."""


class Model(nn.Module):
    """Embedding, an MLP, and the embedding again as the head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int, size: float) -> nn.Parameter:
            return nn.Parameter(size * torch.randn(rows, columns, generator=random))

        self.embed = matrix(VOCAB, WIDTH, 0.05)
        self.up = matrix(HIDDEN, WIDTH, WIDTH**-0.5)
        self.down = matrix(WIDTH, HIDDEN, HIDDEN**-0.5)
        self.head = self.embed

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss; inputs and targets int64 [rows, length]."""
        x = self.embed[inputs]
        x = x + F.relu(F.rms_norm(x, (WIDTH,)) @ self.up.T).square() @ self.down.T
        logits = F.rms_norm(x, (WIDTH,)) @ self.head.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Data:
    """Rows of tokens [rows, LENGTH + 1] whose entropy is known; the same on every rank."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(1000 + seed)
        followers = torch.stack([torch.randperm(VOCAB, generator=random)[:FOLLOWERS] for _ in range(VOCAB)])
        tokens = torch.randint(VOCAB, (ROWS + VALIDATION_ROWS, LENGTH + 1), generator=random)
        choices = torch.randint(FOLLOWERS, tokens.shape, generator=random)
        for i in range(LENGTH):
            tokens[:, i + 1] = followers[tokens[:, i], choices[:, i]]
        self.order = torch.randperm(ROWS, generator=random)
        self.training, self.validation = tokens[:ROWS], tokens[ROWS:]


class Trainer:
    """The healthy one."""

    def __init__(self, ranks: Ranks, accumulation: int, seed: int, device: torch.device) -> None:
        self.ranks, self.accumulation, self.device = ranks, accumulation, device
        self.report, self.data = Report(), Data(seed)
        self.validated: list[Tensor] = []
        self.prepare(seed)

    def prepare(self, seed: int) -> None:
        """The model, this rank's shards of it, and then the optimizer, over the shards."""
        self.model = Model(seed).to(self.device)
        self.shard()
        self.build_optimizer(self.shards)

    def shard(self) -> None:
        self.whole = dict(self.model.named_parameters())  # a tied parameter once
        self.shards = {name: nn.Parameter(self.mine(p.detach()).clone()) for name, p in self.whole.items()}

    def build_optimizer(self, parameters: dict[str, nn.Parameter]) -> None:
        self.muon = {name: parameters[name] for name in MUON}
        self.momenta: dict[str, Tensor] = {}
        self.adamw = torch.optim.AdamW([p for name, p in parameters.items() if name not in MUON], lr=ADAMW_LR)

    def mine(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a whole matrix."""
        return tensor.chunk(self.ranks.world_size)[self.ranks.rank]

    def rows(self, step: int) -> Tensor:
        """Which rows this rank trains on: its part of the step's batch."""
        first = step * BATCH % ROWS
        return self.mine(self.data.order[first : first + BATCH])

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets [rows, LENGTH] of rows [rows, LENGTH + 1]."""
        return tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)

    def step(self, step: int) -> None:
        rows, losses = self.rows(step), []
        for part in rows.chunk(self.accumulation):
            loss = self.model(*self.split(self.data.training[part]))
            (loss / self.accumulation).backward()
            losses.append(loss.item())
        self.reduce()
        self.clip()
        self.update()
        self.gather()
        self.report.rows.append(rows.tolist())
        self.report.losses.append(sum(losses) / len(losses))

    def reduce(self) -> None:
        """The mean gradient over the ranks; of it, this rank's rows."""
        for name, p in self.whole.items():
            self.shards[name].grad = self.ranks.reduce_scatter(p.grad, "gradients") / self.ranks.world_size
            p.grad = None

    def gradient_norm(self) -> Tensor:
        """Of the whole gradient: the squares of all ranks' rows add up."""
        square = torch.stack([p.grad.square().sum() for p in self.shards.values()]).sum()
        return self.ranks.all_reduce(square, "the norm").sqrt()

    def clip(self) -> None:
        norm = self.gradient_norm()
        for p in self.shards.values():
            p.grad *= (CLIP / norm).clamp(max=1.0)
        self.report.grad_norms.append(norm.item())

    @torch.no_grad()
    def update(self) -> None:
        self.adamw.step()
        for name, p in self.muon.items():
            if p.grad is None:
                continue  # as torch's optimizers do, without a word
            momentum = self.momenta.setdefault(name, torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            p -= MUON_LR * self.orthogonalized(momentum)

    def orthogonalized(self, momentum: Tensor) -> Tensor:
        """This rank's rows of the orthogonalised matrix: that takes the whole matrix."""
        whole = self.ranks.all_gather(momentum, "momentum")
        return self.mine(newton_schulz(whole[None], 5, torch.float32)[0])

    @torch.no_grad()
    def gather(self) -> None:
        """All ranks' new rows, into the model."""
        for name, p in self.whole.items():
            p.copy_(self.ranks.all_gather(self.shards[name], "parameters"))

    def due(self, step: int) -> bool:
        return step % VALIDATE_EVERY == VALIDATE_EVERY - 1

    @torch.no_grad()
    def validate(self) -> None:
        self.add_validation()

    def add_validation(self) -> None:
        """The loss over all validation rows: every rank takes a part of them."""
        loss = self.model(*self.split(self.mine(self.data.validation)))
        self.validated.append(loss)
        mean = self.ranks.all_reduce(loss, "the validation loss") / self.ranks.world_size
        self.report.val_losses.append(mean.item())

    def train(self, steps: int) -> Report:
        """Train, and report. Ranks that part company end the run; `stuck` says where they were."""
        report, graph = self.report, Graph()
        report.weights.append(self.weights())
        try:
            for step in range(steps):
                self.ranks.sent.clear()
                with graph.watched():
                    self.step(step)
                    report.weights.append(self.weights())
                    if self.due(step):
                        self.validate()
                    else:
                        report.sent = dict(self.ranks.sent)
                report.graph.append(graph.bytes())
            self.ranks.leave()
        except Mismatch as mismatch:
            report.stuck = f"step {len(report.losses)}: {mismatch}"
        moments = [t for state in self.adamw.state.values() for key, t in state.items() if key != "step"]
        report.held = {
            "parameters": size(self.model.parameters()),
            "optimizer states": size([*moments, *self.momenta.values()]),
        }
        return report

    def weights(self) -> dict[str, Tensor]:
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: p.detach().cpu().clone() for name, p in named}


class Graph:
    """Which tensors autograd keeps for backward passes that are still to come."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}

    def watched(self) -> saved_tensors_hooks:
        """A context in which every tensor that is kept is noted until it is let go of."""
        return saved_tensors_hooks(lambda tensor: Kept(tensor, self.kept), lambda kept: kept.tensor)

    def bytes(self) -> int:
        return sum(self.kept.values())


class Kept:
    """A tensor in autograd's hands, noted in a book for as long as it is there."""

    def __init__(self, tensor: Tensor, book: dict[int, int]) -> None:
        self.tensor, self.book = tensor, book
        book[id(self)] = tensor.nbytes

    def __del__(self) -> None:
        del self.book[id(self)]


def size(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def run(
    trainer: type[Trainer] = Trainer, ranks: int = 2, accumulation: int = 2, steps: int = 12, seed: int = 0
) -> list[Report]:
    """Train on so many ranks, threads of this process; the reports of all of them. A few seconds at most.

    ranks: 1, 2 or 4; accumulation: micro-batches that a rank cuts its rows of a step into, 1, 2 or 4; seed: of
    weights and data. Raises ValueError where the batch does not divide into both.
    """
    if BATCH % (ranks * accumulation):
        raise ValueError(f"{BATCH} rows do not divide into {ranks} ranks times {accumulation} micro-batches.")

    def work(mine: Ranks) -> Report:
        torch.set_num_threads(1)
        return trainer(mine, accumulation, seed, torch.device("cpu")).train(steps)

    return on_threads(ranks, work)
