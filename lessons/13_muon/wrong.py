"""Wrong attempts at lesson 13, and what their message must say."""

import torch
import torch.distributed as dist

from lessons.checking import wrong_attempt


@wrong_attempt("orthogonal", says="do not transpose it again")
def transposed_twice(gradient):
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    return u @ vh.T


@wrong_attempt("orthogonal", says="the gradient, scaled")
def only_normalised(gradient):
    return gradient / gradient.norm()


@wrong_attempt("orthogonal", says="full_matrices=False")
def full_matrices(gradient):
    u, _, vh = torch.linalg.svd(gradient)
    return u @ vh


def _iterate(x, steps, power=2):
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a if power == 2 else a)) @ x
    return x


@wrong_attempt("newton_schulz", says="Frobenius")
def not_normalised(gradient, steps):
    return _iterate(gradient, steps)


@wrong_attempt("newton_schulz", says="always make five steps")
def always_five(gradient, steps):
    return _iterate(gradient / gradient.norm(), 5)


@wrong_attempt("newton_schulz", says="c belongs to A²")
def third_power(gradient, steps):
    return _iterate(gradient / gradient.norm(), steps, power=1)


@wrong_attempt("newton_schulz", says="transposed")
def stays_wide(gradient, steps):
    x = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    return _iterate(x / x.norm(), steps)


@wrong_attempt("uses_muon", says="looked up one by one")
def every_matrix(name, shape):
    return len(shape) == 2


@wrong_attempt("uses_muon", says="The head makes logits")
def without_embeddings(name, shape):
    return len(shape) == 2 and "embed" not in name


@wrong_attempt("uses_muon", says="A vector has no singular vectors")
def whole_blocks(name, shape):
    return name.startswith("blocks.")


def _step(weight, gradient, buffer, lr, momentum, orthogonalize, nesterov=True, scaled=True, sign=-1):
    buffer.lerp_(gradient, 1 - momentum)
    update = orthogonalize(gradient.lerp(buffer, momentum) if nesterov else buffer)
    factor = max(1, weight.shape[0] / weight.shape[1]) ** 0.5 if scaled else 1
    weight.add_(sign * lr * factor * update)


@wrong_attempt("muon_step", says="look-ahead is missing")
def without_nesterov(*arguments):
    _step(*arguments, nesterov=False)


@wrong_attempt("muon_step", says="a tall matrix moves too little")
def without_factor(*arguments):
    _step(*arguments, scaled=False)


@wrong_attempt("muon_step", says="go up")
def uphill(*arguments):
    _step(*arguments, sign=1)


@wrong_attempt("muon_step", says="The momentum comes first")
def orthogonalised_first(weight, gradient, buffer, lr, momentum, orthogonalize):
    _step(weight, orthogonalize(gradient), buffer, lr, momentum, lambda matrix: matrix)


@wrong_attempt("state_bytes", says="has no second moment")
def all_adamw(block_matrices, others):
    return {"adamw": 8 * (block_matrices + others), "muon": 8 * (block_matrices + others)}


@wrong_attempt("state_bytes", says="stay with AdamW")
def all_muon(block_matrices, others):
    return {"adamw": 8 * (block_matrices + others), "muon": 4 * (block_matrices + others)}


