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


@wrong_attempt("linear_dtypes", says="hooks are still on it")
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


@wrong_attempt("mixed_precision_gigabytes", says="two bytes are forgotten")
def no_gradients(parameters):
    return 14 * parameters / 1e9


@wrong_attempt("mixed_precision_gigabytes", says="a master copy on top")
def all_float32_and_masters(parameters):
    return 20 * parameters / 1e9


@wrong_attempt("mixed_precision_gigabytes", says="the optimizer keeps its three numbers in float32")
def all_in_16_bits(parameters):
    return 10 * parameters / 1e9


@wrong_attempt("autocast_bytes", says="That includes a master copy")
def with_masters(parameters, linear_weights):
    return _autocast(parameters, linear_weights, states=12 * parameters)


@wrong_attempt("autocast_bytes", says="2 bytes each")
def float32_casts(parameters, linear_weights):
    return _autocast(parameters, linear_weights, casts=4 * linear_weights)


@wrong_attempt("autocast_bytes", says="Autocast does keep copies")
def no_casts(parameters, linear_weights):
    return _autocast(parameters, linear_weights, casts=0)


def _autocast(parameters, linear_weights, states=None, casts=None):
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer states": 8 * parameters if states is None else states,
        "weight casts": 2 * linear_weights if casts is None else casts,
    }


@wrong_attempt("linear_dtypes", says="all hooks wrote under the last name")
def late_binding(model, inputs):
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(lambda m, i, output: found.update({name: output.dtype})))  # noqa: B023
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


@wrong_attempt("linear_dtypes", says="also goes into modules of modules")
def children_only(model, inputs):
    found, handles = {}, []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o.dtype})))
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


@wrong_attempt("linear_dtypes", says="the model is called 6 times")
def once_a_layer(model, inputs):
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handle = module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o.dtype}))
            model(inputs)
            handle.remove()
    return found


@wrong_attempt("linear_dtypes", says="Look at each layer's own output")
def asks_torch(model, inputs):
    model(inputs)
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    return {name: dtype for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@wrong_attempt("linear_dtypes", says="hooks that were on it are gone")
def all_hooks_cleared(model, inputs):
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o.dtype}))
    model(inputs)
    for module in model.modules():
        module._forward_hooks.clear()
    return found


@wrong_attempt("master_step", says="go up")
def upwards(weight, master, gradient, lr):
    master.add_(lr * gradient.float())
    weight.copy_(master)


@wrong_attempt("master_step", says="another storage")
def another_storage(weight, master, gradient, lr):
    master.sub_(lr * gradient.float())
    weight.data = master.bfloat16()


@wrong_attempt("master_step", says="round it to bfloat16 on the way")
def product_in_bfloat16(weight, master, gradient, lr):
    master.sub_(lr * gradient)
    weight.copy_(master)


@wrong_attempt("master_step", says="bfloat16 copy of now")
def copied_first(weight, master, gradient, lr):
    weight.copy_(master)
    master.sub_(lr * gradient.float())


@wrong_attempt("master_step", says="Your function has changed `gradient`")
def gradient_destroyed(weight, master, gradient, lr):
    master.sub_(gradient.float() * lr)
    weight.copy_(master)
    gradient.zero_()


@wrong_attempt("take_masters", says="A parameter itself is rounded with its model")
def the_parameters_themselves(model):
    masters = dict(model.named_parameters())
    model.bfloat16()
    return masters


@wrong_attempt("take_masters", says="a tied weight has one master")
def by_state_dict(model):
    masters = {name: value.clone() for name, value in model.state_dict().items()}
    model.bfloat16()
    return masters


@wrong_attempt("take_masters", says="it has other entries than before")
def other_parameters(model):
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(p.detach().bfloat16(), requires_grad=p.requires_grad))
    return masters


@wrong_attempt("quantize_e4m3", says="larger in magnitude")
def largest_not_magnitude(x):
    scale = (x.max() / 448).abs().clamp(min=1e-30)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@wrong_attempt("quantize_e4m3", says="Your function has changed `x`")
def in_place(x):
    scale = (x.abs().max() / 448).clamp(min=1e-30)
    return x.div_(scale).to(torch.float8_e4m3fn), scale


@wrong_attempt("quantize_e4m3", says="one for the whole of x")
def a_scale_per_row(x):
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
    return (x / scale).to(torch.float8_e4m3fn), scale


@wrong_attempt("quantize_e4m3", says="float32 is asked for")
def scale_in_float64(x):
    scale = (x.double().abs().max() / 448).clamp(min=1e-30)
    return (x / scale).to(torch.float8_e4m3fn), scale


@wrong_attempt("quantize_e4m3", says="precision is wasted")
def something_added(x):
    scale = (x.abs().max() + 1e-6) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


@wrong_attempt("linear_dtypes", says="takes the output's place")
def hook_returns_something(model, inputs):
    found, handles = {}, []

    def note(module, arguments, output, name):
        found[name] = output.dtype
        return output.float() + 1

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: note(m, i, o, name)))
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


@wrong_attempt("linear_dtypes", says="still has the forward that you gave it")
def forward_replaced(model, inputs):
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def forward(x, before=module.forward, name=name):
                output = before(x)
                found[name] = output.dtype
                return output

            module.forward = forward
    model(inputs)
    return found


@wrong_attempt("take_masters", says="no optimizer takes it")
def still_in_the_graph(model):
    masters = {name: p.clone() for name, p in model.named_parameters()}
    model.bfloat16()
    return masters


@wrong_attempt("master_step", says="With a gradient of zero the master moves")
def decayed_a_little(weight, master, gradient, lr):
    master.mul_(1 - 1e-6 * lr).sub_(lr * gradient.float())
    weight.copy_(master)
