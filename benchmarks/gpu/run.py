"""Twelve steps of `speedrun` through its four stages by accelerate launch, as the record is run: the third step is the
counted one. Loss, step times, the books."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.books import add_books
from benchmarks.gpu.results import Result, asked
from benchmarks.gpu.sizes import TINY, config_of, eval_tokens, tokens
from shardrun.launch import find_config, launching, running, shown, what_went_wrong
from speedrun.stages import resolve_stages, stage_at
from strategies.ledger import book

STEPS = 12


def main() -> None:
    arguments = asked()
    result, tiny = arguments.result, arguments.tiny
    config = find_config("cpu/single" if tiny else "single")
    options = ["speedrun", *(TINY["speedrun"] if tiny else []), "--steps", str(STEPS)]
    options += ["--eval-every", "0", "--data.eval-tokens", str(eval_tokens(tiny)), "--progress", "plain"]
    folder = result.work()
    source = tokens(folder, tiny)
    result.note(f"`{shown(config, 'speedrun.train', [*options, '--data.source', Path(source).name])}`")
    command = [*options, "--data.source", source, "--out", str(folder), "--name", "run"]
    log = folder / "log.txt"
    watch = Watch(result, folder / "run", log, tiny)
    with running(launching(config, ["-m", "speedrun.train", *command]), log) as process:
        while process.poll() is None:
            time.sleep(0.5)
            watch.look()
    watch.look()
    if process.returncode:
        sys.exit(what_went_wrong(log))
    if watch.steps < STEPS or not watch.counted:
        sys.exit(f"{watch.steps} of {STEPS} steps, and {'the' if watch.counted else 'no'} counted one")


class Watch:
    """Takes over what the run has written since the last look."""

    def __init__(self, result: Result, run: Path, log: Path, tiny: bool):
        self.result, self.run, self.log = result, run, log
        self.printed, self.steps, self.counted = 0, 0, False
        self.stages = resolve_stages(config_of("speedrun", tiny), STEPS)

    def look(self) -> None:
        for line in whole_lines(self.log)[self.printed :]:
            self.printed += 1
            print(line, flush=True)
            if line.startswith(("attention:", "kernels:", "speedrun:")):
                self.result.note(line.replace(f"{self.log.parent}/", ""))
        for line in self._lines()[self.steps :]:
            self.steps = line["step"]
            stage = self.stages.index(stage_at(self.stages, self.steps - 1))
            self.result.row(
                "Steps",
                step=self.steps,
                stage=stage,
                loss=line["train_loss"],
                **{"gradient norm": line["grad_norm"], "ms": line["data_time_ms"] + line["compute_time_ms"]},
            )
        if (self.run / book.NAME).exists() and not self.counted:
            self.counted = True
            add_books(self.result, "speedrun", book.read(self.run))

    def _lines(self) -> list[dict[str, Any]]:
        """Of the steps so far."""
        return [line for line in map(json.loads, whole_lines(self.run / "metrics.jsonl")) if line["step"]]


def whole_lines(file: Path) -> list[str]:
    """What has been written to the file so far; the last line may be being written."""
    if not file.exists():
        return []
    return file.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0].splitlines()


if __name__ == "__main__":
    main()
