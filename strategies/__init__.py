"""How a trainer is spread over ranks. Knows nn.Module and torch.optim.Optimizer, never the trainer itself.

`select.launched()` reads what the accelerate config asked for; `select.start()` gives the Strategy that does it.
catalogue.py is the list of strategies, and each is a folder.
"""
