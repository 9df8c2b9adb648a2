"""Wrong attempts at lesson 1, and what their message must say."""

import torch.nn.functional as F
from torch import nn, optim

from lessons.checking import wrong_attempt


@wrong_attempt("training_bytes", says="AdamW keeps two")
def one_moment(parameters):
    return {"parameters": 4 * parameters, "gradients": 4 * parameters, "optimizer states": 4 * parameters}


@wrong_attempt("training_bytes", says="Gradients are there too")
def no_gradients(parameters):
    return {"parameters": 4 * parameters, "gradients": 0, "optimizer states": 8 * parameters}


@wrong_attempt("training_bytes", says="a bfloat16")
def half_precision(parameters):
    return {"parameters": 2 * parameters, "gradients": 2 * parameters, "optimizer states": 8 * parameters}


@wrong_attempt("gigabytes_32b", says="GiB")
def gib_for_gb():
    return 32e9 * 16 / 2**30


@wrong_attempt("gigabytes_32b", says="parameters alone")
def parameters_alone():
    return 128


@wrong_attempt("gigabytes_32b", says="master copy")
def with_masters():
    return 640.0


@wrong_attempt("logits_bytes", says="their gradient is as large")
def without_gradient(rows, length, vocabulary):
    return 4 * rows * length * vocabulary


@wrong_attempt("logits_bytes", says="rows of the batch")
def one_row(rows, length, vocabulary):
    return 8 * length * vocabulary


@wrong_attempt("held_bytes", says="tied weight twice")
def every_tensor(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@wrong_attempt("held_bytes", says="a bfloat16 has 2")
def all_float32(tensors):
    return sum(4 * tensor.numel() for tensor in tensors)


@wrong_attempt("held_bytes", says="keeps the whole storage alive")
def own_elements(tensors):
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _loss(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@wrong_attempt("training_step", says="zero_grad")
def never_cleared(model, optimizer, inputs, targets):
    loss = _loss(model, inputs, targets)
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong_attempt("training_step", says="do not change")
def cleared_too_early(model, optimizer, inputs, targets):
    loss = _loss(model, inputs, targets)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


@wrong_attempt("training_step", says="keep the graph")
def loss_as_tensor(model, optimizer, inputs, targets):
    loss = _loss(model, inputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@wrong_attempt("training_step", says="updates before the backward pass")
def updated_too_early(model, optimizer, inputs, targets):
    loss = _loss(model, inputs, targets)
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


@wrong_attempt("training_bytes", says="which have an entry of their own")
def gradients_among_the_parameters(parameters):
    return {"parameters": 8 * parameters, "gradients": 4 * parameters, "optimizer states": 8 * parameters}


@wrong_attempt("training_bytes", says="master copy of the weights")
def masters_of_float32(parameters):
    return {"parameters": 4 * parameters, "gradients": 4 * parameters, "optimizer states": 12 * parameters}


@wrong_attempt("training_bytes", says="has no entry 'optimizer states'")
def another_name(parameters):
    return {"parameters": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters}


@wrong_attempt("gigabytes_32b", says="without the gradients")
def gradients_forgotten():
    return 384.0


@wrong_attempt("gigabytes_32b", says="states are forgotten")
def no_states():
    return 256.0


@wrong_attempt("logits_bytes", says="two bytes per number")
def in_bfloat16(rows, length, vocabulary):
    return 2 * 2 * rows * length * vocabulary


@wrong_attempt("logits_bytes", says="one number for every token")
def one_number_a_token(rows, length, vocabulary):
    return 2 * 4 * rows * length


@wrong_attempt("logits_bytes", says="a third tensor")
def the_softmax_too(rows, length, vocabulary):
    return 3 * 4 * rows * length * vocabulary


@wrong_attempt("held_bytes", says="another data_ptr() of its own")
def by_the_tensors_address(tensors):
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@wrong_attempt("held_bytes", says="counts elements")
def elements(tensors):
    return sum(tensor.numel() for tensor in tensors)


@wrong_attempt("held_bytes", says="[the whole of A (float32 [1, 3]), the bytes of A (float32 [1, 3])]")
def by_address_and_dtype(tensors):
    found = {(t.untyped_storage().data_ptr(), t.dtype): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


@wrong_attempt("held_bytes", says="[the whole of A (float32 [1, 3]), the whole of C (float32 [1, 3])]")
def by_size(tensors):
    return sum({t.untyped_storage().nbytes() for t in tensors})


@wrong_attempt("training_step", says="at its end alone")
def cleared_at_the_end(model, optimizer, inputs, targets):
    loss = _loss(model, inputs, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@wrong_attempt("training_step", says="forward passes")
def loss_of_another_forward(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    _loss(model, inputs, targets).backward()
    optimizer.step()
    return _loss(model, inputs, targets).item()


@wrong_attempt("training_step", says="Do not make one of your own")
def own_optimizer(model, optimizer, inputs, targets):
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    loss = _loss(model, inputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong_attempt("training_step", says="sum over all 10 tokens")
def summed_for_the_record(model, optimizer, inputs, targets):
    loss = _loss(model, inputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item() * targets.numel()


@wrong_attempt("training_step", says="its training was True")
def left_in_evaluation(model, optimizer, inputs, targets):
    loss = _loss(model.eval(), inputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong_attempt("training_step", says="those of the sum over all 10 tokens")
def gradient_of_the_sum(model, optimizer, inputs, targets):
    loss = _loss(model, inputs, targets)
    optimizer.zero_grad()
    (loss * targets.numel()).backward()
    optimizer.step()
    return loss.item()


@wrong_attempt("training_step", says="is invalid for input of size")
def a_vocabulary_of_eleven(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs).view(-1, 11), targets.view(-1))
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong_attempt("training_step", says="With weights so large that gradients are")
def clipped_at_five(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    loss = _loss(model, inputs, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return loss.item()


@wrong_attempt("training_step", says="With a learning rate of zero the weights change")
def decayed_a_little(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    loss = _loss(model, inputs, targets)
    loss.backward()
    optimizer.step()
    for p in model.parameters():
        p.data.mul_(1 - 1e-6)
    return loss.item()
