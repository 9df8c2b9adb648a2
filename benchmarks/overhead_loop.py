"""The hand-written DDP loop that benchmarks/overhead.py compares the trainer with. Launched on every rank."""

import dataclasses
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.overhead import ROWS, TOKENS
from benchmarks.plain import plain_update
from speedrun.config import DataConfig
from speedrun.data import open_data
from speedrun.model import GPT
from speedrun.presets import PRESETS
from strategies import strict_json


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
    update = plain_update(model, dataclasses.replace(config.optimizer, name=optimizer))
    rows = ROWS // world_size
    times = []
    for step in range(steps):
        started = time.perf_counter()
        inputs, targets = data.batch(step, rank * rows, (rank + 1) * rows)
        loss = ddp(inputs, targets)
        loss.backward()
        update()
        loss.item()
        times.append((time.perf_counter() - started) * 1e3)
    if rank == 0:
        (folder / "loop.json").write_text(strict_json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