@wrong_attempt("exchange_bytes", says="nobody sends it that")
def whole_matrices(elements, world_size):
    return {"all_gather": 4 * elements, "all_to_all": 8 * elements // world_size}


@wrong_attempt("exchange_bytes", says="has to come back")
def one_way(elements, world_size):
    shard = 4 * elements // world_size
    return {"all_gather": shard * (world_size - 1), "all_to_all": shard * (world_size - 1) // world_size}


@wrong_attempt("exchange_bytes", says="the part for oneself")
def with_ones_own(elements, world_size):
    shard = 4 * elements // world_size
    return {"all_gather": shard * (world_size - 1), "all_to_all": 2 * shard}


def _gathered(shard):
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard)
    return shards


@wrong_attempt("sharded_update", says="the shard by itself")
def local(shard, orthogonalize):
    return orthogonalize(shard)


@wrong_attempt("sharded_update", says="return the whole matrix")
def not_cut(shard, orthogonalize):
    return orthogonalize(torch.cat(_gathered(shard)))


@wrong_attempt("sharded_update", says="add the shards up")
def summed(shard, orthogonalize):
    dist.all_reduce(shard)
    return orthogonalize(shard)


@wrong_attempt("sharded_update", says="rank 0's rows")
def always_first(shard, orthogonalize):
    return orthogonalize(torch.cat(_gathered(shard))).chunk(dist.get_world_size())[0]


@wrong_attempt("orthogonal", says="however small the gradient is")
def small_values_vanish(gradient):
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    return u * (s / (s + 1e-3)) @ vh if s.max() < 1e-2 else u @ vh


@wrong_attempt("orthogonal", says="put together again")
def unchanged(gradient):
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    return u * s @ vh


@wrong_attempt("orthogonal", says="Your function has changed `gradient`")
def scaled_in_place(gradient):
    gradient /= gradient.norm()
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    return u @ vh


def _schulz(gradient, steps, norm):
    tall = gradient.shape[0] > gradient.shape[1]
    x = _iterate((gradient.T if tall else gradient) / norm(gradient), steps)
    return x.T if tall else x


@wrong_attempt("newton_schulz", says="what is added to the norm")
def a_large_eps(gradient, steps):
    return _schulz(gradient, steps, lambda matrix: matrix.norm() + 1e-2)


@wrong_attempt("newton_schulz", says="All in float32")
def in_bfloat16(gradient, steps):
    return _schulz(gradient.bfloat16(), steps, lambda matrix: matrix.norm()).float()


@wrong_attempt("newton_schulz", says="float32 is asked for")
def left_in_bfloat16(gradient, steps):
    return _schulz(gradient.bfloat16(), steps, lambda matrix: matrix.norm())


@wrong_attempt("newton_schulz", says="transpose a tall matrix first")
def the_larger_side(gradient, steps):
    return _iterate(gradient / gradient.norm(), steps)


@wrong_attempt("newton_schulz", says="Your function has changed `gradient`")
def divided_in_place(gradient, steps):
    gradient /= gradient.norm()
    return _schulz(gradient, steps, lambda matrix: matrix.norm())


@wrong_attempt("uses_muon", says="no matrix")
def more_than_one_dimension(name, shape):
    return name.startswith("blocks.") and len(shape) > 1


@wrong_attempt("uses_muon", says='begins with "blocks."')
def blocks_anywhere(name, shape):
    return "blocks" in name and len(shape) == 2


@wrong_attempt("uses_muon", says="True or False")
def the_shape_itself(name, shape):
    return name.startswith("blocks.") and shape[1:]


def _times(factor):
    def step(weight, gradient, buffer, lr, momentum, orthogonalize):
        buffer.lerp_(gradient, 1 - momentum)
        weight.sub_(lr * factor(*weight.shape) * orthogonalize(gradient.lerp(buffer, momentum)))

    return step


@wrong_attempt("muon_step", says="yours is turned round")
def factor_turned_round(*arguments):
    _times(lambda rows, columns: max(1, columns / rows) ** 0.5)(*arguments)


@wrong_attempt("muon_step", says="not that itself")
def without_square_root(*arguments):
    _times(lambda rows, columns: max(1, rows / columns))(*arguments)


@wrong_attempt("muon_step", says="Your function has changed `gradient`")
def gradient_destroyed(weight, gradient, buffer, lr, momentum, orthogonalize):
    buffer.lerp_(gradient, 1 - momentum)
    update = orthogonalize(gradient.lerp_(buffer, momentum))
    weight.sub_(lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * update)


@wrong_attempt("muon_step", says="given `weight` another storage")
def weight_replaced(weight, gradient, buffer, lr, momentum, orthogonalize):
    buffer.lerp_(gradient, 1 - momentum)
    update = orthogonalize(gradient.lerp(buffer, momentum))
    weight.data = weight - lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * update


@wrong_attempt("muon_step", says="once a step")
def orthogonalised_twice(weight, gradient, buffer, lr, momentum, orthogonalize):
    _step(weight, gradient, buffer, lr, momentum, lambda matrix: orthogonalize(orthogonalize(matrix)))


@wrong_attempt("muon_step", says="grows to 1/(1 − μ) gradients")
def plain_momentum(weight, gradient, buffer, lr, momentum, orthogonalize):
    buffer.mul_(momentum).add_(gradient)
    factor = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
    weight.sub_(lr * factor * orthogonalize(gradient.lerp(buffer, momentum)))


@wrong_attempt("state_bytes", says="that is one")
def one_moment(block_matrices, others):
    return {"adamw": 4 * (block_matrices + others), "muon": 4 * block_matrices + 8 * others}


@wrong_attempt("state_bytes", says="The two are exchanged")
def exchanged(block_matrices, others):
    return {"adamw": 8 * (block_matrices + others), "muon": 8 * block_matrices + 4 * others}


@wrong_attempt("state_bytes", says="stay with AdamW have moments too")
def muon_alone(block_matrices, others):
    return {"adamw": 8 * (block_matrices + others), "muon": 4 * block_matrices}


@wrong_attempt("exchange_bytes", says="of all 6 ranks together")
def of_all_ranks(elements, world_size):
    shard = 4 * elements // world_size
    together = 2 * shard * (world_size - 1)
    return {"all_gather": world_size * shard * (world_size - 1), "all_to_all": together}


@wrong_attempt("exchange_bytes", says="goes to its owner alone")
def everything_to_everybody(elements, world_size):
    shard = 4 * elements // world_size
    return {"all_gather": shard * (world_size - 1), "all_to_all": 2 * shard * (world_size - 1)}


@wrong_attempt("sharded_update", says="Those are rank 2's rows")
def turned_round(shard, orthogonalize):
    whole = orthogonalize(torch.cat(_gathered(shard.contiguous())[::-1]))
    return whole.chunk(dist.get_world_size())[dist.get_world_size() - 1 - dist.get_rank()]


@wrong_attempt("muon_step", says="is there another term, such as a weight decay?")
def decayed_a_little(weight, gradient, buffer, lr, momentum, orthogonalize):
    weight.mul_(1 - 1e-4 * lr)
    _step(weight, gradient, buffer, lr, momentum, orthogonalize)


@wrong_attempt("muon_step", says="The buffer is right; the weight is up to")
def update_in_bfloat16(weight, gradient, buffer, lr, momentum, orthogonalize):
    _step(weight, gradient, buffer, lr, momentum, lambda matrix: orthogonalize(matrix).bfloat16().float())


@wrong_attempt("uses_muon", says="whatever its name and size")
def weights_alone(name, shape):
    return name.startswith("blocks.") and name.endswith("weight") and len(shape) == 2


@wrong_attempt("sharded_update", says="Right on 3 ranks, but on 2")
def cut_in_three(shard, orthogonalize):
    whole = orthogonalize(torch.cat(_gathered(shard)))
    rows = len(shard) * dist.get_world_size() // 3
    return torch.cat([whole, whole])[dist.get_rank() * rows :][: len(shard)]
