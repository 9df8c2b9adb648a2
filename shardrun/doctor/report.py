"""What the doctor found, line by line: shown as it is found, or as JSON at the end. No secret gets through.

This file, `shell.py` and `python.py` keep to the syntax of Python 3.8, so that a Python that is too old is told so.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from strategies import strict_json

WIDTH = 100
"""Columns of the text. Commands are never broken, because they are there to be copied."""

COLOURS = {"ok": "32", "warning": "33", "failure": "31;1"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: str
    """'ok', 'warning' (training works, but not as one would think) or 'failure' (something will not work)."""
    said: str
    fix: str = ""
    """The command that puts it right, in the syntax of the shell at hand; several stand on lines of their own."""


class Report:
    """Collects lines and shows each at once, unless `silent` (for JSON)."""

    def __init__(self, silent: bool = False):
        self.lines: list[tuple[str, Finding]] = []
        """Section and line."""
        self._secrets: list[str] = []
        self._silent = silent
        self._section = ""
        self._live = not silent and sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def hide(self, secrets: Iterable[str]) -> None:
        """From now on `***` stands wherever one of these would be shown."""
        self._secrets = sorted(secrets, key=len, reverse=True)

    def section(self, title: str) -> None:
        """What follows belongs under this heading."""
        self._section = title
        self._print(title if not self.lines else "\n" + title)

    def doing(self, what: str) -> None:
        """On a terminal: what is being waited for, until the next line takes its place."""
        if self._live:
            print(f"  {what} …", end="", flush=True)

    def take(self, check: Callable[..., Iterable[Finding]], *arguments: Any) -> bool:
        """Run a check and show its lines; returns whether none is a failure. A check that breaks is one itself."""
        failures = self.count("failure")
        try:
            for line in check(*arguments):
                self.add(line)
        except Exception as error:  # whatever it is: an examination that ends at its first find is of no use
            name = check.__name__.replace("_", " ")
            self.add(Finding(name, "failure", f"could not be examined: {type(error).__name__}: {error}"))
        return self.count("failure") == failures

    def add(self, line: Finding) -> None:
        """Record a line and show it."""
        line = Finding(line.name, line.status, self.redacted(line.said), self.redacted(line.fix))
        self.lines.append((self._section, line))
        self._print("\n".join(layout(line, colour=self._live)))

    def redacted(self, text: str) -> str:
        """The text without any known secret, nor anything else in the form of a Hugging Face token."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return re.sub(r"hf_[A-Za-z0-9]{10,}", "***", text)

    def count(self, status: str) -> int:
        """How many lines have this status."""
        return sum(line.status == status for _, line in self.lines)

    def verdict(self) -> str:
        """All of it in one line."""
        parts = [f"{self.count('ok')} ok"]
        for status in ("warning", "failure"):
            parts.append(f"{self.count(status)} {status}{'s' * (self.count(status) != 1)}")
        return ", ".join(parts) + "."

    def as_json(self) -> str:
        """Schema 1: a list of section, name, status, said and fix, and how many there are of each status."""
        lines = [{"section": section, **asdict(line)} for section, line in self.lines]
        counts = {status: self.count(status) for status in COLOURS}
        return strict_json.dumps({"schema": 1, **counts, "lines": lines}, indent=2)

    def _print(self, text: str) -> None:
        if not self._silent:
            print(("\r\x1b[K" if self._live else "") + text, flush=True)


def layout(line: Finding, colour: bool = False) -> list[str]:
    """A line as text: status, name, what was found, and below it the fix."""
    status = f"{line.status:<9}"
    if colour:
        status = f"\x1b[{COLOURS[line.status]}m{status}\x1b[0m"
    wrapped = textwrap.wrap(line.said, WIDTH - 30, break_long_words=False, break_on_hyphens=False) or [""]
    rows = [f"  {status}{line.name:<18} {wrapped[0]}", *(" " * 30 + row for row in wrapped[1:])]
    return rows + [f"           {'fix: ' if i == 0 else '     '}{row}" for i, row in enumerate(line.fix.splitlines())]
