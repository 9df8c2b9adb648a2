"""The trainer, which writes down what memory each rank took until its first step: for `benchmarks.start_memory`.

    … -m benchmarks.start_memory_rank FILE gpt2 --model.layers 40 …

Each rank makes FILE.RANK.json, and ends after `prepare` where START_MEMORY_UNTIL says so. All else is the trainer.
Works with versions of it that build the whole model on every rank, too.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from strategies import strict_json


def status(field: str) -> int:
    """Bytes, of this process: VmRSS is what it has in memory now, VmHWM the most since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def shards_and_block(run: Any) -> tuple[int, int]:
    """By the books, what this rank holds between the passes and the update of a step with all states there, buffers of
    communication included; and the whole parameters, in float32, of the largest block (or of what is in none)."""
    from speedrun.books.shapes import scenario_of
    from strategies.forecast.predict import predict_memory

    launch = run.launch
    scenario = scenario_of(run.config, launch.strategy, launch.world_size, launch.precision, engine=launch.engine)
    moments = predict_memory(scenario)[launch.rank]
    held = {
        category: max(moment.get(category, 0) for moment in moments.values())
        for category in {category for moment in moments.values() for category in moment}
    }
    units: dict[str, int] = defaultdict(int)
    for name in scenario.shapes:
        units[".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""] += 4 * scenario.numel(name)
    return sum(held.values()), max(units.values())


def main() -> None:
    file, only_prepare = sys.argv[1], os.environ.get("START_MEMORY_UNTIL") == "prepare"
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    from speedrun import train
    from speedrun.run.context import Run
    from speedrun.run.ending import guarded
    from strategies import select

    if select.launched().strategy.startswith("zero"):
        from strategies.zero.engine import import_deepspeed

        import_deepspeed(torch.device("cpu"))  # libraries are no part of the model
    build, begin, done = train.GPT, Run.begin, Run.done
    seen: dict[str, int] = {}

    def noted(*arguments: Any, **options: Any) -> Any:
        forget_peak()
        seen["before"] = status("VmRSS")
        return build(*arguments, **options)

    def write(run: Run) -> None:
        seen["shards"], seen["block"] = shards_and_block(run)
        Path(f"{file}.{run.launch.rank}.json").write_text(strict_json.dumps(seen))

    def note_begin(self: Run, strategy: Any) -> None:
        seen["prepared"] = status("VmHWM")
        if only_prepare:
            write(self)
            dist.barrier()
            os._exit(0)
        begin(self, strategy)

    def note_done(self: Run, *arguments: Any, **options: Any) -> None:
        if "step" not in seen:
            seen["step"] = status("VmHWM")
            write(self)
        done(self, *arguments, **options)

    train.GPT, Run.begin, Run.done = noted, note_begin, note_done  # type: ignore[misc, assignment, method-assign]
    guarded(train.main)


if __name__ == "__main__":
    main()
