"""Wrong attempts at lesson 2, and what their message must say."""

import torch
from torch import nn

from lessons.checking import wrong_attempt


@wrong_attempt("mixed_precision_gigabytes", says="master weights")
def without_masters(parameters):
    return 12 * parameters / 1e9


@wrong_attempt("mixed_precision_gigabytes", says="GiB")
def in_gib(parameters):
    return 16 * parameters / 2**30


@wrong_attempt("mixed_precision_gigabytes", says="float32 gradients")
def float32_gradients(parameters):
    return 18 * parameters / 1e9


@wrong_attempt("autocast_bytes", says="does not change the parameters")
def cast_parameters(parameters, linear_weights):
    return {
        "parameters": 2 * parameters,
        "gradients": 2 * parameters,
        "optimizer states": 12 * parameters,
        "weight casts": 0,
    }


@wrong_attempt("autocast_bytes", says="Only weights of linear layers")
def everything_is_cast(parameters, linear_weights):
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer states": 8 * parameters,
        "weight casts": 2 * parameters,
    }


@wrong_attempt("autocast_bytes", says="its parameter's dtype")
def half_gradients(parameters, linear_weights):
    return {
        "parameters": 4 * parameters,
        "gradients": 2 * parameters,
        "optimizer states": 8 * parameters,
        "weight casts": 2 * linear_weights,
    }


@wrong_attempt("linear_dtypes", says="look at the weights")
def weights_dtypes(model, inputs):
    return {name: m.weight.dtype for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@wrong_attempt("linear_dtypes", says="where nothing is computed in it")
def what_was_asked_for(model, inputs):
    return {name: torch.bfloat16 for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@wrong_attempt("linear_dtypes", says="still on the model")
def hooks_stay(model, inputs):
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, i, output, name=name: found.update({name: output.dtype}))
    model(inputs)
    return found


@wrong_attempt("master_step", says="rounded away")
def in_bfloat16(weight, master, gradient, lr):
    weight.sub_(lr * gradient)


@wrong_attempt("master_step", says="old weights")
def never_copied(weight, master, gradient, lr):
    master.sub_(lr * gradient.float())


@wrong_attempt("master_step", says="rounded away")
def master_from_weight(weight, master, gradient, lr):
    master.sub_(lr * gradient.float())
    weight.copy_(master)
    master.copy_(weight)


@wrong_attempt("take_masters", says="after the model had been rounded")
def masters_of_the_rounded_model(model):
    model.bfloat16()
    return {name: p.detach().float() for name, p in model.named_parameters()}


@wrong_attempt("take_masters", says="still float32")
def a_copy_is_rounded(model):
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.detach().bfloat16()
    return masters


@wrong_attempt("take_masters", says="lacks 2.bias")
def matrices_only(model):
    masters = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
    model.bfloat16()
    return masters


@wrong_attempt("quantize_e4m3", says="Divide by the scale")
def without_scale(x):
    return x.to(torch.float8_e4m3fn), torch.ones(())


@wrong_attempt("quantize_e4m3", says="wrong way round")
def inverted(x):
    scale = 448 / x.abs().max().clamp(min=1e-30)
    return (x * scale).to(torch.float8_e4m3fn), scale


@wrong_attempt("quantize_e4m3", says="tensor of zeros")
def zero_scale(x):
    scale = x.abs().max() / 448
    return (x / scale).to(torch.float8_e4m3fn), scale
