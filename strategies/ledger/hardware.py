"""GPUs as a plan needs them: memory, matrix-product rate, link rate. Figures of the vendors' data sheets, not ours.

Plain Python. Rates are peaks; `utilisation` says which share of them training steps reached.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from strategies.errors import UserError

GIB = 2**30

MFU = 0.4
"""A round figure for wide models, where one is enough."""

WIDE = 2048
"""Widths from here on keep a GPU's matrix units busy; narrower models wait for launches and for memory."""


@dataclass(frozen=True)
class Utilisation:
    """Shares of the peak rate that the matrix products of measured training steps reached, recomputation counted."""

    least: float
    typical: float
    most: float


UTILISATION = {
    ("hopper", False): Utilisation(0.115, 0.319, 0.374),
    ("hopper", True): Utilisation(0.238, 0.403, 0.539),
    ("ampere", False): Utilisation(0.115, 0.396, 0.396),
    ("ampere", True): Utilisation(0.425, 0.542, 0.677),
}
"""(architecture, whether the model is wide) → the least, the median and the most of benchmarks/plan_times.md. There is
one row of a narrow model on Ampere: its least is Hopper's."""


def utilisation(gpu: "Gpu", width: int) -> Utilisation:
    """Of a model of this width. Other architectures than A100's have no rows and are taken for Hopper."""
    return UTILISATION["ampere" if gpu.capability == (8, 0) else "hopper", width >= WIDE]


LATENCY = 10e-6
"""Seconds before the first byte of a collective arrives: an assumption."""


@dataclass(frozen=True)
class Gpu:
    """memory: bytes that a program can use; flops: dense bf16 products per second; link: bytes per second each way;
    capability: CUDA's compute capability.
    """

    name: str
    memory: int
    flops: float
    link: float
    capability: tuple[int, int]
    source: str


GPUS = {
    "h100": Gpu("H100 SXM 80 GB", int(79.1 * GIB), 989e12, 450e9, (9, 0), "NVIDIA H100 data sheet; NVLink 4"),
    "h200": Gpu("H200 SXM 141 GB", int(139.8 * GIB), 989e12, 450e9, (9, 0), "NVIDIA H200 data sheet; NVLink 4"),
    "a100": Gpu("A100 SXM 80 GB", int(79.1 * GIB), 312e12, 300e9, (8, 0), "NVIDIA A100 data sheet; NVLink 3"),
    "rtx4090": Gpu(
        "RTX 4090 24 GB", int(23.5 * GIB), 165e12, 32e9, (8, 9), "NVIDIA Ada white paper; PCIe 4 ×16, no NVLink"
    ),
}


CONTEXT = 1_060_000_000
"""Bytes of a GPU's memory that the CUDA context, its kernels and torch's libraries take in each process: 1.06 GB on
H100 (NVIDIA/nccl issue 1685, which left out what torch allocates)."""

NCCL_RINGS = 540_000_000
"""Bytes that a communicator takes once it all-reduces: 1.6 GB with the context (NVIDIA/nccl issue 864), less CONTEXT.
"""

NCCL_PAIR = 3_280_000_000 // 7
"""Bytes that an all-to-all takes for every other rank of a node: 3.28 GB on 8 H100 (NVIDIA/nccl issue 1685)."""

NODE = 8
"""GPUs of a node."""

OUTSIDE = (
    "CUDA context 1.06 GB on H100 (NVIDIA/nccl issue 1685); NCCL 0.54 GB for a communicator (issue 864), 3.28 GB more "
    "for an all-to-all among 8 (issue 1685). Reports of single machines: NCCL's version and settings change them."
)


def outside_allocator(collectives: Collection[str], world_size: int) -> dict[str, int]:
    """Bytes of a rank's GPU that torch's allocator does not see. collectives: those that the rank calls."""
    if world_size == 1:
        return {"context": CONTEXT, "NCCL": 0}
    pairs = NCCL_PAIR * (min(world_size, NODE) - 1) if "all_to_all" in collectives else 0
    return {"context": CONTEXT, "NCCL": NCCL_RINGS + pairs}


LESS, MORE = 0.03, 0.05
"""Shares by which a rank may hold less or more than a predicted total."""

MARGIN = (
    "Totals are from 3% too high to 5% too low. Plan is within 3% of its simulation (benchmarks/plan_simulated.md). "
    "One H100 allocated up to 1.3% more than plan said (benchmarks/gpu_books.md). Model states are exact "
    "(benchmarks/court.md)."
)


def find_gpu(text: str) -> Gpu:
    """A GPU of the table, or one given by its memory in GiB (else an H100). Raises ValueError for anything else."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        gib = float(text)
    except ValueError:
        raise UserError(f"there is no GPU {text!r}; name one of {', '.join(GPUS)}, or its memory in GiB.") from None
    if not gib > 0:
        raise UserError(f"a GPU has more than {text} GiB of memory; name one of {', '.join(GPUS)}, or its GiB.")
    h100 = GPUS["h100"]
    return replace(h100, name=f"GPU of {gib:g} GiB", memory=int(gib * GIB), source="memory as given; else an H100's")
