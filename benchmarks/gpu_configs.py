"""fp16 and CPU offload on one GPU: every strategy launched alone, its curve, its books, and where its tensors lie.

    python -m benchmarks.gpu_configs [--steps 40] [--cpu] [--out benchmarks/gpu_configs.md]

One rank, since one GPU has no more: what is shown is precision, loss scaling and placement, not sharding. Each run is
`accelerate launch` of a config file of its own. The curve is compared with one process in fp32, in the same session;
the books have to agree to the byte, on the device and on the host. With `--cpu` the same on a CPU, in fp32 for ZeRO,
to try the script. Ends with status 1 where a run fails or a line of the books is not explained.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from shardrun.launch import launching, shipped_config
from strategies.ledger import book

OPTIONS = ["--data.global-batch", "16", "--eval-every", "0", "--data.eval-tokens", "16384", "--untimed-steps", "2"]
OPTIONS += ["--progress", "none", "--name", "run"]

FSDP_OFFLOAD = {"fsdp_config": {"fsdp_offload_params": True}}
OPTIMIZER = {"deepspeed_config": {"offload_optimizer_device": "cpu"}}
BOTH = {"deepspeed_config": {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("single", "no", {}),
    *((name, "fp16", {}) for name in ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")),
    *((name, "bf16", {}) for name in ("single", "fsdp", "zero2", "zero3")),
    ("fsdp", "bf16", FSDP_OFFLOAD),
    ("fsdp", "fp16", FSDP_OFFLOAD),
    *((name, "bf16", OPTIMIZER) for name in ("zero1", "zero2", "zero3")),
    ("zero2", "fp16", OPTIMIZER),
    ("zero3", "bf16", BOTH),
    ("zero3", "fp16", BOTH),
]
"""Strategy, mixed_precision, and what its shipped config gets added."""


@dataclass
class Row:
    """What one run left."""

    name: str
    status: int
    loss: float = float("nan")
    scale: float | None = None
    skipped: int = 0
    device: int = 0
    """MiB held before the update, by the books; host: the same in host memory."""
    host: int = 0
    left: list[str] = field(default_factory=list)
    """Lines of the books that are not explained."""
    said: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of every run (default: 40)")
    parser.add_argument("--cpu", action="store_true", help="on a CPU, to try the script")
    parser.add_argument("--only", help="strategies to run, comma-separated (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    arguments = parser.parse_args()
    rows = []
    for strategy, precision, added in CASES:
        if arguments.only and strategy not in arguments.only.split(","):
            continue
        if arguments.cpu and precision == "fp16" and strategy.startswith("zero"):
            precision = "no"
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(strategy, precision, added, arguments.steps, arguments.cpu, Path(folder)))
        print(rows[-1], flush=True)
        arguments.out.write_text(report(rows, arguments.steps), encoding="utf-8")
    return int(any(row.status or row.left for row in rows))


def run(strategy: str, precision: str, added: dict[str, Any], steps: int, cpu: bool, folder: Path) -> Row:
    """Launch one and read what it left."""
    config = yaml.safe_load(shipped_config(f"cpu/{strategy}" if cpu else strategy).read_text())
    config |= {"mixed_precision": precision, "num_processes": 1}
    for section, keys in added.items():
        config[section] = {**config[section], **keys}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    what = next((" + ".join(keys) for keys in added.values()), "")
    row = Row(f"{strategy} {precision}{f', {what}' if what else ''}", 1)
    command = launching(file, ["-m", "speedrun.train", "tiny", "--steps", str(steps), *OPTIONS, "--out", str(folder)])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        row.said = "no end within 150 s"
        return row
    row.status = done.returncode
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        row.said = (said[-1] if said else (done.stdout + done.stderr)[-300:]).strip()
        print((done.stdout + done.stderr)[-3000:], flush=True)
        return row
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    row.loss, row.scale = lines[-1]["val_loss"], lines[-1].get("loss_scale")
    row.skipped = sum(bool(line.get("skipped")) for line in lines)
    ranks = book.read(folder / "run")["ranks"]
    row.left = book.unexplained(ranks)
    held = book.before_step(ranks[0]), book.host_before_step(ranks[0])
    row.device, row.host = (sum(line["measured"] for line in lines.values()) for lines in held)
    return row


def report(rows: list[Row], steps: int) -> str:
    """The table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    first = rows[0].loss
    table = [
        f"| {row.name} | {f'{row.loss:.4f}' if not row.status else 'FAILED: ' + row.said} | {row.loss - first:+.4f} "
        f"| {'–' if row.scale is None else f'{row.scale:g}'} | {row.skipped} | {row.device / 2**20:.2f} "
        f"| {row.host / 2**20:.2f} | {'; '.join(row.left) or 'to the byte'} |"
        for row in rows
    ]
    return "\n".join(
        [
            "# fp16 and CPU offload on one GPU",
            "",
            f"`python -m benchmarks.gpu_configs --steps {steps}`, {datetime.date.today():%-d %B %Y}, on {device}, "
            f"torch {torch.__version__}. One rank: precision, loss",
            "scaling and placement are shown, not sharding. Preset `tiny`. MiB are what is held before the update.",
            "The validation loss is set beside that of one process in fp32, the first row.",
            "",
            "| run | val loss | beside fp32 | loss scale | overflows | MiB on the device | MiB on the host | books |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
            *table,
            "",
        ]
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    sys.exit(main())
