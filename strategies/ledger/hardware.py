"""GPUs as a plan needs them: memory, matrix-product rate, link rate. Figures of the vendors' data sheets, not ours.

Plain Python. Rates are peaks; `MFU` says which share of them a training step is assumed to reach.
"""

from dataclasses import dataclass, replace

from strategies.errors import UserError

GIB = 2**30

MFU = 0.4
"""Share of the peak rate that the matrix products of a training step reach: an assumption, printed with every plan."""

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
