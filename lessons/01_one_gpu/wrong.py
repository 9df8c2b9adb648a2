"""Wrong attempts at lesson 1, and what their message must say."""

import torch.nn.functional as F

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
