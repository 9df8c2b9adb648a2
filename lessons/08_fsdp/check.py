"""Checks of lesson 8. Those with ranks run on every rank."""

import math

import torch
import torch.distributed as dist

from lessons.checking import Wrong, expect, expect_number, expect_numbers
from strategies.ledger.wire import Meter


def rank_bytes(theirs):
    p, ranks = 7_500_000_000, 64
    right = {("fsdp", "fp32"): 16, ("zero3", "fp32"): 20, ("fsdp", "bf16"): 16, ("zero3", "bf16"): 16}
    for (strategy, precision), each in right.items():
        fsdp = strategy == "fsdp"
        expect_number(
            theirs(p, ranks, strategy, precision),
            each * p / ranks,
            f"{p:,} parameters on {ranks} ranks, {strategy} in {precision}, in bytes",
            {
                "DeepSpeed keeps a float32 master copy even of float32 parameters: 4 bytes more.": (
                    -1 if fsdp else 16 * p / ranks
                ),
                "FSDP keeps no master copy: its rows are float32, and the optimizer updates them in place.": (
                    20 * p / ranks if fsdp else -1
                ),
                "FSDP in bf16 gathers bf16, but keeps float32 rows and float32 gradients.": (
                    12 * p / ranks if fsdp else -1
                ),
                "Nothing is divided by the ranks there.": each * p,
                "The master weights are missing: DeepSpeed's parameters are bf16 and need a float32 copy.": (
                    -1 if fsdp else 12 * p / ranks
                ),
                "The gradients are missing.": (each - (2 if precision == "bf16" and not fsdp else 4)) * p / ranks,
                "AdamW's two moments are missing, 8 bytes.": (each - 8) * p / ranks,
            },
        )


def wire_bytes(theirs):
    for blocks, root, ranks, accumulation, reshard in (
        (85_000_000, 77_000_000, 8, 4, True),
        (6_000_000_000, 500_000_000, 16, 3, False),
    ):
        share = (ranks - 1) / ranks
        times = 2 if reshard else 1
        both = blocks + root
        gathered, reduced = accumulation * 2 * (times * blocks + root), 4 * both
        expect_number(
            theirs(blocks, root, ranks, accumulation, reshard),
            share * (gathered + reduced),
            f"{blocks:,} parameters in blocks, {root:,} in the root, {ranks} ranks, {accumulation} micro-batches, "
            f"reshard {reshard}, in bytes",
            {
                "Gradients are reduced at the last micro-batch only; between, whole ones are added up.": (
                    share * (gathered + accumulation * reduced)
                ),
                "Parameters are gathered at every micro-batch.": share * (gathered / accumulation + reduced),
                "The root's parameters are gathered once a micro-batch: it is the last one in forward and the first "
                "one in backward, and keeps them.": share * (accumulation * 2 * 2 * both + reduced) if reshard else -1,
                "What is let go after forward is gathered again for backward.": (
                    share * (accumulation * 2 * both + reduced) if reshard else -1
                ),
                "Without reshard a block is gathered once per micro-batch.": (
                    -1 if reshard else share * (accumulation * 2 * (2 * blocks + root) + reduced)
                ),
                "Gradients are reduced in float32: 4 bytes, not 2.": share * (gathered + reduced / 2),
                "Parameters are gathered in bf16: 2 bytes, not 4.": share * (2 * gathered + reduced),
                "That is the payload; a ring sends (N − 1)/N of it.": gathered + reduced,
            },
        )


def part_elements(theirs):
    for rows, columns, ranks in ((257, 128, 8), (50304, 768, 64), (100, 6, 8)):
        fsdp, zero3 = math.ceil(rows / ranks) * columns, math.ceil(rows * columns / ranks)
        expect_numbers(
            theirs(rows, columns, ranks),
            {"fsdp": fsdp, "zero3": zero3},
            f"a matrix of {rows} × {columns} on {ranks} ranks",
            {
                "fsdp": {
                    "Rows are not cut: round the number of rows up, then multiply.": zero3,
                    "You round down: some rows would be on no rank.": rows // ranks * columns,
                    "That is the share without padding.": rows * columns / ranks,
                    "Columns are cut there; FSDP cuts dimension 0.": math.ceil(columns / ranks) * rows,
                },
                "zero3": {
                    "ZeRO-3 knows no rows: the flattened matrix is cut anywhere.": fsdp,
                    "You round down: some elements would be on no rank.": rows * columns // ranks,
                    "That is the share without padding.": rows * columns / ranks,
                },
            },
        )


