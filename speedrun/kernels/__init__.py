"""Triton kernels for the parts of a step where a GPU waits for memory or repeats work, each beside plain torch.

    symmetric.py      X·Xᵀ and b·A + c·A² for Muon: one triangle computed, the other mirrored
    relu2.py          a linear layer that squares its ReLU before anything is written to memory
    cross_entropy.py  the loss from hidden states, so that the logits never exist as a whole
    fp8.py            quantisation to 8 bits, and the linear layers that multiply what comes out
    tiles.py          the product of two tiles, which all of them are built on
    measured.py       which of them pays on which shape: of Muon's products the polynomial, X·Xᵀ does not

A kernel is an operator of `torch.library`: autograd knows its gradient, torch.compile keeps it as it is. Every file has
the same thing in plain torch as `..._reference`; tests hold the two together, on the CPU by Triton's interpreter
(TRITON_INTERPRET=1 in the environment before Triton is imported).

This file imports neither Triton nor a kernel. The other files but fp8.py, fp8_linear.py and measured.py need Triton;
whoever uses them imports them on the spot, where `use_triton` says so.
"""

import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from speedrun.config import Kernels
from speedrun.kernels.measured import Kernel, pays
from strategies.errors import UserError

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors, in numpy and slowly, and never on a GPU."""


def choose(asked: Kernels, device: str, precision: str) -> tuple[Literal["triton", "torch"], str]:
    """Resolve `model.kernels` for a run: the choice, and the reason for it as a sentence's end.

    device: 'cuda' or 'cpu', where the run computes; precision: 'fp32', 'bf16' or 'fp16', of its matrix products.

    Raises ValueError where Triton is asked for and cannot run.
    """
    if asked == "torch":
        return "torch", "as asked"
    if not INSTALLED:
        hindrance = "Triton is not installed"
    elif device != "cuda" and not INTERPRETED:
        hindrance = f"the run computes on {device} and Triton needs a CUDA GPU"
    elif asked == "auto" and device != "cuda":
        hindrance = f"the run computes on {device}"
    elif asked == "auto" and precision == "fp32":
        hindrance = "the run computes in fp32 and the kernels pay in bf16"
    elif precision == "fp16":
        hindrance = "the run computes in fp16, and the fused loss makes its gradients before the loss scale lifts them"
    else:
        why = "as asked" if asked == "triton" else "a CUDA GPU, bf16 and Triton are there"
        return "triton", f"{why}; each where it pays"
    if asked == "triton":
        raise UserError(f"model.kernels is triton, but {hindrance}: use model.kernels torch or auto.")
    return "torch", hindrance


def use_triton(asked: Kernels, tensor: Tensor, kernel: Kernel, shape: tuple[int, ...]) -> bool:
    """Whether our Triton kernel takes this tensor; `auto` takes what is 16 bits wide, or is about to be, on a GPU.

    shape: of the product, as in `measured.TIMES_FASTER`; nobody takes a kernel that does not pay there. The interpreter
    is for tests, and takes all of them.

    Raises ValueError where Triton is asked for and the tensor is on a CPU, or in float64.
    """
    if asked == "torch":
        return False
    if asked == "auto":
        there = INSTALLED and not INTERPRETED and tensor.is_cuda
        return there and compute_dtype(tensor) == torch.bfloat16 and pays(kernel, shape)
    if not INSTALLED or not (tensor.is_cuda or INTERPRETED):
        choose(asked, tensor.device.type, "")
    if tensor.dtype == torch.float64:
        raise UserError(
            "model.kernels is triton, but the model is in float64 and the kernels add up in float32: "
            "use model.kernels torch."
        )
    return INTERPRETED or pays(kernel, shape)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What matrix products are computed in: autocast's dtype inside autocast, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
