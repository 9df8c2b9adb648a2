"""Checks of lesson 8. Those with ranks run on every rank."""

import math

import torch
import torch.distributed as dist

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, expect_numbers, expect_tensor, rounded_alike
from lessons.meters import on_all_wires, unwritten_is_nan
from lessons.worlds import on_two_ranks
from strategies.ledger.wire import Meter

PARAMETERS = st.integers(0, 10**10)
PER_PARAMETER = {("fsdp", "fp32"): 16, ("zero3", "fp32"): 20, ("fsdp", "bf16"): 16, ("zero3", "bf16"): 16}


def rank_bytes(theirs):
    for p, ranks in ((7_500_000_000, 64), (124_000_000, 6)):
        for (strategy, precision), each in PER_PARAMETER.items():
            fsdp, bf16 = strategy == "fsdp", precision == "bf16"
            gradient = 4 if fsdp or not bf16 else 2
            mistakes = {
                "The gradients are missing.": (each - gradient) * p / ranks,
                "The parameters are missing.": (each - gradient) * p / ranks,
                "AdamW's two moments are missing, 8 bytes.": (each - 8) * p / ranks,
                "One of AdamW's two moments is missing.": (each - 4) * p / ranks,
            }
            if fsdp:
                known = {"FSDP keeps no master copy: the optimizer updates its float32 rows in place.": 20}
                if bf16:
                    known["FSDP in bf16 gathers bf16, but keeps float32 rows and float32 gradients."] = 12
                    known["A bf16 copy is in there: it exists gathered only, for the moment of its use."] = 18
            elif bf16:
                known = {
                    "The master weights are missing: DeepSpeed's parameters are bf16 and need a float32 copy.": 12,
                    "In bf16 DeepSpeed keeps bf16 parameters and gradients, 2 bytes each.": 20,
                }
            else:
                known = {"DeepSpeed keeps a float32 master copy in any case, even of float32 parameters.": 16}
            mistakes |= {message: width * p / ranks for message, width in known.items()}
            what = f"{p:,} parameters on {ranks} ranks, {strategy} in {precision}, in bytes"
            expect_number(theirs(p, ranks, strategy, precision), each * p / ranks, what, mistakes, ranks)
    formula(
        theirs, lambda p, n, strategy, precision: PER_PARAMETER[strategy, precision] / n * p, "in bytes", "ranks",
        parameters=PARAMETERS, ranks=st.integers(1, 64), strategy=st.sampled_from(["fsdp", "zero3"]),
        precision=st.sampled_from(["fp32", "bf16"]),
    )  # fmt: skip


def wire_bytes(theirs):
    for blocks, root, ranks, a, reshard in (
        (85_000_000, 77_000_000, 6, 4, True),
        (6_000_000_000, 500_000_000, 16, 3, False),
        (85_000_000, 77_000_000, 8, 1, True),
    ):
        share, both, times = (ranks - 1) / ranks, blocks + root, 2 if reshard else 1
        gathered, reduced = a * 2 * (times * blocks + root), 4 * both
        mistakes = {
            "Gradients are reduced in float32: 4 bytes, not 2.": share * (gathered + reduced / 2),
            "Parameters are gathered in bf16: 2 bytes, not 4.": share * (2 * gathered + reduced),
            "That is the payload; a ring sends (N − 1)/N of it.": gathered + reduced,
            "Gradients are reduce-scattered, one pass of the ring; an all-reduce would be two.": share
            * (gathered + 2 * reduced),
            "The reduction of the gradients is missing.": share * gathered,
            "The gathering of the parameters is missing.": share * reduced,
            "The root is missing: its parameters are gathered, and its gradients reduced, as well.": share
            * (a * 2 * times * blocks + 4 * blocks),
        }
        if a > 1:
            mistakes["Gradients are reduced at the last micro-batch only; whole ones are added up until then."] = (
                share * (gathered + a * reduced)
            )
            mistakes["Parameters are gathered at every micro-batch."] = share * (gathered / a + reduced)
        if reshard:
            mistakes |= {
                "The root's parameters are gathered once a micro-batch: it is the last one in forward and the first "
                "one in backward, and keeps them.": share * (a * 2 * 2 * both + reduced),
                "What is let go after forward is gathered again for backward.": share * (a * 2 * both + reduced),
            }
        else:
            mistakes["Without reshard a block is gathered once per micro-batch."] = share * (
                a * 2 * (2 * blocks + root) + reduced
            )
        what = (
            f"{blocks:,} parameters in blocks, {root:,} in the root, {ranks} ranks, {a} micro-batches, reshard "
            f"{reshard}, in bytes"
        )
        expect_number(theirs(blocks, root, ranks, a, reshard), share * (gathered + reduced), what, mistakes, ranks)
    formula(
        theirs,
        lambda blocks, root, n, a, reshard: (
            (1 - 1 / n) * (2 * a * root + 2 * a * blocks + (2 * a * blocks if reshard else 0) + 4 * root + 4 * blocks)
        ),
        "in bytes", "ranks", blocks=PARAMETERS, root=PARAMETERS, ranks=st.integers(1, 64),
        accumulation=st.integers(1, 16), reshard=st.booleans(),
    )  # fmt: skip


