"""The parts of `python -m benchmarks.gpu`, in order of worth. Only the standard library in here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module, run as `python -m MODULE RESULT ARGUMENTS` (see results.py for what it gets and leaves)."""

    name: str
    title: str
    module: str
    seconds: int
    """Limit on a GPU. Guesses from a first run on an H100 with four cores."""
    packages: tuple[str, ...]
    """Without which it cannot run at all, by the names that they are imported by."""
    arguments: tuple[str, ...] = ()


TRAINER = ("numpy", "accelerate", "psutil", "yaml")
"""What the trainer imports beside torch when it runs under a strategy."""

PARTS = (
    Part("checks", "Kernels against float64", "benchmarks.gpu.checks", 150, ("numpy", "triton", "pytest")),
    Part(
        "run",
        "Twelve steps of `speedrun` over its four stages, the counted step inside",
        "benchmarks.gpu.run",
        240,
        (*TRAINER, "tyro"),
    ),
    Part(
        "books",
        "The books of one rank: predicted against allocated, at each moment",
        "benchmarks.gpu.books",
        240,
        TRAINER,
    ),
    Part("certificate", "The equivalence certificate on one rank, in fp32", "benchmarks.gpu.certificate", 150, TRAINER),
    Part("steps-gpt2", "A step of `gpt2`", "benchmarks.gpu.steps", 150, ("numpy",), ("gpt2",)),
    Part(
        "steps-speedrun", "A step of `speedrun`, stage by stage", "benchmarks.gpu.steps", 300, ("numpy",), ("speedrun",)
    ),
    Part(
        "kernels", "The kernels beside what they would have to beat", "benchmarks.gpu.kernels", 150, ("numpy", "triton")
    ),
    Part(
        "attention", "The attention functions on the stages of `speedrun`", "benchmarks.gpu.attention", 180, ("numpy",)
    ),
    Part("doctor", "`shardrun doctor`", "benchmarks.gpu.doctor", 240, (*TRAINER, "tyro")),
)
