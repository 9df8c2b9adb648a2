"""Checks of lesson 11."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from lessons.cases import formula, generated, st
from lessons.checking import (
    Wrong,
    expect,
    expect_number,
    expect_numbers,
    expect_own,
    expect_raises,
    expect_tensor,
)
from lessons.meters import read_bytes


def batch_bytes(theirs):
    for rows, length in ((512, 1024), (16, 64)):
        cells = rows * length
        mistakes = {
            "disk": {
                "That is length tokens per row; the last one's target is one further on.": 2 * cells,
                "Inputs and targets are the same tokens, one apart: they are read once.": 4 * cells,
                "Targets are not read a second time.": 4 * rows * (length + 1),
                "Tokens take 2 bytes in a shard (uint16).": 8 * rows * (length + 1),
            },
            "memory": {
                "Inputs alone; targets are a tensor of their own.": 8 * cells,
                "int64 takes 8 bytes.": 2 * 4 * cells,
                "That is uint16; embeddings and losses want int64 indices.": 2 * 2 * cells,
                "Inputs and targets have length columns each, not length + 1.": 16 * rows * (length + 1),
            },
        }
        right = {"disk": 2 * rows * (length + 1), "memory": 16 * cells}
        expect_numbers(theirs(rows, length), right, f"{rows} rows of {length} tokens, in bytes", mistakes)
    formula(
        theirs, lambda rows, length: {"disk": rows * (length * 2 + 2), "memory": rows * length * (8 + 8)}, "in bytes",
        rows=st.integers(1, 10_000), length=st.integers(1, 10_000),
    )  # fmt: skip


def step_ms(theirs):
    for data, copy, compute in ((30.0, 5.0, 100.0), (150.0, 8.0, 90.0), (20.0, 40.0, 30.0), (96.0, 10.0, 90.0)):
        for prefetch, pinned in ((False, False), (True, False), (True, True)):
            apart, behind = data + copy + compute, max(data, copy + compute)
            right = max(data, copy, compute) if pinned else behind if prefetch else apart
            mistakes = {
                "That adds up everything, as if nothing ran beside anything.": apart,
                "With prefetching the next batch is made while this one is copied and computed: the slower decides.": (
                    copy + compute if prefetch and not pinned else -1
                ),
                "Without pinned memory the copy does not run beside the computation: the step waits for it.": (
                    max(data, copy, compute) if prefetch and not pinned else -1
                ),
                "The copy from pinned memory runs beside the computation, one step ahead.": behind if pinned else -1,
                "Nothing runs beside anything without a thread: add up.": behind,
                "The copy is missing.": data + compute if not prefetch else -1,
            }
            how = f"prefetch {'on' if prefetch else 'off'}, {'pinned' if pinned else 'not pinned'}"
            what = f"data {data:g}, copy {copy:g}, compute {compute:g} ms, {how}"
            expect_number(theirs(data, copy, compute, prefetch, pinned), right, what, mistakes)
    times = st.floats(0.5, 500)
    generated(
        lambda data, copy, compute, how: _step(theirs, data, copy, compute, *how),
        data=times, copy=times, compute=times, how=st.sampled_from([(False, False), (True, False), (True, True)]),
    )  # fmt: skip


def _step(theirs, data, copy, compute, prefetch, pinned):
    lanes = (
        [[data], [copy], [compute]] if pinned else [[data], [copy, compute]] if prefetch else [[data, copy, compute]]
    )
    right = max(sum(lane) for lane in lanes)
    what = f"data {data:g}, copy {copy:g}, compute {compute:g} ms, prefetch {prefetch}, pinned {pinned}"
    expect_number(theirs(data, copy, compute, prefetch, pinned), right, what)


def read_tokens(theirs):
    tokens = (np.arange(5000, dtype=np.int64) * 13 + 40_000) % 50_257
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.bin"
        path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
        for first, last in ((0, 10), (700, 1200), (4990, 5000), (0, 5000), (4999, 5000)):
            _piece(theirs(path, first, last), tokens, first, last, path)
        _not_written(theirs(path, 3, 9), path)
        for magic, version, what in ((0, 0, "zeros"), (7, 1, "another magic number, and version 1")):
            header[:2] = magic, version
            other = Path(folder) / "other.bin"
            other.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
            expect_raises(
                lambda other=other: theirs(other, 0, 4), ValueError,
                f"A file that does not begin with the magic number ({what}) has to be refused with a ValueError.",
            )  # fmt: skip
        for count in (37, 1):  # a shard of another length
            header[:3] = 20240520, 1, count
            other.write_bytes(header.tobytes() + tokens[:count].astype("<u2").tobytes())
            _piece(theirs(other, 0, count), tokens[:count], 0, count, other)
        _little_is_read(theirs, Path(folder))


def _not_written(found, path):
    """A map in numpy's default mode, r+, writes into the shard."""
    before = path.read_bytes()
    if not found.flags.writeable:
        return
    found[0] ^= 1
    if isinstance(found, np.memmap):
        found.flush()
    if path.read_bytes() != before:
        path.write_bytes(before)
        raise Wrong(
            'Writing into your array writes into the shard: open it with mode="r" (np.memmap\'s default is r+).'
        )


