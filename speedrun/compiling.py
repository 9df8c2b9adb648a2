"""torch.compile as a switch: every block is compiled by itself, the rest of the model stays as it is.

Blocks that are alike share one compilation, and FSDP's hooks on a block run uncompiled around it. Kernels are fused and
sums taken in another order, so losses agree with the uncompiled run's to rounding only.
"""

import os
import shutil

import torch

from speedrun.config import Config
from speedrun.model import GPT
from strategies.select import Launch


def compile_blocks(model: GPT, config: Config, launch: Launch) -> None:
    """Compile in place, at the first forward pass. Call it before the strategy takes the model.

    Raises ValueError where that cannot work.
    """
    if launch.strategy == "zero3":
        raise ValueError(
            "compile = True does not go with ZeRO-3: DeepSpeed's hooks on every layer cut what is compiled into pieces "
            "and use up torch's limit of recompilations; use ZeRO-2 or FSDP, or --no-compile"
        )
    compiler = os.environ.get("CXX", "g++")
    if launch.cpu and not (shutil.which(compiler) or shutil.which("clang++")):
        raise ValueError(
            f"compile = True needs a C++ compiler on a CPU, and there is no {compiler}: install g++, or --no-compile"
        )
    # Blocks share their code but not their windows, heads and gates, and stages change windows: each variant is one
    # more compilation of the same function, and past the limit it would run uncompiled without a word.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        block.compile()
