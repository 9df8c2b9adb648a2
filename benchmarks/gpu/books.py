"""What one rank of `gpt2` holds under each strategy: predicted, measured from live tensors, and allocated.

Micro-batches of 8 × 1024 tokens, bf16, the third of five steps. Every strategy runs in a process of its own, so that no
byte of another one's is counted.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.alone import in_a_process, launch_alone, strategies_here
from benchmarks.gpu.results import Result, asked
from benchmarks.gpu.sizes import config_of, tokens, with_tokens
from speedrun.train import train
from strategies.ledger import book

ROWS = 8


def main() -> None:
    arguments = asked()
    result = arguments.result
    wrong = []
    folder = str(result.work())
    source = tokens(Path(folder), arguments.tiny)
    for strategy in strategies_here(result):
        try:
            ledger, losses = in_a_process(five_steps, strategy, source, folder, arguments.tiny)
        except RuntimeError as error:
            wrong.append(strategy)
            result.note(f"{strategy} failed: {str(error).splitlines()[-1]}")
            print(error, flush=True)
            continue
        add_books(result, strategy, ledger)
        result.row("Training losses", run=strategy, **{f"step {i}": loss for i, loss in enumerate(losses, 1)})
    if wrong:
        raise SystemExit(f"failed: {', '.join(wrong)}")


def five_steps(strategy: str, source: str, folder: str, tiny: bool) -> tuple[dict[str, Any], list[float]]:
    """Train, and return the run's ledger.json and its training losses."""
    config = with_tokens(config_of("gpt2", tiny), source, tiny)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, global_batch=ROWS, micro_batch=ROWS),
        steps=5,
        eval_every=0,
        out=folder,
        name=strategy,
        progress="plain",
    )
    train("gpt2", config, launch_alone(strategy, cpu=tiny, precision="bf16"))
    run = Path(folder) / strategy
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["train_loss"] for line in lines if line["step"]]
    return book.read(run), losses


def add_books(result: Result, name: str, ledger: dict[str, Any]) -> None:
    """Rows of a ledger's first rank: a moment each, all categories together; then the lines that do not agree.

    `predicted` and `measured` are of all categories, `allocated` is what torch's allocator had handed out, a peak since
    the step began; `too high by` is predicted over allocated.
    """
    rank = ledger["ranks"][0]
    for moment, entries in rank["memory"].items():
        allocator = rank["allocator"].get(moment, {})
        predicted, measured = (sum(line[kind] for line in entries.values()) for kind in ("predicted", "measured"))
        allocated = allocator.get("allocated")
        result.row(
            "Bytes at each moment",
            run=name,
            moment=moment,
            predicted=predicted,
            measured=measured,
            allocated=allocated,
            **{
                "too high by": f"{predicted / allocated - 1:.1%}" if allocated else None,
                "in no category": allocator.get("allocated, in no category"),
            },
        )
        for category, line in entries.items():
            if line["remainder"]:
                result.row(
                    "Lines with a remainder",
                    run=name,
                    moment=moment,
                    category=category,
                    **{kind: line[kind] for kind in ("predicted", "measured", "remainder")},
                    why=line.get("why", "**unexplained**"),
                )


if __name__ == "__main__":
    main()