def _little_is_read(theirs, folder):
    path, tokens = folder / "large.bin", 4_000_000
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.truncate(1024 + 2 * tokens)
    theirs(path, 5, 15)  # what is imported at the first call does not count
    _, read = read_bytes(lambda: theirs(path, 5, 15))
    expect(
        read < 1_000_000,
        f"For 10 tokens of a shard of 8 MB {read:,} bytes are read or copied. Ask np.fromfile for count numbers, and "
        "the rest of np.memmap.",
    )


def _piece(found, tokens, first, last, path):
    where = f"Tokens {first} to {last}: "
    expect(isinstance(found, np.ndarray), f"Your function returned {type(found).__name__}; an array is asked for.")
    right = tokens[first:last]
    expect(found.ndim == 1, f"{where}your array has {found.ndim} dimensions; one is asked for.")
    if not np.array_equal(found, right):
        raw = np.frombuffer(path.read_bytes(), dtype="<u2")
        with_header = raw[first:last]
        if np.array_equal(found.astype(np.uint16), right.astype(np.uint16)):
            raise Wrong(where + "some are negative: they are unsigned (uint16), not int16.")
        if np.array_equal(found, with_header):
            raise Wrong(where + "you begin in the header: skip its 256 · 4 bytes.")
        for skipped in (256, 256 * 2):
            if np.array_equal(found, raw[skipped // 2 + first : skipped // 2 + last]):
                raise Wrong(where + f"you skip {skipped} bytes; the header has 256 numbers of 4 bytes.")
        if found.dtype.itemsize == 2 and np.array_equal(found.astype("<u2").byteswap(), right.astype("<u2")):
            raise Wrong(where + "the bytes are exchanged: little-endian is asked for.")
        raise Wrong(where + f"you return {found[:4]} …, it should begin {right[:4]} ….")
    expect(found.dtype == np.dtype("<u2"), f"{where}your array is {found.dtype}; uint16 is asked for.")
    base = found
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    if not isinstance(base, np.memmap):
        raise Wrong(
            where + "right, but copied into memory. np.memmap reads what is looked at, and the rest of 200 MB never."
        )


def cut_rows(theirs):
    start = 9
    stream = torch.tensor([9, 1, 2, 3, 9, 4, 5, 9, 6, 7, 8, 1, 9, 2])
    for length in (3, 4, 5, 13, 7, 6, 1):
        before = stream.clone()
        found = theirs(stream, length, start)
        expect(isinstance(found, tuple) and len(found) == 2, "Two tensors are asked for: inputs and targets.")
        inputs, targets = found
        count = (len(stream) - 1) // length
        rows = [before[r * length : (r + 1) * length + 1].clone() for r in range(count)]
        plain = torch.stack(rows)
        right = plain.clone()
        right[:, 0] = start
        where = f"With rows of {length}: "
        for what, mine in (("inputs", inputs), ("targets", targets)):
            expect(isinstance(mine, torch.Tensor), f"{where}your {what} are {mine!r}; a tensor is asked for.")
            expect(mine.dtype == torch.int64, f"{where}your {what} are in {mine.dtype}; int64 is asked for.")
            expect_own(mine, stream, f"{where}your tensor of {what}", "the stream")
        if inputs.shape == (len(stream) // (length + 1), length) and len(inputs) != count:
            raise Wrong(
                where
                + "rows do not overlap, so that the first token of each is never a target. Row r goes from r·length "
                "to r·length + length, both included."
            )
        expect(
            inputs.shape == (count, length) == targets.shape,
            f"{where}your tensors are {list(inputs.shape)} and {list(targets.shape)}; [{count}, {length}] each is due.",
        )
        if torch.equal(inputs, right[:, :-1]) and torch.equal(targets, right[:, 1:]):
            continue
        if torch.equal(inputs, targets):
            raise Wrong(
                where + "the targets are the inputs themselves: the loss would fall to zero, and nothing learned."
            )
        if torch.equal(inputs, plain[:, :-1]):
            raise Wrong(where + "rows begin in mid-document, with no start: the first input has to be `start`.")
        for what, mine, due in (("inputs", inputs, right[:, :-1]), ("targets", targets, right[:, 1:])):
            for row in range(count):
                if not torch.equal(mine[row], due[row]):
                    raise Wrong(f"{where}row {row} of your {what} is {mine[row].tolist()}, not {due[row].tolist()}.")
    generated(
        lambda length, rows, rest, start: _rows(theirs, length, rows, min(rest, length - 1), start),
        length=st.integers(1, 6), rows=st.integers(1, 4), rest=st.integers(0, 5), start=st.integers(0, 3),
    )  # fmt: skip


def _rows(theirs, length, rows, rest, start):
    """Token by token: row r reads tokens r · length …, its first one replaced; rest tokens fill no row."""
    stream = torch.arange(rows * length + 1 + rest) * 7 % 10
    where = f"A stream of {len(stream)} tokens, {stream.tolist()}, in rows of {length} with start {start}: "
    found = theirs(stream, length, start)
    inputs = [[start if i == 0 else int(stream[r * length + i]) for i in range(length)] for r in range(rows)]
    targets = [[int(stream[r * length + i + 1]) for i in range(length)] for r in range(rows)]
    for what, mine, due in (("inputs", found[0], inputs), ("targets", found[1], targets)):
        expect_tensor(mine, torch.tensor(due), f"{where}{what}: ")
        expect(mine.tolist() == due, f"{where}your {what} are {mine.tolist()}; {due} are due.")
        expect_own(mine, stream, f"{where}your tensor of {what}", "the stream")


def document_mask(theirs):
    start = 9
    for tokens in ([9, 1, 2, 9, 3, 9, 9, 4], [5, 6, 9, 1], [9, *[1] * 40], [9, 1] * 270):
        given = torch.tensor(tokens)
        found = theirs(given, start)
        n = len(tokens)
        number, now = [], 0
        for token in tokens:
            now += token == start
            number.append(now)
        same = torch.tensor([[a == b for b in number] for a in number])
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
        expect(
            found.shape == (n, n) and found.dtype == torch.bool,
            f"Your mask is {found.dtype} {list(found.shape)}; torch.bool [{n}, {n}] is asked for.",
        )
        if torch.equal(found, same & causal):
            continue
        tokens = tokens if n < 20 else f"{n} tokens, {number[-1]} of them starts"
        for message, value in {
            "It looks into the future: keys after the query are to be False (tril).": same,
            "It looks into other documents: causal is not enough.": causal,
            "It is the wrong way round: query by key, so True lies below the diagonal.": (same & causal).T,
            "It is inverted: True is where attention may look.": ~(same & causal),
        }.items():
            expect(not torch.equal(found, value), f"For {tokens}: {message}")
        if not found.diagonal().all():
            raise Wrong(f"For {tokens}: a position may always look at itself; with a row of False the softmax is nan.")
        query, key = (found != (same & causal)).nonzero()[0].tolist()
        raise Wrong(
            f"For {tokens}: position {query} may {'' if (same & causal)[query, key] else 'not '}look at {key}. A start "
            "belongs to the document that it opens."
        )
    generated(
        lambda tokens, start: _masked(theirs, tokens, start),
        tokens=st.lists(st.integers(0, 3), min_size=1, max_size=7), start=st.integers(0, 3),
    )  # fmt: skip


def _masked(theirs, tokens, start):
    found = theirs(torch.tensor(tokens), start)
    n = len(tokens)
    right = [[k <= q and start not in tokens[k + 1 : q + 1] for k in range(n)] for q in range(n)]
    expect_tensor(found, torch.tensor(right), f"For {tokens} with start {start}: ")
    expect(found.tolist() == right, f"For {tokens} with start {start} your mask is {found.int().tolist()}.")


def _shuffled(epoch):
    return np.random.default_rng([7, epoch]).permutation(10).tolist()


def batch_rows(theirs):
    per_epoch, batch = 10, 4
    endless = [row for epoch in range(6) for row in _shuffled(epoch)]
    for step in (0, 7, 1, 2, 3):
        right = endless[step * batch : (step + 1) * batch]
        for world_size in (1, 2, 4):
            size = batch // world_size
            found = [theirs(step, rank, world_size, batch, per_epoch, _shuffled) for rank in range(world_size)]
            where = f"Step {step} on {world_size} ranks: "
            for rank, rows in enumerate(found):
                expect(isinstance(rows, list), f"Your function returned {rows!r}; a list of numbers is asked for.")
                expect(len(rows) == size, f"{where}rank {rank} takes {len(rows)} rows; {size} are due.")
            together = [int(row) for rows in found for row in rows]
            if together == right:
                continue
            if world_size > 1 and all(rows == found[0] for rows in found):
                raise Wrong(where + "all ranks take the same rows: the global batch is one rank's, several times over.")
            if together == [row for rank in range(world_size) for row in right[rank::world_size]] and world_size > 1:
                raise Wrong(where + "rows are dealt out one by one; each rank takes a contiguous part.")
            straddles = step * batch // per_epoch != ((step + 1) * batch - 1) // per_epoch
            first = [_shuffled(0)[(step * batch + i) % per_epoch] for i in range(batch)]
            if together == first:
                raise Wrong(where + "every epoch has the order of the first one. Ask shuffled(epoch).")
            if together == [p % per_epoch for p in range(step * batch, (step + 1) * batch)]:
                raise Wrong(where + "those are the rows in the order of the file, not shuffled.")
            if straddles:
                raise Wrong(
                    f"{where}the batch straddles two epochs, and you take {together} where {right} are due: look up "
                    "every position's epoch by itself."
                )
            raise Wrong(f"{where}the ranks take {together} together; {right} are due, on any number of ranks.")
    generated(
        lambda step, world_size, size, per_epoch: _batch(theirs, step, world_size, size * world_size, per_epoch),
        step=st.integers(0, 9), world_size=st.sampled_from([1, 2, 3, 6, 8]), size=st.integers(1, 12),
        per_epoch=st.integers(1, 40),
    )  # fmt: skip


def _batch(theirs, step, world_size, batch, per_epoch):
    """The endless order, written out."""

    def shuffled(epoch):
        return np.random.default_rng([3, epoch]).permutation(per_epoch).tolist()

    endless = [row for epoch in range((step + 1) * batch // per_epoch + 1) for row in shuffled(epoch)]
    right = endless[step * batch : (step + 1) * batch]
    for rank, due in enumerate(np.split(np.array(right), world_size)):
        found = theirs(step, rank, world_size, batch, per_epoch, shuffled)
        where = f"Step {step}, rank {rank} of {world_size}, global batch {batch}, {per_epoch} rows an epoch: "
        expect(isinstance(found, list), f"{where}you return {type(found).__name__}; a list is asked for.")
        expect(found == due.tolist(), f"{where}you take {found}; {due.tolist()} are due.")