def my_rows(theirs):
    for rows, world_size in ((8, 2), (7, 3), (10, 4), (5, 4), (2, 3)):
        parameter = torch.arange(float(2 * rows)).view(rows, 2)
        block = math.ceil(rows / world_size)
        parts = [theirs(parameter, rank, world_size) for rank in range(world_size)]
        where = f"{rows} rows on {world_size} ranks: "
        counts = []
        for part in parts:
            expect(isinstance(part, torch.Tensor), f"Your function returned {part!r}; a tensor is asked for.")
            expect(part.dim() == 2, where + f"a part has the shape {list(part.shape)}; it stays [rows, 2].")
            counts.append(len(part))
        right = [max(min(block, rows - rank * block), 0) for rank in range(world_size)]
        if sum(counts) < rows:
            raise Wrong(where + f"your ranks have {counts} rows: {rows - sum(counts)} are lost. Round up, not down.")
        if sum(counts) > rows:
            raise Wrong(where + f"your ranks have {counts} rows, more than there are: padding is no row.")
        if counts != right:
            raise Wrong(
                where + f"your ranks have {counts} rows, FSDP's {right}: full blocks of ceil(rows / world_size) first, "
                "as torch.chunk makes them."
            )
        expect(torch.equal(torch.cat(parts), parameter), where + "the rows are in another order.")
        for part in parts:
            if part.numel() and part.untyped_storage().nbytes() > 4 * part.numel():
                raise Wrong("Your part is a view into the whole parameter, which can then never be freed: clone it.")


def _block():
    """A block's parameters, the same on every rank; the second one's rows do not divide by three."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((6, 4), (4, 3), (5,))]


def _mine(parameter, rank, world_size):
    block = math.ceil(len(parameter) / world_size)
    padded = torch.zeros(block * world_size, *parameter.shape[1:])
    padded[: len(parameter)] = parameter
    return padded[rank * block : (rank + 1) * block].clone()


def gather_block(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    right = _block()
    mine = [_mine(parameter, rank, world_size) for parameter in right]
    with Meter() as meter:
        found = theirs(mine, [len(parameter) for parameter in right])
    expect(
        isinstance(found, (list, tuple)) and len(found) == len(right),
        f"Your function returned {type(found).__name__}; a list of {len(right)} parameters is asked for.",
    )
    padded = [math.ceil(len(parameter) / world_size) * world_size for parameter in right]
    for i, (one, due) in enumerate(zip(found, right, strict=True)):
        if one.shape != due.shape:
            if one.numel() == padded[i] * due[0].numel() and one.numel() > due.numel():
                raise Wrong(
                    f"Parameter {i} has the shape {list(one.shape)} in place of {list(due.shape)}: cut off the padding."
                )
            raise Wrong(f"Parameter {i} has the shape {list(one.shape)}; it should be {list(due.shape)}.")
        if not torch.equal(one, due):
            if i == 0 and torch.equal(one[: len(mine[0])], due[: len(mine[0])]):
                raise Wrong(
                    "The first rank's rows of the first parameter are right, the others' are not: each rank's "
                    "message has rows of all parameters. Split every message by parameters, then put the ranks' "
                    "rows together."
                )
            raise Wrong(f"Parameter {i} is up to {(one - due).abs().max():.2g} off: are the ranks in order?")
    calls = [sent for sent in meter.sent if not sent.bookkeeping]
    if len(calls) != 1:
        raise Wrong(
            f"The parameters are right, but {len(calls)} collectives were called where one does: pack all rows of this "
            "rank into one message."
        )


def reduce_rows(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    every = [torch.full((2 * world_size, 2), 256.0 if r == 0 else 1.25) for r in range(world_size)]
    for r, gradient in enumerate(every):
        gradient += 2 * r * torch.arange(2 * world_size)[:, None]
    found = theirs(every[rank].bfloat16())
    expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
    mean = torch.stack([gradient.bfloat16().float() for gradient in every]).mean(0)
    right = mean.chunk(world_size)[rank]
    if found.shape == mean.shape:
        raise Wrong("You return all rows; this rank keeps its own block.")
    expect(
        found.shape == right.shape, f"Your part has the shape {list(found.shape)}, and should be {list(right.shape)}."
    )
    expect(found.dtype == torch.float32, f"Your rows are in {found.dtype}; float32 is asked for.")
    if torch.allclose(found, right, rtol=1e-5):
        return
    if torch.allclose(found, right * world_size, rtol=1e-5):
        raise Wrong(f"Your gradient is world_size ({world_size}) times too large: reduce_scatter sums.")
    if torch.allclose(found, every[rank].chunk(world_size)[rank], rtol=1e-2):
        raise Wrong("These are this rank's own gradients: nothing was reduced over the ranks.")
    if torch.allclose(found, right, rtol=2e-2):
        raise Wrong(
            f"Your mean is off by {(found - right).abs().max() / right.abs().max():.1%}, as if it were added "
            "up in bf16, where 256 + 1 is 256. Convert to float32 before the reduction, not after it."
        )
    raise Wrong(f"Your rows are up to {(found - right).abs().max():.2g} away from the mean.")
