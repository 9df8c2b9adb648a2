"""What a step asks of a GPU, counted without one: kernel launches, bytes, waits, and what is sent.

    python -m benchmarks.launches NAME          counts, and keeps the result under NAME ("before", "banks", …)
    python -m benchmarks.launches --rows 1,3 NAME    only these rows
    python -m benchmarks.launches --show        writes the table from what is kept, counts nothing

Takes minutes. A step of the first stage, as one of eight GPUs has it, on fake CUDA tensors. Blocks are compiled by
inductor for sm_90 as far as its generated code; launches in that code are counted, and every operator outside of it.
The optimizer's part (`Strategy.step`) is apart. A wait is what makes the host stand until the device is done.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from strategies import strict_json
from tests.fake_cuda.process import FakeCUDAProcess

RESULTS, TABLE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".md")

ROWS: tuple[tuple[str, str, int, bool], ...] = (
    ("speedrun", "single", 1, True),
    ("speedrun", "single", 1, False),
    ("speedrun", "ddp", 8, False),
    ("speedrun", "fsdp", 8, False),
    ("gpt2", "single", 1, True),
    ("gpt2", "ddp", 8, False),
)
"""Preset, strategy, ranks, whether blocks are compiled."""

ON_A_CARD = {("speedrun", True): 1_778, ("speedrun", False): 2_900, ("gpt2", True): 1_247}
"""Launches that a profiler counted on one H100 with torch 2.11, as `single`, at an earlier commit."""

SECONDS = 1_500.0


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name", nargs="?", default="")
    arguments.add_argument("--rows", default=",".join(map(str, range(len(ROWS)))))
    arguments.add_argument("--show", action="store_true")
    asked = arguments.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not asked.show:
        process = FakeCUDAProcess()
        for index in map(int, asked.rows.split(",")):
            preset, strategy, ranks, compiled = ROWS[index]
            options = [preset, "--model.attention", "flex" if preset == "speedrun" else "sdpa"]
            found = process.run(_count, options, strategy, ranks, compiled, timeout=SECONDS)
            kept.setdefault(asked.name, {})[str(index)] = found
            print(f"{asked.name} {ROWS[index]}: {strict_json.dumps(found)}", flush=True)
            RESULTS.write_text(strict_json.dumps(kept, indent=1) + "\n")
        process.close()
    TABLE.write_text(table(kept))


def _count(*arguments: Any) -> dict[str, Any]:
    from benchmarks.launches_step import count  # in the process that has the fake GPU

    return count(*arguments)


def table(kept: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What a step asks of a GPU",
        "",
        f"`python -m benchmarks.launches NAME`, torch {version('torch').split('+')[0]}. Counted on fake tensors: no",
        "GPU was used. One step of the first stage as one of eight GPUs has it (`single`: with an eighth of the",
        "batch), averaged over the two steps in which AdamW updates once. *Compiled*: every block, by inductor for",
        "sm_90; its generated code was counted, never run. Attention counts one launch in each direction; sorting a",
        "few, which is a guess. Foreach kernels count as torch cuts them. Bytes moved are every operand once.",
        "",
        "A card's profiler counted, of an earlier commit under `single` with torch 2.11: "
        + ", ".join(
            f"{launches:,} for `{preset}` {'compiled' if compiled else 'eager'}"
            for (preset, compiled), launches in ON_A_CARD.items()
        )
        + ". The row *before* of the same line is this count of what was there then.",
        "",
    ]
    for index, (preset, strategy, ranks, compiled) in enumerate(ROWS):
        rows = [(name, found[str(index)]) for name, found in kept.items() if str(index) in found]
        if not rows:
            continue
        how = "compiled" if compiled else "eager"
        lines += [
            f"## `{preset}`, {strategy} on {ranks}, {how}",
            "",
            "| | launches | the optimizer's | GB moved | the optimizer's | all-reduced MB | other MB sent | waits |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for name, found in rows:
            parts = found["passes"], found["optimizer"]
            launches, moved = (sum(part[key] for part in parts) for key in ("launches", "moved"))
            reduced = sum(part["sent"].get("all_reduce", 0.0) for part in parts)
            sent = sum(sum(part["sent"].values()) for part in parts) - reduced
            waits = {key: value for part in parts for key, value in part["waits"].items()}
            said = ", ".join(f"{value:g} {key}" for key, value in waits.items()) or "none"
            lines.append(
                f"| {name} | {launches:,.0f} | {parts[1]['launches']:,.0f} | {moved / 1e9:,.1f} | "
                f"{parts[1]['moved'] / 1e9:,.1f} | {reduced / 1e6:,.1f} | {sent / 1e6:,.1f} | {said} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
