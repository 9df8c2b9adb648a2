"""Other right solutions of lesson 1, differently built: the check must pass them."""

import torch

from lessons.checking import right_attempt


@right_attempt("held_bytes")
def one_after_another(tensors):
    seen, total = set(), 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.size()
    return total


@right_attempt("training_step")
def by_log_softmax(model, optimizer, inputs, targets):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    loss = -torch.log_softmax(model(inputs), -1).gather(-1, targets.unsqueeze(-1)).mean()
    loss.backward()
    optimizer.step()
    return float(loss)


@right_attempt("training_step")
def cleared_before_and_after(model, optimizer, inputs, targets):
    optimizer.zero_grad(set_to_none=False)
    logits = model(inputs)
    loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
