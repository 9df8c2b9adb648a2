"""Published figures of what a rank holds are reproduced. (Against live tensors: test_books.py.)"""

import subprocess
import sys

import pytest

from strategies.ledger.predict import Group, Run, predict_memory

STATES = ("parameters", "master parameters", "gradients", "optimizer states")


def test_prediction_needs_no_torch_and_is_quick_for_a_trillion_parameters() -> None:
    code = """
import sys, time
from strategies.ledger.predict import Group, Run, predict_memory
width, layers = 25600, 128
shapes = {f"{layer}.{i}": (width, 12 * width // 4) for layer in range(layers) for i in range(4)}
group = Group("all", tuple(shapes), False)
start = time.perf_counter()
for name in ("single", "ddp", "fsdp", "zero1", "zero2", "zero3"):
    run = Run(name, shapes, [group], 1 if name == "single" else 1024, "bf16")
    assert run.parameters > 1e12 and predict_memory(run)
assert "torch" not in sys.modules
print(time.perf_counter() - start)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 5  # tens of milliseconds a strategy; the bound is only against a quadratic one


@pytest.mark.parametrize(
    ("name", "world_size", "published"),
    [
        # ZeRO paper (arXiv 1910.02054), Figure 1 (N = 64) and Table 1, 7.5B column. It keeps 2 bytes of parameters, 2
        # of gradients, 12 of master and moments per parameter, which is what DeepSpeed does in bf16.
        ("zero2", 4, 41.3), ("zero2", 16, 21.6), ("zero2", 64, 16.6), ("zero2", 256, 15.4), ("zero2", 1024, 15.1),
        ("zero3", 4, 30.0), ("zero3", 16, 7.5), ("zero3", 64, 1.9), ("zero3", 256, 0.47), ("zero3", 1024, 0.12),
    ],
)  # fmt: skip
def test_zero_papers_table(name: str, world_size: int, published: float) -> None:
    """One matrix is cut by every boundary, so its gradient stays whole under ZeRO-2: many matrices are not."""
    matrices = 3000
    shapes = {f"w{i}": (2500, 1000) for i in range(matrices)}
    run = Run(name, shapes, [Group("all", tuple(shapes), False)], world_size, "bf16")
    held = predict_memory(run)[0]["after backward"]
    gigabytes = sum(held[category] for category in STATES) / 1e9
    assert gigabytes == pytest.approx(published, abs=0.06 if published > 1 else 0.006)
