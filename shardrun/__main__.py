"""`shardrun VERB …`, or `python -m shardrun VERB …` where the script is not on the PATH."""

from __future__ import annotations  # so that a Python that is too old gets as far as the doctor

import argparse
import contextlib
import importlib
import sys

import speedrun
from shardrun.help import add_parser
from shardrun.output import Terminated, ended_like_ctrl_c, outliving_readers, to_nowhere
from strategies.errors import UserError
from strategies.output import any_character

VERBS = {
    "plan": "predict memory, traffic and step time: what fits?",
    "compare": "run the strategies one after another on this machine, their books side by side",
    "explain": "what an accelerate config resolves to, key by key",
    "diff": "two accelerate configs, in bytes and traffic per rank",
    "ablate": "what each idea of the recipe contributes: a baseline against one change at a time",
    "data": "fetch FineWeb, make shards of text or of tokens of others, look into them",
    "certify": "show that a strategy gives the single-process run's losses and weights",
    "checkpoint": "inspect, verify or export a checkpoint",
    "doctor": "examine the set-up: what is wrong, and the command that fixes it",
    "lesson": "the lessons: start one, check your solutions, get a hint, see what is solved",
    "present": "present a lesson in the terminal, live on ranks or from a recording, and leave a page to share",
}
"""Verb → what it does. Each verb is a module of this package with `add_arguments(parser)` and `run(arguments) -> int`;
only the one that is asked for is imported."""

LEAVE_FILES = ("compare", "ablate", "data", "certify", "checkpoint", "present")
"""Go on to their end where nobody reads what they print any more; the others are over then."""


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and end with its status: 0, 1 where it found something wrong, 2 for a mistake in how it was asked."""
    any_character()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="shardrun",
        description="Data-parallel training, run, counted and compared. The trainer itself is started by "
        "`accelerate launch --config_file CONFIG -m speedrun.train`.",
    )
    parser.add_argument("--version", action="version", version=f"shardrun {speedrun.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, help_text in VERBS.items():
        verb_parser = add_parser(verbs, verb, help_text)
        if arguments and arguments[0] == verb:
            module = importlib.import_module(f"shardrun.{verb}")
            module.add_arguments(verb_parser)
    parsed = parser.parse_args(arguments)
    try:
        with ended_like_ctrl_c(), outliving_readers() if parsed.verb in LEAVE_FILES else contextlib.nullcontext():
            status = module.run(parsed)
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        status = 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        to_nowhere(sys.stdout)
        status = 0
    except (UserError, OSError) as error:  # OSError: a download, a disk
        print(f"shardrun: error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
