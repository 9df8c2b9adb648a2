"""The hand-written DDP loop that benchmarks/overhead.py compares the trainer with. Launched on every rank."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.overhead import ROWS, TOKENS
from speedrun.config import PRESETS, DataConfig
from speedrun.data import open_data
from speedrun.model import GPT
from speedrun.optim.orthogonalize import polar_express
from speedrun.optim.policy import kind_of


def main() -> None:
    """Arguments: optimizer, steps, folder; rank 0 writes loop.json there, the time of every step in ms."""
    optimizer, steps, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = PRESETS["tiny"][1]
    data = open_data(
        DataConfig(sequence_length=TOKENS, global_batch=ROWS, eval_tokens=1024), config.model.vocab_size, 1
    )
    model = GPT(config.model, document_start=data.document_start)
    model.init_weights(1)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    muon, rest = [], []
    for name, p in model.named_parameters():
        is_muon = optimizer == "muon" and kind_of(name, tuple(p.shape)) == "block matrix"
        (muon if is_muon else rest).append(p)
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=config.optimizer.betas, weight_decay=0.0, fused=True)
    momenta = [torch.zeros_like(p) for p in muon]
    rows = ROWS // world_size
    times = []
    for step in range(steps):
        started = time.perf_counter()
        inputs, targets = data.batch(step, rank * rows, (rank + 1) * rows)
        loss = ddp(inputs, targets)
        loss.backward()
        if config.optimizer.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        adamw.step()
        with torch.no_grad():
            for p, momentum in zip(muon, momenta, strict=True):
                assert p.grad is not None
                momentum.lerp_(p.grad, 0.05)
                update = polar_express(p.grad.lerp(momentum, 0.95)[None], dtype=torch.float32)[0]
                p.sub_(update, alpha=0.01 * max(1.0, p.size(0) / p.size(1)) ** 0.5)
        model.zero_grad()
        loss.item()
        times.append((time.perf_counter() - started) * 1e3)
    if rank == 0:
        (folder / "loop.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
