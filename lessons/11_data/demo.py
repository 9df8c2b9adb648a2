"""Lesson 11: from a file to a batch, the same batch on any number of ranks, and what a step waits for.

python demo.py                                                  one process
accelerate launch --config_file …/cpu/ddp.yaml demo.py          two ranks: who takes which rows
"""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from lessons.kit import CONFIG, headline, launched, open_text, prepare, rows_of, save_figure, steps, table
from shardrun.colours import ACCENT, SENT, SERIES
from shardrun.lesson.guess import guess_first
from shardrun.tables import mib
from speedrun.data import batch_hash, prefetch
from speedrun.data.shards import HEADER_BYTES, open_shard, write_tokens
from speedrun.run.ending import guarded
from strategies import catalogue

STEPS = steps(12)
SLOW = 0.1
"""Seconds a batch that a slow source takes: storage over a network, or tokenising on the fly."""
SHARD_TOKENS = 20_000_000
LONG = replace(CONFIG, data=replace(CONFIG.data, sequence_length=1024, eval_tokens=1024))
"""Rows in which documents begin and end; those that the demo trains on are shorter than most documents."""


def main() -> None:
    guess = guess_first(11)
    launch, first = launched()
    data = open_text()
    waits = {} if launch.world_size > 1 else waiting(launch, first.settings, data)
    hashes = who_takes_what(launch, data)
    if launch.rank:
        return
    print(headline(launch, "The data pipeline"))
    print(f"\nThe source: {data.name}, {data.train_tokens:,} training tokens, SHA-256 {data.content_hash[:12]}…")
    rows = open_text(LONG)
    show_rows(rows)
    show_hashes(launch, data, hashes)
    guess.tell(sum(t.nbytes for t in data.batch(0, 0, data.global_batch)))
    if launch.world_size > 1:
        return
    memory_map()
    pinned(first.settings.place.device, data)
    show_waiting(waits)
    print(save_figure("lesson_11_data", lambda figure: draw(figure, rows, waits)))


# Rows


def show_rows(data) -> None:
    """A few rows, as text around their document starts."""
    inputs, targets = data.batch(0, 0, data.global_batch)
    length = inputs.shape[1]
    print(f"\nRows of {length} tokens; ¶ is the token before a document, and every row begins with one:")
    for i, row in list(enumerate(inputs))[:6]:
        starts = (row == data.document_start).nonzero().flatten().tolist()
        pieces = " … ".join(as_text(row[start : start + 24], data) for start in starts[:3])
        print(f"  row {i}, starts at {', '.join(map(str, starts[:3]))}: {pieces}")
    print(f"  inputs of row 0:  {as_text(inputs[0, :40], data)}")
    print(f"  its targets:      {as_text(targets[0, :40], data)}")


def as_text(row, data) -> str:
    """A character per token."""
    shown = ["¶" if token == data.document_start else chr(token) for token in row.tolist()]
    return "".join(c if c.isprintable() else "·" for c in shown)


def who_takes_what(launch, data) -> list[tuple[int, str]]:
    """For steps 0 and 1000: (first row, hash of this rank's rows), of all ranks."""
    mine = [(launch.rank, step, batch_hash(*rows_of(launch, data, step))) for step in (0, 1000)]
    if launch.world_size == 1:
        return mine
    gathered = [None] * launch.world_size
    dist.all_gather_object(gathered, mine)
    return [entry for rank in gathered for entry in rank]


def show_hashes(launch, data, hashes) -> None:
    """Rank by rank; and what one process alone would have."""
    size = data.global_batch // launch.world_size
    ranks = "one rank makes" if launch.world_size == 1 else f"each of {launch.world_size} ranks makes"
    print(f"\nThe global batch has {data.global_batch} rows; {ranks} {size} of them:")
    lines = []
    for rank, step, digest in sorted(hashes, key=lambda entry: (entry[1], entry[0])):
        alone = batch_hash(*data.batch(step, rank * size, (rank + 1) * size))
        rows = f"{rank * size} … {(rank + 1) * size - 1}"
        lines.append([f"step {step}, rank {rank}", rows, digest[:12], "yes" if alone == digest else "NO"])
    print(table(["", "rows", "SHA-256", "as one process has them"], lines))
    for step in (0, 1000):
        print(f"  whole global batch of step {step:>4}: {data.global_batch_hash(step)[:12]} on any number of ranks")
    started = time.perf_counter()
    data.batch(123_456, 0, 1)
    print(f"  nothing is read up to a step: a row of step 123,456 took {(time.perf_counter() - started) * 1e3:.1f} ms")


# Memory maps and pinned memory


def memory_map() -> None:
    """A shard on the disk: opened as a map, and read whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example_train_000001.bin"
        write_tokens(path, np.random.default_rng(0).integers(0, 50_256, SHARD_TOKENS, dtype=np.uint16))
        print(f"\nA shard of {SHARD_TOKENS / 1e6:.0f}M tokens, {path.stat().st_size:,} bytes; what this process gains:")
        # Each is done in turn; what one has brought in is let go before the next.
        lines = [measured("open it as a memory map", lambda: open_shard(path))]
        lines.append(measured("… and look at 50 rows of 1025 tokens", lambda: look(open_shard(path))))
        lines.append(measured("read the whole file", lambda: np.fromfile(path, "<u2", offset=HEADER_BYTES)))
        print(table(["", "ms", "own (MiB)", "the file's pages"], lines))
    print("The file's pages are there once for all ranks of a machine, and can be given back at any time.")


def look(tokens) -> tuple:
    starts = np.random.default_rng(1).integers(0, SHARD_TOKENS - 1025, 50)
    return tokens, sum(int(tokens[start : start + 1025].sum()) for start in starts)


def measured(what: str, work) -> list[str]:
    """Time, and what the process gains in memory: of its own, and of a file's pages, which it shares with others."""
    before, started = in_memory(), time.perf_counter()
    result = work()
    elapsed, after = time.perf_counter() - started, in_memory()
    del result
    return [what, f"{elapsed * 1e3:.1f}", *(mib(max(0, a - b)) for a, b in zip(after, before, strict=True))]


