"""Lesson 13, Muon. Write the seven functions; `shardrun lesson check 13` says what is right."""

from collections.abc import Callable

from torch import Tensor


def orthogonal(gradient: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all one: U·Vᵀ for gradient = U·S·Vᵀ, by torch.linalg.svd.

    gradient: float32 [rows, columns], either may be larger. Returns the same shape.
    """
    raise NotImplementedError


def newton_schulz(gradient: Tensor, steps: int) -> Tensor:
    """Nearly the same by matrix products alone: X ← a·X + b·A·X + c·A²·X with A = X·Xᵀ, `steps` times.

    (a, b, c) = (3.4445, −4.7750, 2.0315), starting from X = gradient / ‖gradient‖, the Frobenius norm. gradient:
    float32 [rows, columns], either may be larger, not zero. Returns the same shape. All in float32. A tall matrix is
    transposed first, and its result back: A is the smaller of the two products.
    """
    raise NotImplementedError


def uses_muon(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon updates this parameter (if not, AdamW does): only the matrices inside the transformer's blocks.

    name: such as "blocks.3.attention.q.weight", "blocks.3.mlp.up.weight", "embed.weight", "head.weight", or
    "blocks.3.norm.weight", which is a vector.
    """
    raise NotImplementedError


def muon_step(
    weight: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    lr: float,
    momentum: float,
    orthogonalize: Callable[[Tensor], Tensor],
) -> None:
    """One step of Muon, in place on weight and buffer; all float32 [rows, columns]. Called under torch.no_grad().

    buffer ← momentum · buffer + (1 − momentum) · gradient; look ahead (Nesterov) with (1 − momentum) · gradient +
    momentum · the new buffer; orthogonalize that, once; weight ← weight − lr · √max(1, rows / columns) · the result.
    """
    raise NotImplementedError


def state_bytes(block_matrices: int, others: int) -> dict[str, int]:
    """Bytes of optimizer states in one process, in float32: {"adamw": with AdamW everywhere, "muon": with Muon}.

    block_matrices: elements of all matrices inside the blocks; others: elements of embeddings, head and vectors. Step
    counts are left out.
    """
    raise NotImplementedError


def exchange_bytes(elements: int, world_size: int) -> dict[str, int]:
    """Bytes that one rank sends to others in a step so that Muon sees whole matrices; float32, everything divides.

    Every rank holds 1 / world_size of each matrix's momentum; elements: of all Muon matrices together.

    "all_gather": every rank gets every whole matrix (ring), orthogonalises all, and keeps its shard of each.
    "all_to_all": every matrix has an owner, each rank owning 1 / world_size of the elements. Shards go to the owners,
    the owners orthogonalise, and shards of the result come back.
    """
    raise NotImplementedError


def sharded_update(shard: Tensor, orthogonalize: Callable[[Tensor], Tensor]) -> Tensor:
    """This rank's rows of the orthogonalised matrix, from this rank's rows of the matrix.

    shard: float32 [rows / world_size, columns]; rank 0 has the first rows. Returns the same shape. Called on every
    rank, in a torch.distributed process group.
    """
    raise NotImplementedError