def part_elements(theirs):
    for rows, columns, ranks in ((257, 128, 8), (50304, 768, 64), (100, 5, 8), (5, 3, 6)):
        fsdp, zero3 = math.ceil(rows / ranks) * columns, math.ceil(rows * columns / ranks)
        mistakes = {
            "fsdp": {
                "Rows are not cut: round the number of rows up, then multiply.": zero3,
                "You round down: some rows would be on no rank.": rows // ranks * columns,
                "That is the share without padding.": rows * columns / ranks,
                "Columns are cut there; FSDP cuts dimension 0.": math.ceil(columns / ranks) * rows,
                "That is the whole matrix with its padding; a rank's part is asked for.": fsdp * ranks,
            },
            "zero3": {
                "ZeRO-3 knows no rows: the flattened matrix is cut anywhere.": fsdp,
                "You round down: some elements would be on no rank.": rows * columns // ranks,
                "That is the share without padding.": rows * columns / ranks,
                "That is the whole matrix with its padding; a rank's part is asked for.": zero3 * ranks,
            },
        }
        what = f"a matrix of {rows} × {columns} on {ranks} ranks"
        expect_numbers(theirs(rows, columns, ranks), {"fsdp": fsdp, "zero3": zero3}, what, mistakes)
    formula(
        theirs,
        lambda rows, columns, ranks: {
            "fsdp": len(range(0, rows, ranks)) * columns, "zero3": len(range(0, rows * columns, ranks)),
        },
        rows=st.integers(0, 600), columns=st.integers(1, 130), ranks=st.integers(1, 64),
    )  # fmt: skip


def my_rows(theirs):
    for shape, world_size in (
        ((8, 2), 2), ((7, 2), 3), ((10, 2), 4), ((5, 2), 4), ((2, 2), 3), ((5,), 4), ((3, 2, 2), 2),
    ):  # fmt: skip
        _rows(theirs, _numbered(shape), world_size)
    _rows(theirs, _numbered((2, 5)).T, 2, " (stored by columns)")
    _rows(theirs, _numbered((5, 3), torch.bfloat16), 4)
    _rows(theirs, _numbered((5, 2)).flip(0), 4)  # nothing is kept from an earlier call
    generated(
        lambda rows, others, world_size: _rows(theirs, _numbered((rows, *others)), world_size), most=40,
        rows=st.integers(0, 12), others=st.lists(st.integers(1, 3), max_size=2),
        world_size=st.sampled_from([8, 6, 4, 3, 2, 1]),
    )  # fmt: skip


def _numbered(shape, dtype=torch.float32):
    return torch.arange(1.0, math.prod(shape) + 1).view(shape).to(dtype)


def _rows(theirs, parameter, world_size, how=""):
    rows, rest = len(parameter), list(parameter.shape[1:])
    block = math.ceil(rows / world_size)
    parts = [theirs(parameter, rank, world_size) for rank in range(world_size)]
    where = f"{rows} rows{f' of {rest}' if rest else ''}{how} on {world_size} ranks: "
    counts = []
    for part in parts:
        expect(isinstance(part, torch.Tensor), f"Your function returned {part!r}; a tensor is asked for.")
        expect(
            part.dim() == parameter.dim() and list(part.shape[1:]) == rest,
            where + f"a part has the shape {list(part.shape)}; it stays {['rows', *rest]}.".replace("'", ""),
        )
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
    expect(torch.equal(torch.cat(parts).to(parameter.dtype), parameter), where + "the rows are in another order.")
    for rank, part in enumerate(parts):
        expect_tensor(part, parameter[rank * block : (rank + 1) * block], where)
        if part.untyped_storage().nbytes() > part.element_size() * part.numel():
            raise Wrong(
                f"{where}rank {rank}'s part is a view into the whole parameter, which can then never be freed: clone "
                "it. (A view without rows holds it as well.)"
            )


