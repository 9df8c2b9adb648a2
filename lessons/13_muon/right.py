"""Other right solutions of lesson 13, differently built: the check must pass them."""

import torch
import torch.distributed as dist

from lessons.checking import right_attempt


@right_attempt("orthogonal")
def by_eigenvalues(gradient):
    """(G · Gᵀ)^(−1/2) · G, in float64, on the smaller side."""
    matrix = gradient.double()
    tall = len(matrix) > matrix.shape[1]
    matrix = matrix.T if tall else matrix
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    result = vectors / values.sqrt() @ vectors.T @ matrix
    return (result.T if tall else result).float()


@right_attempt("newton_schulz")
def on_either_side(gradient, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient / (torch.linalg.norm(gradient) + 1e-7 * 0)
    for _ in range(steps):
        if x.shape[0] > x.shape[1]:
            gram = x.mT @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@right_attempt("uses_muon")
def by_parts(name, shape):
    return name.split(".")[0] == "blocks" and shape[1:] != () and shape[2:] == ()


@right_attempt("muon_step")
def with_copies(weight, gradient, buffer, lr, momentum, orthogonalize):
    buffer.mul_(momentum).add_(gradient, alpha=1 - momentum)
    ahead = gradient * (1 - momentum) + buffer * momentum
    scale = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
    weight.copy_(weight - orthogonalize(ahead) * (lr * scale))


@right_attempt("sharded_update")
def by_an_owner(shard, orthogonalize):
    """Gathered on rank 0, which sends the result back."""
    world = dist.get_world_size()
    mine = shard.contiguous()
    if dist.get_rank():
        dist.gather(mine, dst=0)
        found = torch.empty_like(mine)
        dist.scatter(found, src=0)
        return found
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.gather(mine, parts, dst=0)
    whole = orthogonalize(torch.cat(parts))
    found = torch.empty_like(mine)
    dist.scatter(found, [part.contiguous() for part in whole.chunk(world)], src=0)
    return found
