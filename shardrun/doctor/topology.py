"""How the GPUs of this machine are joined, out of `nvidia-smi topo -m`."""

import re
from collections.abc import Iterator

from shardrun.doctor.report import Finding

PCIE = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the CPU's PCIe bridge",
    "NODE": "several PCIe bridges of one CPU",
    "SYS": "the link between two CPUs",
}
"""nvidia-smi's code for a path without NVLink → what lies on it, nearest first."""


def parse(matrix: str) -> dict[tuple[int, int], str]:
    """Pair of GPUs (smaller number first) → the code of the path between them, such as NV18 or PHB.

    Other devices (network cards) and the affinity columns are left out. Empty where there are no pairs.
    """
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in matrix.splitlines()]
    header = next((row for row in rows if row and row[0] == "GPU0" and "X" not in row[1:2]), [])
    columns = [int(word[3:]) for word in header if re.fullmatch(r"GPU\d+", word)]
    paths = {}
    for row in rows:
        if row and re.fullmatch(r"GPU\d+", row[0]) and row is not header:
            for column, code in zip(columns, row[1:], strict=False):
                if int(row[0][3:]) < column:
                    paths[int(row[0][3:]), column] = code
    return paths


def links(matrix: str) -> Iterator[Finding]:
    """What the GPUs talk over, and whether all pairs talk over the same."""
    paths = parse(matrix)
    codes = sorted(set(paths.values()))
    over_nvlink = [pair for pair, code in paths.items() if code.startswith("NV")]
    fix = "shardrun plan gpt2 --gpu rtx4090  # what a step costs over PCIe, under every strategy"
    if not paths:
        yield Finding("links", "warning", "`nvidia-smi topo -m` shows no pair of GPUs", "nvidia-smi topo -m")
    elif len(over_nvlink) == len(paths):
        yield Finding("links", "ok", f"NVLink between all GPUs ({', '.join(codes)})")
    elif over_nvlink:
        pairs = ", ".join(f"{a}–{b}" for a, b in over_nvlink[:4]) + (" …" if len(over_nvlink) > 4 else "")
        slowest = _slowest(codes)
        said = f"NVLink between GPUs {pairs}, but {slowest} between others, which sets the pace of all"
        yield Finding("links", "warning", said, fix)
    else:
        slowest = _slowest(codes)
        far = "SYS" in codes
        said = f"PCIe, no NVLink: {slowest}"
        yield Finding("links", "warning" if far else "ok", said, fix if far else "")


def _slowest(codes: list[str]) -> str:
    there = [code for code in PCIE if code in codes]
    return f"{there[-1]} ({PCIE[there[-1]]})" if there else ", ".join(codes)