def _mine(parameter, rank, world_size):
    block = math.ceil(len(parameter) / world_size)
    padded = torch.zeros(block * world_size, *parameter.shape[1:])
    padded[: len(parameter)] = parameter
    return padded[rank * block : (rank + 1) * block].clone()


def gather_block(theirs):
    """The second parameter's rows do not divide by three."""
    world_size = dist.get_world_size()
    shapes = [(6, 4), (4, 3), (5,)]
    with Meter() as meter:
        _gather(theirs, shapes, 0)
    calls = [sent for sent in meter.sent if not sent.bookkeeping]
    if len(calls) != 1:
        raise Wrong(
            f"The parameters are right, but {len(calls)} collectives were called where one does: pack all rows of this "
            "rank into one message."
        )
    message = 4 * sum(math.ceil(shape[0] / world_size) * math.prod(shape[1:]) for shape in shapes)
    sent, once = on_all_wires(meter), world_size * (world_size - 1) * message
    expect(
        sent <= once,
        f"The parameters are right, but it sends {sent / once:.3g} times what is needed: an all-gather of the ranks' "
        "messages, and nothing but their rows in them.",
    )
    _gather(theirs, [(1, 2), (2, 1, 3)], 3, ", views of one buffer", flat=True)
    _gather(theirs, shapes, 1, ", with rows of zeros", zeros=True)
    on_two_ranks(lambda: _gather(theirs, [(5, 2), (3,)], 2))
    shape = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
    generated(
        lambda shapes, seed: _gather(theirs, shapes, seed, f", {[list(shape) for shape in shapes]}"), most=8,
        shapes=st.lists(shape, min_size=1, max_size=4), seed=st.integers(0, 99),
    )  # fmt: skip


