"""The GPT, one idea per file: gpt; attention, rope, masks, mlp, norm; embeddings, skips, loss, untying."""

from speedrun.model.gpt import GPT, Block, parameter_shapes

__all__ = ["GPT", "Block", "parameter_shapes"]
