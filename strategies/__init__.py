"""How a trainer is spread over ranks. Knows nn.Module and torch.optim.Optimizer, never the trainer itself.

`select.launched()` reads what the accelerate config asked for; `select.strategy()` makes the Strategy that does it.
"""