def _gather(theirs, shapes, seed, how="", flat=False, zeros=False):
    """flat: this rank's rows lie in one buffer, one parameter after the other; zeros: in the first rows, no padding."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    right = [torch.randn(shape, generator=generator) for shape in shapes]
    for parameter in right if zeros else []:
        parameter[0] = 0.0
    mine = [_mine(parameter, rank, world_size) for parameter in right]
    if flat:
        buffer = torch.cat([part.flatten() for part in mine])
        pieces = buffer.split([part.numel() for part in mine])
        mine = [piece.view_as(part) for piece, part in zip(pieces, mine, strict=True)]
    with unwritten_is_nan():
        found = theirs(mine, [len(parameter) for parameter in right])
    expect(
        isinstance(found, (list, tuple)) and len(found) == len(right),
        f"Your function returned {type(found).__name__}; a list of {len(right)} parameters is asked for.",
    )
    padded = [math.ceil(len(parameter) / world_size) * world_size for parameter in right]
    for i, (one, due) in enumerate(zip(found, right, strict=True)):
        expect(isinstance(one, torch.Tensor), f"Parameter {i} is {one!r}; a tensor is asked for.")
        if one.shape != due.shape:
            if one.numel() == padded[i] * due[0].numel() and one.numel() > due.numel():
                raise Wrong(
                    f"Parameter {i} has the shape {list(one.shape)} in place of {list(due.shape)}: cut off the padding."
                )
            raise Wrong(f"Parameter {i}{how} has the shape {list(one.shape)}; it should be {list(due.shape)}.")
        expect(one.dtype == due.dtype, f"Parameter {i} is in {one.dtype}; the rows are in {due.dtype}.")
        if torch.equal(one, due):
            continue
        if torch.equal(one, due.bfloat16().float()):
            raise Wrong(
                f"Parameter {i} is rounded to bf16. FSDP can gather in bf16 (param_dtype); here the rows are float32, "
                "and the parameters should be, too."
            )
        expect(bool(one.isfinite().all()), f"Parameter {i}{how} has nan: memory was read before it was filled.")
        if i == 0 and len(found) > 1 and torch.equal(one[: len(mine[0])], due[: len(mine[0])]):
            raise Wrong(
                "The first rank's rows of the first parameter are right, the others' are not: each rank's "
                "message has rows of all parameters. Split every message by parameters, then put the ranks' "
                "rows together."
            )
        rows = {tuple(row.flatten().tolist()) for row in due}
        if all(tuple(row.flatten().tolist()) in rows for row in one):
            raise Wrong(f"Parameter {i}{how} has the right rows in another order: are the ranks in order?")
        raise Wrong(f"Parameter {i}{how} is up to {(one - due).abs().max():.2g} off.")


def reduce_rows(theirs):
    world_size = dist.get_world_size()
    every = [torch.full((2 * world_size, 2), 256.0 if r == 0 else 1.25) for r in range(world_size)]
    for r, gradient in enumerate(every):
        gradient += 2 * r * torch.arange(2 * world_size)[:, None]
    with Meter() as meter:
        _reduce(theirs, every, "")
    sent, once = on_all_wires(meter), (world_size - 1) * 4 * every[0].numel()
    expect(
        sent <= once,
        f"The rows are right, but it sends {sent / once:.3g} times what is needed. A reduce-scatter in float32 brings "
        "each rank the sum of its rows alone.",
    )
    _reduce(theirs, [torch.full((world_size, 1), 1.0 + r) for r in range(world_size)], " (a row a rank)")
    _reduce(theirs, every[::-1], " (other gradients of the same shape)")
    _reduce(theirs, [torch.zeros(2 * world_size, 3)] * world_size, " (gradients of zero)")
    on_two_ranks(lambda: _reduce(theirs, [_drawn((6, 2), r) for r in range(2)], ""))
    generated(
        lambda rows, columns, seed: _reduce(
            theirs, [_drawn((rows * world_size, columns), seed + r) for r in range(world_size)],
            f" ({rows} rows a rank, {columns} columns)",
        ),
        most=8, rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 99),
    )  # fmt: skip


def _drawn(shape, seed):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _reduce(theirs, every, where):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with unwritten_is_nan():
        found = theirs(every[rank].bfloat16())
    expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
    mean = torch.stack([gradient.bfloat16().double() for gradient in every]).mean(0).float()
    right = mean.chunk(world_size)[rank]
    if found.shape == mean.shape:
        raise Wrong("You return all rows; this rank keeps its own block.")
    expect(
        found.shape == right.shape,
        f"Your part has the shape {list(found.shape)}, and should be {list(right.shape)}{where}.",
    )
    expect(found.dtype == torch.float32, f"Your rows are in {found.dtype}; float32 is asked for.")
    if rounded_alike(found, right, max(gradient.abs().max().item() for gradient in every)):
        expect(
            found.untyped_storage().nbytes() <= 4 * found.numel(),
            "The rows are right, but they are a view of something larger, which stays in memory as long as they do. "
            "Copy them (clone).",
        )
        return
    expect(bool(right.any()), f"Your mean of gradients that are zero is up to {found.abs().max():.2g}, and not zero.")
    if _close(found, right * world_size):
        raise Wrong(f"Your gradient is world_size ({world_size}) times too large: reduce_scatter sums.")
    if _close(found, right / world_size):
        raise Wrong(f"Your mean is divided by the world size ({world_size}) twice.")
    own = every[rank].bfloat16().float().chunk(world_size)[rank]
    if _close(found, own):
        raise Wrong("These are this rank's own gradients: nothing was reduced over the ranks.")
    if _close(found, own / world_size):
        raise Wrong("These are this rank's own gradients, divided: the sum over the ranks is missing.")
    if any(_close(found, block) for block in mean.chunk(world_size)):
        raise Wrong(f"These are the rows of another rank, not rank {rank}'s{where}.")
    if torch.allclose(found, right, rtol=2e-2, atol=2e-2):
        raise Wrong(
            f"Your mean is off by {(found - right).abs().max() / right.abs().max():.1%}{where}, as if it were added "
            "up in bf16, where 256 + 1 is 256. Convert to float32 before the reduction, not after it."
        )
    expect(bool(found.isfinite().all()), f"Your rows have nan{where}: memory was read before it was filled.")
    raise Wrong(f"Your rows are up to {(found - right).abs().max():.2g} away from the mean{where}.")


def _close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)
