"""Which share of a GPU's peak rate measured training steps reached: what `shardrun plan`'s times and margins rest on.

    python -m benchmarks.plan_times [--out benchmarks/plan_times.md]

Starts nothing. The rows are published ones, and those of this project on one H100.
"""

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from strategies.ledger.hardware import GPUS, WIDE

TABLE = Path("benchmarks/plan_times.md")


class Row(NamedTuple):
    """A measured run. tokens_per_s: of one GPU; again: whether every block's forward pass is computed twice."""

    model: str
    gpu: str
    parameters: float
    layers: int
    width: int
    tokens: int
    vocabulary: int
    tokens_per_s: float
    again: bool
    source: str

    @property
    def share(self) -> float:
        """As `speedrun.books.flops` counts: 6 per token and parameter without an untied embedding, and attention."""
        multiplied = self.parameters - (0 if self.parameters < 2e8 else self.vocabulary * self.width)
        per_token = 6 * multiplied + 6 * self.layers * self.width * self.tokens
        return per_token * (4 / 3 if self.again else 1) * self.tokens_per_s / GPUS[self.gpu].flops

    @property
    def kind(self) -> tuple[str, bool]:
        return "ampere" if self.gpu == "a100" else "hopper", self.width >= WIDE


AO, FOUNDRY = "pytorch/ao docs/source/workflows/training.md", "mosaicml/llm-foundry scripts/train/benchmarking"
NOCOMPILE = "pytorch/ao torchao/prototype/float8nocompile"
FMS, BLOG = "foundation-model-stack/fms-fsdp", "pytorch/pytorch.github.io (FSDP, 7B to 70B)"
RECORDS, HF = "KellerJordan/modded-nanogpt records", "huggingface/blog (FSDP and DeepSpeed)"
OURS = "this project, one H100 of 536 TFLOP/s"
ROWS = [
    Row("Llama-3.1-8B", "h100", 8.03e9, 32, 4096, 8192, 128256, 6150, False, AO),
    Row("Llama-3.1-8B", "h100", 8.03e9, 32, 4096, 4096, 128256, 5339, False, NOCOMPILE),
    Row("Llama-3.1-8B", "h100", 8.03e9, 32, 4096, 4096, 128256, 4882.4, False, NOCOMPILE),
    Row("Llama-3.1-8B", "h100", 8.03e9, 32, 4096, 4096, 128256, 4502, True, NOCOMPILE),
    Row("MPT-30b", "h100", 29.9752e9, 48, 7168, 2048, 50368, 2199, True, FOUNDRY),
    Row("MPT-7b", "h100", 6.6589e9, 32, 4096, 2048, 50368, 10475, False, FOUNDRY),
    Row("MPT-30b", "h100", 29.9752e9, 48, 7168, 2048, 50368, 2002, True, FOUNDRY),
    Row("MPT-7b", "h100", 6.6589e9, 32, 4096, 2048, 50368, 10643, False, FOUNDRY),
    Row("MPT-1b", "h100", 1.316e9, 24, 2048, 2048, 50368, 45455, False, FOUNDRY),
    Row("Llama-2-7B", "h100", 6.74e9, 32, 4096, 4096, 32000, 9600, False, FMS),
    Row("Llama-2-13B", "h100", 13.02e9, 40, 5120, 4096, 32000, 4850, False, FMS),
    Row("Llama-2-7B", "h100", 6.74e9, 32, 4096, 4096, 32000, 7500, False, BLOG),
    Row("Llama-2-13B", "h100", 13.02e9, 40, 5120, 4096, 32000, 3800, False, BLOG),
    Row("Llama-2-34B", "h100", 33.7e9, 48, 8192, 4096, 32000, 1550, True, BLOG),
    Row("Llama-2-70B", "h100", 68.98e9, 80, 8192, 4096, 32000, 800, True, BLOG),
    Row("GPT-2 124M", "h100", 0.124e9, 12, 768, 1024, 50304, 302945, False, RECORDS),
    Row("GPT-2 124M", "h100", 0.124e9, 12, 768, 1024, 50304, 426001, False, RECORDS),
    Row("GPT-2 124M", "h100", 0.124e9, 12, 768, 1024, 50304, 461944, False, RECORDS),
    Row("GPT-2 124M", "h100", 0.124e9, 12, 768, 1024, 50304, 452972, False, RECORDS),
    Row("GPT-2 1.5B", "h100", 1.5e9, 52, 1536, 1024, 50304, 60 * 1024 / 1.70357, False, RECORDS),
    Row("gpt2, compiled", "h100", 0.1245e9, 12, 768, 1024, 50304, 32 * 1024 / 0.0862, False, OURS),
    Row("MPT-13b", "a100", 12.854e9, 40, 5120, 2048, 50368, 2262, False, FOUNDRY),
    Row("MPT-1b", "a100", 1.316e9, 24, 2048, 2048, 50368, 20513, False, FOUNDRY),
    Row("MPT-125m", "a100", 0.1253e9, 12, 768, 2048, 50368, 142830, False, FOUNDRY),
    Row("Llama-2-7B", "a100", 6.74e9, 32, 4096, 4096, 32000, 4550, False, FMS),
    Row("Llama-2-13B", "a100", 13.02e9, 40, 5120, 4096, 32000, 2150, False, FMS),
    Row("Llama-2-7B", "a100", 6.74e9, 32, 4096, 4096, 32000, 3700, False, BLOG),
    Row("Llama-2-13B", "a100", 13.02e9, 40, 5120, 4096, 32000, 1800, False, BLOG),
    Row("Llama-2-34B", "a100", 33.7e9, 48, 8192, 4096, 32000, 700, True, BLOG),
    Row("Llama-2-70B", "a100", 68.98e9, 80, 8192, 4096, 32000, 370, True, BLOG),
    Row("Llama-2-7B", "a100", 6.74e9, 32, 4096, 4096, 32000, 3158.7, False, HF),
    Row("Llama-2-7B", "a100", 6.74e9, 32, 4096, 4096, 32000, 3094.5, False, HF),
]