def in_memory() -> tuple[int, int]:
    """Bytes of this process: its own, and shared with others. (Only Linux tells them apart.)"""
    info = psutil.Process().memory_info()
    shared = getattr(info, "shared", 0)
    return info.rss - shared, shared


def pinned(device, data) -> None:
    """Copies to the GPU, from ordinary and from page-locked memory."""
    inputs, targets = data.batch(0, 0, data.global_batch)
    size = sum(t.nbytes for t in (inputs, targets))
    print(f"\nA batch in memory: inputs and targets, int64 {list(inputs.shape)}: {size:,} bytes.")
    if device.type != "cuda":
        print("No GPU here, so no copy: pinned memory has nothing to do. (Launched on one, this demo times it.)")
        return
    host = torch.empty(64 * 2**20, dtype=torch.uint8)
    for name, source in (("pageable", host), ("pinned", host.pin_memory())):
        source.to(device, non_blocking=True)
        torch.cuda.synchronize()
        started = time.perf_counter()
        source.to(device, non_blocking=True)
        returned = time.perf_counter() - started
        torch.cuda.synchronize()
        done = time.perf_counter() - started
        print(
            f"  64 MiB from {name} memory: the call returns after {returned * 1e3:.2f} ms, done after {done * 1e3:.2f}"
        )


# Waiting


def waiting(launch, settings, data) -> dict[str, tuple[list[float], list[float]]]:
    """Data and compute time of every step, in ms: a quick source and a slow one, in the step and prefetched."""
    found = {}
    for name, extra in (("as it is", 0.0), (f"{SLOW * 1e3:.0f} ms slower", SLOW)):
        for how in ("in the step", "prefetched"):
            strategy = catalogue.engine(launch.strategy, settings)
            prepare(strategy)
            batches = made(data, extra)
            if how == "prefetched":
                with prefetch(batches, depth=2) as upcoming:
                    found[f"{name}, {how}"] = train(strategy, upcoming)
            else:
                found[f"{name}, {how}"] = train(strategy, batches)
    return found


def made(data, extra: float):
    """The batches of some steps; extra: seconds that each takes more."""
    for step in range(STEPS):
        time.sleep(extra)
        yield data.batch(step, 0, data.global_batch)


def train(strategy, batches) -> tuple[list[float], list[float]]:
    device, waited, worked = strategy.optimizer.place.device, [], []
    started = time.perf_counter()
    for inputs, targets in batches:
        fetched = time.perf_counter()
        with strategy.micro_batch(last=True):
            strategy.backward(strategy.model(inputs.to(device), targets.to(device)))
        strategy.step()
        ended = time.perf_counter()
        waited.append((fetched - started) * 1e3)
        worked.append((ended - fetched) * 1e3)
        started = ended
    return waited, worked


def median(values: list[float]) -> float:
    """Of the steps after the first two, which pay for what is done once."""
    return float(np.median(values[2:]))


def show_waiting(waits) -> None:
    print(f"\nWhat a step waits for its batch (median of {STEPS - 2} steps, ms; {os.cpu_count()} cores):")
    lines = []
    for name, (waited, worked) in waits.items():
        data, compute = median(waited), median(worked)
        lines.append([name, f"{data:.2f}", f"{compute:.1f}", f"{data / compute:.1%}"])
    print(table(["source", "data time", "compute time", "data / compute"], lines))
    print(f"The slow source sleeps for {SLOW * 1e3:.0f} ms: it stands for storage, not for work on this processor.")


def draw(figure, data, waits) -> None:
    left, right = figure.subplots(1, 2)
    inputs, _ = data.batch(0, 0, data.global_batch)
    documents = (inputs == data.document_start).cumsum(1) + 3 * torch.arange(len(inputs))[:, None]
    from matplotlib.colors import ListedColormap

    colours = {"cmap": ListedColormap(SERIES), "vmin": 0, "vmax": len(SERIES) - 1}
    left.imshow(documents % len(SERIES), aspect="auto", interpolation="nearest", **colours)
    left.set_title("Rows of 1024 tokens: another colour, another document", loc="left")
    left.set_xlabel("token")
    left.set_ylabel("row")
    names = list(waits)
    data_times, compute_times = ([median(values[i]) for values in waits.values()] for i in (0, 1))
    right.barh(names, compute_times, color=ACCENT, label="compute")
    right.barh(names, data_times, left=compute_times, color=SENT, label="waiting for data")
    right.set_title("A step (ms)", loc="left")
    right.set_ylim(-0.6, len(names) + 0.2)
    right.legend(frameon=False, ncols=2, loc="upper left")


if __name__ == "__main__":
    guarded(main)
