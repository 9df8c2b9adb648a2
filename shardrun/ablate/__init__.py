"""`shardrun ablate`: what does each idea of the recipe contribute? A baseline against one change at a time.

    shardrun ablate --drop muon,qk_norm --seeds 3       # two ideas out, one at a time
    shardrun ablate --suite schedules --seeds 3         # four schedules, the learning rates of each swept first
    shardrun ablate --list                              # every idea, and what it is replaced by

Every run goes through the real trainer under an accelerate config. An arm is paired with the baseline of the same seed,
which has the same data in the same order. Finished runs are kept in OUT/results.json: kill it at any moment, give the
same command again, and it continues; more seeds, ideas or suites in the same folder use what is there.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shardrun.ablate.ideas import IDEAS, Setting, described
from shardrun.ablate.suites import SUITES, Suite, one_at_a_time, suite_of
from shardrun.launch import find_config
from shardrun.output import write_whole
from strategies import strict_json
from strategies.errors import UserError

if TYPE_CHECKING:
    from shardrun.ablate.runs import Result

VALIDATIONS = 12
"""Of a run, evenly spread: how finely the tokens to the target are known."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    suites = "; ".join(f"{name}: {about}" for name, about in SUITES.items())
    parser.add_argument("--preset", default="tiny", help="the trainer's preset (default: tiny)")
    parser.add_argument("--drop", default="", help="ideas to take out, comma-separated, each by itself")
    parser.add_argument("--add", default="", help="ideas to put in that the preset does not have, likewise")
    parser.add_argument("--suite", choices=SUITES, help=f"instead of --drop and --add (default: features). {suites}")
    parser.add_argument("--list", action="store_true", help="list the ideas for this preset, and run nothing")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per arm, from the preset's on (default: 3)")
    parser.add_argument(
        "--steps", type=int, help="steps of each run; its schedule is fitted to them (default: preset's)"
    )
    parser.add_argument(
        "--target", type=float, help="validation loss to be reached (default: the baseline's after 3/4 of its tokens)"
    )
    parser.add_argument(
        "--sweep", help="factors of the learning rates, e.g. 0.5,1,2: the best of each arm counts ('' for none)"
    )
    parser.add_argument("--config", default="cpu/single", help="accelerate config (default: cpu/single)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder (default: runs/ablate)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("trainer", nargs="*", help="further arguments of the trainer, for all runs, after --")


def run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        _list(configure(arguments)[0], arguments.json)
        return 0
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        text, content = ablate(arguments)
    print(strict_json.dumps(content, indent=2) if arguments.json else f"\n{text}")
    return 0


def configure(arguments: argparse.Namespace) -> tuple[Setting, list[str]]:
    """What all runs share: the baseline's setting, and the trainer's options that make it."""
    from speedrun.run.command_line import parse
    from speedrun.stages import number_of_steps

    options = [*arguments.trainer, *(["--steps", str(arguments.steps)] if arguments.steps is not None else [])]
    parsed = parse([arguments.preset, *options])[1]
    options += ["--eval-every", str(max(1, number_of_steps(parsed) // VALIDATIONS))]
    parsed = parse([arguments.preset, *options])[1]
    if parsed.target_val_loss is not None:
        raise UserError("target_val_loss would end runs at different tokens: use --target of shardrun ablate.")
    return Setting(parsed, find_config(arguments.config)), options


def ablate(arguments: argparse.Namespace) -> tuple[str, dict[str, object]]:
    """Run what is missing; returns the report as Markdown and as JSON, both also written to the folder."""
    from shardrun.ablate.comparison import run_suite
    from shardrun.ablate.report import as_json, markdown
    from shardrun.ablate.runs import Runs

    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1.")
    setting, options = configure(arguments)
    suite = _suite(arguments, setting)
    runs = Runs(arguments.preset, options, setting, arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    first = setting.config.seed
    comparison = run_suite(suite, runs, list(range(first, first + arguments.seeds)), arguments.target)
    settings = _settings(arguments, setting, [r for of_arm in comparison.results for r in of_arm])
    text, content = markdown(comparison, settings), as_json(comparison, settings)
    name = arguments.suite or ("features" if not arguments.drop and not arguments.add else "chosen")
    write_whole(arguments.out / f"{name}.md", f"# Ablation: {name}\n\n{text}")
    write_whole(arguments.out / f"{name}.json", strict_json.dumps(content, indent=1) + "\n")
    try:
        from shardrun.ablate.picture import draw_effects
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'shardrun[plots]').")
    else:
        draw_effects(comparison, arguments.out / f"{name}.png")
    print(f"{name}.md, .json, .png and results.json: {arguments.out}")
    return text, content


def _suite(arguments: argparse.Namespace, setting: Setting) -> Suite:
    drop, add = ([name for name in given.split(",") if name] for given in (arguments.drop, arguments.add))
    try:
        factors = tuple(float(factor) for factor in arguments.sweep.split(",") if factor) if arguments.sweep else ()
    except ValueError:
        factors = (0.0,)
    if any(not factor > 0 for factor in factors) or len(set(factors)) < len(factors):
        raise UserError(f"--sweep {arguments.sweep} must be different positive factors, such as 0.5,1,2.")
    if factors and 1.0 not in factors:
        factors = (*factors, 1.0)  # the rates of the preset are always among those compared
    asked = None if arguments.sweep is None else tuple(sorted(factors))
    if arguments.suite and (drop or add):
        raise UserError("--suite and --drop or --add are two ways of saying what to compare: use one of them.")
    if drop or add:
        return one_at_a_time(drop, add, setting, asked)
    return suite_of(arguments.suite or "features", setting, asked)


def _settings(arguments: argparse.Namespace, setting: Setting, results: list["Result"]) -> str:
    """What all runs share, in a sentence, as the runs themselves recorded it."""
    config = setting.config
    first = results[0]
    extra = f" with {' '.join(arguments.trainer)}" if arguments.trainer else ""
    commits = sorted({str(result.commit)[:10] for result in results})
    machines = " and ".join(sorted({result.machine for result in results}))
    return (
        f"{arguments.preset}{extra}, {first.tokens:,} tokens a run ({config.steps} steps), {config.data.source}, "
        f"{config.data.eval_tokens:,} validation targets, accelerate config {arguments.config}. {machines}, torch "
        f"{first.versions['torch']}, Python {first.versions['python']}, commit {', '.join(commits)}."
    )


def _list(setting: Setting, as_json: bool) -> None:
    lines = []
    for name, idea in IDEAS.items():
        on, why = idea.is_on(setting), idea.hindrance(setting)
        lines.append({
            "name": name, "group": idea.group, "about": idea.about, "on": on, "impossible": why,
            "changed": described(idea.off if on else idea.on),
        })  # fmt: skip
    if as_json:
        print(strict_json.dumps({"schema": 1, "ideas": lines, "suites": SUITES}, indent=2))
        return
    width = max(map(len, IDEAS))
    for group in dict.fromkeys(idea.group for idea in IDEAS.values()):
        print(f"\n{group}")
        for line in (line for line in lines if line["group"] == group):
            print(f"  {line['name']:<{width}}  {line['about']}")
            what = f"{'on; --drop' if line['on'] else 'off; --add'} makes it: {line['changed']}"
            print(
                f"  {'':<{width}}    {'not possible here: ' + str(line['impossible']) if line['impossible'] else what}"
            )
    print("\nsuites")
    for name, about in SUITES.items():
        print(f"  {name:<{width}}  {about}")
