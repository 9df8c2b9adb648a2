"""How a verb or an action is shown by `--help`."""

import argparse
from typing import Any


def add_parser(actions: Any, name: str, about: str) -> argparse.ArgumentParser:
    """Add a verb or an action to what `add_subparsers` gave. about: what it does, without a capital or a full stop.

    argparse formats a help text with % and leaves a description as it is, so a percent sign is doubled in the former.
    """
    sentence = about[0].upper() + about[1:] + ("" if about.endswith("?") else ".")
    added: argparse.ArgumentParser = actions.add_parser(name, help=about.replace("%", "%%"), description=sentence)
    return added