FLAGSHIP = {"speedrun, stage 0, compiled": 0.0832, "speedrun, stage 0, eager": 0.1085}
"""Seconds that a step of 16 rows of 1024 tokens took on that H100, with all of its optimizer on one rank."""


def shares() -> list[tuple[str, tuple[str, bool], float, str]]:
    """(model, kind, share of the peak rate, source) of every row; the flagship's by `speedrun.books.flops` itself."""
    from shardrun.plan.estimates import at_stage
    from speedrun.books.flops import flops
    from speedrun.presets import PRESETS
    from speedrun.stages import number_of_steps, resolve_stages

    config = PRESETS["speedrun"][1]
    stage = at_stage(config, resolve_stages(config, number_of_steps(config), 8)[0])
    rows = [(row.model, row.kind, row.share, row.source) for row in ROWS]
    for name, seconds in FLAGSHIP.items():
        rows.append((name, ("hopper", False), flops(stage, 16) / seconds / GPUS["h100"].flops, OURS))
    return rows


def utilisations() -> dict[tuple[str, bool], tuple[float, float, float]]:
    """(architecture, wide) → the least, the median and the most. One row alone has the least of Hopper's."""
    found: dict[tuple[str, bool], list[float]] = {}
    for _, kind, share, _ in shares():
        found.setdefault(kind, []).append(share)
    least = min(found["hopper", False])
    return {
        kind: (min(each) if len(each) > 1 else least, statistics.median(each), max(each))
        for kind, each in found.items()
    }


def render() -> str:
    lines = [
        "# What share of the peak rate training steps reached\n",
        "`python -m benchmarks.plan_times`. Tokens a second as published, times the operations that `plan` counts for",
        "them, over the data sheet's dense bf16 rate. What gradient checkpointing computes again counts. Rows are of",
        f"DDP, FSDP and ZeRO-3 in bf16. Wide: {WIDE} channels and more.\n",
        "| model | architecture | share | source |",
        "|---|---|---:|---|",
    ]
    for model, (architecture, wide), share, source in shares():
        lines.append(f"| {model} | {architecture}, {'wide' if wide else 'narrow'} | {share:.1%} | {source} |")
    lines += ["\n| | least | median | most |", "|---|---:|---:|---:|"]
    for (architecture, wide), (least, median, most) in utilisations().items():
        name = f"{architecture}, {'wide' if wide else 'narrow'}"
        lines.append(f"| {name} | {least:.1%} | {median:.1%} | {most:.1%} |")
    lines += [
        "\n`plan` takes the median, and from the least to the most is its margin. The card of our own rows",
        "reached 0.54 of the data sheet's rate in a large product; a good H100 reaches 0.8. One row is no range:",
        "narrow models on Ampere have Hopper's least.\n",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE, help=f"where the table goes (default: {TABLE})")
    parser.parse_args().out.write_text(render())


if __name__ == "__main__":
    main()
