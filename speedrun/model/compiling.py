"""torch.compile as a switch: every block is compiled by itself, the rest of the model stays as it is.

Blocks that are alike share one compilation, and FSDP's hooks on a block run uncompiled around it. Kernels are fused and
sums taken in another order, so losses agree with the uncompiled run's to rounding only.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from speedrun.config import ModelConfig
from speedrun.model.gpt import GPT
from strategies.errors import UserError


def compile_blocks(model: GPT, cpu: bool) -> None:
    """Compile in place, at the first forward pass. Call it before the strategy takes the model.

    Raises ValueError where that cannot work.
    """
    compiler = os.environ.get("CXX", "g++")
    if cpu and not (shutil.which(compiler) or shutil.which("clang++")):
        raise UserError(
            f"compile = True needs a C++ compiler on a CPU, and there is no {compiler}: install g++, or --no-compile"
        )
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else further variants run uncompiled without a word
    for block in model.blocks:
        block.compile()


def without_spaces() -> None:
    """torch's C++ compilation on a CPU cannot handle spaces in the paths of temporary files: put these elsewhere then.

    Raises ValueError where there is no such place, or torch itself lies in such a path.
    """
    if " " in torch.__file__:
        raise UserError(
            f"torch lies in {torch.__file__!r}, and its C++ compilation cannot handle the space in that path: use "
            "--no-compile, or a virtual environment whose path has none."
        )
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if " " in cache:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    if " " not in tempfile.gettempdir():
        return
    place = next((folder for folder in ("/tmp", "/var/tmp") if os.access(folder, os.W_OK)), None)
    if place is None:
        raise UserError(
            f"Temporary files lie in {tempfile.gettempdir()!r}, and torch's C++ compilation cannot handle the space in "
            "that path: set TMPDIR to a folder without one, or use --no-compile."
        )
    tempfile.tempdir = os.environ["TMPDIR"] = place


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While open, the blocks of a model (plain or wrapped) run as they are written: so that hooks and dispatch modes
    see inside. FlexAttention stays compiled, it never runs otherwise.

    Under a dispatch mode torch.compile would not only leave a block uncompiled by itself, but from then on for good.
    """
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def variants(model: ModelConfig, shapes: Collection[tuple[int, int]]) -> int:
    """At most so many variants of one function a run compiles. shapes: of its micro-batches, (rows, tokens).

    A stage's windows and scales make none. A shape makes one with gradients, and validation one without. FlexAttention
    has two per shape, one for layers of paired heads; blocks share one function and each layer may be a variant of its
    own, though those of the same parts share one.
    """
    return max(2, model.layers) * (len(set(shapes)) + 1)


def allow_variants(model: ModelConfig, shapes: Collection[tuple[int, int]]) -> None:
    """Raise torch.compile's limit of variants per function to twice what the run needs. What exceeds it ends the run:
    FlexAttention (speedrun/model/flex.py) and compiled blocks never go on uncompiled.
    """
    config, limit = torch._dynamo.config, 2 * variants(model, shapes)
    config.recompile_limit = max(limit, config.recompile_limit)
    config.accumulated_recompile_limit = max(limit, config.accumulated_recompile_limit)
