"""Questions to a Python process of its own: an import that crashes or hangs there is a find, not the doctor's end."""

import json
import subprocess
import sys
from typing import Any


class Unanswered(Exception):
    """The process did not answer; the message says why, in one line."""


TORCH = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
count = torch.cuda.device_count() if cuda else 0
print(json.dumps({
    "gpus": count,
    "capabilities": [torch.cuda.get_device_capability(i) for i in range(count)],
    "architectures": torch.cuda.get_arch_list() if cuda else [],
    "bf16": all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(count)),
    "nccl": list(torch.cuda.nccl.version()) if cuda and dist.is_nccl_available() else [],
    "gloo": dist.is_gloo_available(),
}))
"""
"""What torch says of itself and of the GPUs once it is loaded."""

DEEPSPEED = """
import json, shutil, torch
from strategies.zero.engine import import_deepspeed
deepspeed = import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
from deepspeed.git_version_info import installed_ops, torch_info
from deepspeed.ops.op_builder.builder import installed_cuda_version
try:
    nvcc = list(installed_cuda_version())
except Exception:
    nvcc = []
print(json.dumps({
    "version": deepspeed.__version__,
    "built": sorted(name for name, there in installed_ops.items() if there),
    "built_for": torch_info["version"],
    "torch": torch.__version__,
    "torch_cuda": torch.version.cuda,
    "nvcc": nvcc,
    "ninja": shutil.which("ninja") is not None,
    "compiler": shutil.which("c++") is not None or shutil.which("g++") is not None,
}))
"""
"""What DeepSpeed says of itself and of the operators it comes with or could compile."""


def ask(code: str, timeout: float) -> dict[str, Any]:
    """Run code that prints a JSON object as its last line; returns it. Raises Unanswered."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"no answer within {timeout:.0f} s") from None
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), "without a message")
        raise Unanswered(last if done.returncode > 0 else f"ended by signal {-done.returncode}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise Unanswered("its answer is no JSON") from None
    return answer
