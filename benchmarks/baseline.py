"""The plain baseline of the laptop track: nanoGPT's recipe, written fresh, with nothing of this project but the data.

Learned positions, LayerNorm, GELU, a tied head; AdamW with warm-up and a cosine; batches of random crops. It is as fast
as plain torch makes it on a CPU: fused attention, a packed q·k·v projection, fused AdamW.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB_SIZE = 257
LAYERS = 4
HEADS = 4
WIDTH = 128
ROWS = 16
SEQUENCE_LENGTH = 128
ITERATIONS = 3000
WARMUP = 100


@dataclass(frozen=True)
class Result:
    """How a baseline run ended. val_loss: nats per token; seconds: of training, validation excluded."""

    learning_rate: float
    iterations: int
    val_loss: float
    seconds: float


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class BaselineGPT(nn.Module):
    """The model: tokens and targets, int64 [batch, time], → the mean cross-entropy in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.positions = nn.Embedding(SEQUENCE_LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # the projections into the residual stream add up over 2 × LAYERS of them
                projection = name.endswith((".out.weight", ".down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if projection else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(
    tokens: Tensor,
    validation: tuple[Tensor, Tensor],
    learning_rate: float,
    iterations: int = ITERATIONS,
    seed: int = 1,
    report: Callable[[str], None] = print,
) -> Result:
    """A whole run at one peak learning rate.

    tokens: the training tokens, int64 [n]; validation: inputs and targets, int64 [rows, SEQUENCE_LENGTH] each.
    """
    torch.manual_seed(seed)
    model = BaselineGPT()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        fused=True,
    )
    offsets = torch.arange(SEQUENCE_LENGTH + 1)

    def iteration(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        crops = tokens[torch.randint(len(tokens) - SEQUENCE_LENGTH, (ROWS, 1)) + offsets]
        loss = model(crops[:, :-1], crops[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    iteration(0.0)  # untimed, and without a trace but the optimizer's state, which goes
    optimizer.state.clear()
    seconds = 0.0
    for step in range(iterations):
        started = time.perf_counter()
        iteration(learning_rate_at(step, iterations, learning_rate))
        seconds += time.perf_counter() - started
        if (step + 1) % 500 == 0:
            report(
                f"baseline lr {learning_rate:g} step {step + 1}/{iterations} val_loss {evaluate(model, validation):.4f}"
            )
    return Result(learning_rate, iterations, evaluate(model, validation), seconds)


def learning_rate_at(step: int, iterations: int, peak: float) -> float:
    """Linear warm-up over WARMUP iterations, then half a cosine down to a tenth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / (WARMUP + 1)
    progress = (step - WARMUP) / max(1, iterations - WARMUP)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model: BaselineGPT, validation: tuple[Tensor, Tensor]) -> float:
    """Mean cross-entropy over all validation targets, in nats per token."""
    inputs, targets = validation
    total = 0.0
    for rows, wanted in zip(inputs.split(64), targets.split(64), strict=True):
        total += model(rows, wanted).item() * wanted.numel()
    return total / targets.numel()
