"""What every rank of `shardrun certify` runs: the cases of a folder, one after another; rank 0 leaves the traces
there.
"""

import json
import sys
from pathlib import Path

import torch

from shardrun.certify.equivalence import Case, run_strategy
from speedrun.run.ending import guarded
from strategies import select
from strategies.errors import UserError


def main() -> None:
    """Arguments: the folder with cases.json; --phases to record every phase of every step."""
    folder, phases = Path(sys.argv[1]), "--phases" in sys.argv
    launch = select.launched()
    cases = [Case(**case) for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))]
    rows = cases[0].config().data.global_batch
    if any(rows % (launch.world_size * case.accumulation) for case in cases):
        raise UserError(f"{launch.world_size} processes do not divide the certificate's batches of {rows} rows.")
    traces = []
    for case in cases:
        strategy = select.start(launch)
        traces.append(vars(run_strategy(case, strategy, launch.rank, launch.world_size, phases)))
    if launch.rank == 0:
        torch.save({"world_size": launch.world_size, "traces": traces}, folder / "traces.pt")


if __name__ == "__main__":
    guarded(main)
