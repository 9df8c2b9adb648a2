"""Other right solutions of lesson 2, differently built: the check must pass them."""

import torch
from torch import nn

from lessons.checking import right_attempt


@right_attempt("linear_dtypes")
def by_one_hook_for_all(model, inputs):
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}

    def note(module, arguments, output):
        found[names[module]] = output.dtype

    handles = [module.register_forward_hook(note) for module in names]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


@right_attempt("master_step")
def out_of_place_and_copied(weight, master, gradient, lr):
    updated = master.to(torch.float64) - lr * gradient.to(torch.float64)
    master.copy_(updated)
    weight.copy_(master.to(torch.bfloat16))


@right_attempt("take_masters")
def one_by_one(model):
    masters = {}
    for name, p in model.named_parameters():
        masters[name] = p.data
        p.data = p.data.to(torch.bfloat16)
    return masters


@right_attempt("quantize_e4m3")
def by_multiplication(x):
    largest = torch.amax(x.abs()).clamp(min=1e-12)
    return (x * (448 / largest)).clamp(-448, 448).to(torch.float8_e4m3fn), (largest / 448).reshape(1)
