"""Which ideas pay at this size? Three ablations of `tiny`, and their tables as benchmarks/ablation.md.

    python -m benchmarks.ablation                                # resumable; about 50 s a run on a quiet core
    python -m benchmarks.ablation --suites features --seeds 1    # a part of it
    python -m benchmarks.ablation --steps 8 --seeds 2 --out /tmp/smoke --table /tmp/smoke.md -- --data.eval-tokens 2048

The same as `shardrun ablate --suite NAME --steps 240` three times in one folder, where runs that suites have in common
are trained once; then the tables together. Kill it at any moment: the same command goes on. Its seconds compare only
where little else ran; losses and tokens do not depend on that.
"""

import argparse
import shutil
import sys
from pathlib import Path

from shardrun import ablate

HERE = Path(__file__).parent

SUITES = {
    "features": "Ideas, one at a time",
    "optimizers": "Muon against AdamW",
    "schedules": "Four schedules",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(SUITES), help="comma-separated (default: all three)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240, help="of each run (default: 240)")
    parser.add_argument("--out", default="runs/ablation", help="results and records (default: runs/ablation)")
    parser.add_argument("--table", type=Path, default=HERE / "ablation.md", help="where the tables go, with pictures")
    parser.add_argument("trainer", nargs="*", help="further arguments of the trainer, after --")
    arguments = parser.parse_args()
    shared = ["--seeds", str(arguments.seeds), "--steps", str(arguments.steps), "--out", arguments.out]

    sections = []
    for name in arguments.suites.split(","):
        options = argparse.ArgumentParser()
        ablate.add_arguments(options)
        asked = options.parse_args(["--suite", name, *shared, "--", *arguments.trainer])
        text, _ = ablate.ablate(asked)
        picture = Path(arguments.out) / f"{name}.png"
        link = ""
        if picture.exists():
            shown = arguments.table.with_name(f"{arguments.table.stem}_{name}.png")
            shutil.copy(picture, shown)
            link = f"\n![Effect of each change, with its interval]({shown.name})\n"
        sections.append(f"## {SUITES[name]}\n\n{text}{link}")
    command = f"python -m benchmarks.ablation --suites {arguments.suites} --seeds {arguments.seeds} "
    command += f"--steps {arguments.steps}" + (f" -- {' '.join(arguments.trainer)}" if arguments.trainer else "")
    arguments.table.write_text(
        "# Which ideas pay at this size?\n\n"
        f"Written by `{command}`. Everything that was run is here, whatever came out.\n\n" + "\n".join(sections),
        encoding="utf-8",
    )
    print(f"tables: {arguments.table}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"benchmarks.ablation: error: {error}")
