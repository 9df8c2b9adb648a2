"""Guess first: the number that a demo will show is asked for before it is shown, kept, and compared. Without torch.

    guess = guess_first(5)      # asks where there is somebody to ask
    …
    guess.tell(1.75)            # the number, and how far off the guess was

Kept in `runs/guesses.jsonl`, a line a guess.
"""

import json
import os
import re
import select
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from shardrun.lesson.course import Guess, find_lesson
from strategies import strict_json

KEPT = Path("runs/guesses.jsonl")
PATIENCE = 120.0
"""Seconds that an answer is waited for; other ranks wait too, and a process group would give up."""
SHOWN = re.compile(r"^The number: ([-+0-9.,e]+) ", re.M)
"""What `tell` prints."""


@dataclass(frozen=True)
class Challenge:
    """A question that was asked, and the guess, if there was one. silent: on ranks that neither ask nor print."""

    number: int
    guess: Guess
    question: str
    ranks: int
    """That the question is about."""
    guessed: float | None = None
    silent: bool = False

    def tell(self, shown: float) -> None:
        """Print the number that the demo found, in the unit of the question, and compare."""
        if self.silent:
            return
        print(f"\n{wrapped(f'Guess first: {self.question}')}")
        print(f"The number: {written(shown)} {self.guess.unit}")
        if self.guessed is not None:
            keep(self.number, self.question, self.guessed, shown, self.guess.unit)
            print(wrapped(compared(self.guessed, shown, self.guess.unit)))
        print(wrapped(self.guess.why), flush=True)


def guess_first(number: int) -> Challenge:
    """Ask for the number of a lesson's demo, on rank 0. Nobody is asked where the input or the output is no terminal;
    a number on the command line is the guess.
    """
    guess = find_lesson(number).guess
    assert guess, f"lesson {number} has no [guess]"
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = launched if launched > 1 else guess.ranks
    question = worded(guess, launched)
    if os.environ.get("RANK", "0") != "0":
        return Challenge(number, guess, question, ranks, silent=True)
    if len(sys.argv) == 2 and (given := parsed(sys.argv[1])) is not None:
        return Challenge(number, guess, question, ranks, given)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Challenge(number, guess, question, ranks)
    print(wrapped(f"Guess first: {question}"))
    if (earlier := last_guess(number, question)) is not None:
        print(f"(Last time you guessed {written(earlier)}.)")
    print(f"  {guess.unit}, or Enter alone: ", end="", flush=True)
    ready, _, _ = select.select([sys.stdin], [], [], PATIENCE)
    said = parsed(sys.stdin.readline()) if ready else None
    print("" if ready else "\nNo answer, so on it goes.", flush=True)
    return Challenge(number, guess, question, ranks, said)


def worded(guess: Guess, ranks: int) -> str:
    """The question for so many ranks."""
    return guess.question.replace("{ranks}", str(ranks if ranks > 1 else guess.ranks))


def parsed(text: str) -> float | None:
    """A number that is finite, with point or comma; None for anything else."""
    try:
        value = float(text.strip().replace(",", "."))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def written(number: float) -> str:
    """At most four digits that count, without an exponent where it can be."""
    if number == round(number) or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}"


def shown_in(output: str) -> float | None:
    """The number that a demo's output tells, where it does."""
    found = SHOWN.search(output)
    return float(found[1].replace(",", "")) if found else None


def compared(guess: float, shown: float, unit: str) -> str:
    """How far a guess is from the number, in a sentence."""
    head = f"Your guess: {written(guess)} {unit}"
    if guess == shown:
        return f"{head}, which is it."
    if not shown or guess / shown <= 0:
        return f"{head}, {written(abs(guess - shown))} off."
    ratio = guess / shown
    if abs(ratio - 1) <= 0.05:
        return f"{head}, which is as good as it."
    if 0.55 < ratio < 1.8:
        return f"{head}, {abs(ratio - 1):.0%} too {'much' if ratio > 1 else 'little'}."
    times = f"{ratio:.3g} times as much" if ratio > 1 else f"{1 / ratio:.3g} times too little"
    return f"{head}, {times}."


def keep(number: int, question: str, guess: float, shown: float, unit: str) -> None:
    """Add it to the file of guesses; a folder that cannot be written to is no reason to stop."""
    line = {"lesson": number, "question": question, "guess": guess, "number": shown, "unit": unit}
    line["at"] = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        KEPT.parent.mkdir(exist_ok=True)
        with open(KEPT, "a", encoding="utf-8") as file:
            file.write(strict_json.dumps(line) + "\n")
    except OSError:
        print(f"(The guess is not kept: {KEPT} cannot be written.)")


def last_guess(number: int, question: str) -> float | None:
    """The newest guess at the same question, where one was kept."""
    try:
        lines = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    same = [line["guess"] for line in lines if (line.get("lesson"), line.get("question")) == (number, question)]
    return float(same[-1]) if same else None


def wrapped(text: str) -> str:
    return textwrap.fill(text, 98)
