"""`shardrun present N`: a lesson, presented in the terminal: its text, then live what it is about, then the books.

    the text         the lesson's README.md, a part at a time; questions, and with the next key their answers
    demo.py          runs meanwhile; what it printed, and its pictures in the page
    the training     of lessons with a [live] run: every rank's memory, the collectives and the loss while it trains
    the books        predicted, measured and remainder, of every rank
    the page         the same figures in one HTML file, to share

Everything that is shown is recorded, and can be shown again from the recording, without ranks and without torch.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from rich.text import Text

from shardrun.lesson.course import Lesson, find_lesson
from shardrun.present.figures import Training
from shardrun.present.frame import command, live, tables
from shardrun.present.page import write_page
from shardrun.present.readme import Question, read_readme
from shardrun.present.record import Event, Recorder, find_recording, new_folder, read_recording
from shardrun.present.screen import Quit, Screen, text
from shardrun.present.training import Launched, Script, launched, script, training
from strategies.errors import UserError

LONGEST_GAP = 1.0
"""Seconds that a replay waits between two events at most: nobody wants to see the ranks import torch again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Present lesson N: its text, part by part; live, every rank's memory and collectives while it trains; the "
        "books at the end; and a page with the same figures, in one file, to share. Any key brings the next part, b "
        "the one before, q ends. Where stdin is no terminal nothing waits for a key."
    )
    parser.add_argument("number", type=int, metavar="N", help="the lesson's number (shardrun lesson list)")
    parser.add_argument(
        "--auto",
        type=float,
        nargs="?",
        const=8.0,
        metavar="SECONDS",
        help="next frame after this time, without a key (default: 8)",
    )
    parser.add_argument(
        "--replay", metavar="RUN", help="show a recording, by its folder or its name in --out; no ranks"
    )
    parser.add_argument("--config", help="another accelerate config, for example zero2 on GPUs (default: the lesson's)")
    parser.add_argument("--processes", type=int, metavar="N", help="ranks (default: the config's)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the recording goes (default: runs)")


def run(arguments: argparse.Namespace) -> int:
    lesson = find_lesson(arguments.number)
    if arguments.auto is not None and not 0 <= arguments.auto < float("inf"):
        raise UserError(f"--auto is a number of seconds, not {arguments.auto}.")
    screen = Screen(f"Lesson {lesson.number}: {lesson.title}", arguments.auto)
    _end_ranks_when_killed()
    if arguments.replay:
        folder, events = _recorded(arguments, lesson)
        show: Show = Replayed(lesson, screen, folder, events)
    else:
        how = launched(lesson, arguments.config, arguments.processes)
        show = Performance(lesson, screen, new_folder(arguments.out, lesson.name), how)
    try:
        with show, screen:
            show.play()
    except Quit:
        pass
    if show.page:
        print(f"Page: {show.page}")
    if isinstance(show, Performance) and show.complete:
        print(f"Again, without ranks: shardrun present {lesson.number} --replay {show.folder}")
    return 0


def _recorded(arguments: argparse.Namespace, lesson: Lesson) -> tuple[Path, list[Event]]:
    """Raises ValueError for a recording of another lesson, or one that is cut off."""
    if arguments.config or arguments.processes:
        raise UserError("--replay starts nothing, so it takes neither --config nor --processes.")
    folder = find_recording(arguments.replay, arguments.out)
    events = read_recording(folder)
    if (recorded := events[0]["number"]) != lesson.number:
        raise UserError(
            f"{folder} shows lesson {recorded}, not {lesson.number}: shardrun present {recorded} --replay {folder}"
        )
    return folder, events


def _end_ranks_when_killed() -> None:
    """Being told to end, or a terminal that is closed, leaves by the same way as Ctrl-C: no rank stays behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave)


class Show:
    """The order of things. Where demo.py's output and the training's events come from is its children's."""

    def __init__(self, lesson: Lesson, screen: Screen, folder: Path):
        self.lesson, self.screen, self.folder = lesson, screen, folder
        self.readme = read_readme(lesson.folder / "README.md")
        self.output: Event = {}
        self.training: Training | None = None
        self.page: Path | None = None

    def __enter__(self) -> "Show":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None: ...

    def play(self) -> None:
        """From the goal to the last answer. Raises Quit where that is enough before."""
        self._text("Goal", f"**{self.lesson.about}**\n\n{self.readme.goal}")
        self._text("Mental model", self.readme.model)
        self._text("Terms", self.readme.terms)
        self.output = self.get_output()
        self._output()
        self._text("What to look at", self.readme.look)
        self._training()
        self.page = write_page(self.folder, self.lesson, self.readme, self.output, self.training)
        self.close()
        for number, question in enumerate(self.readme.questions, start=1):
            self._question(f"Question {number} of {len(self.readme.questions)}", question)
        self.screen.show("The page to share", Text(f"{self.page}\n\nThe same figures in one file, that works offline."))

    def get_output(self) -> Event:
        """What demo.py printed."""
        raise NotImplementedError

    def events(self) -> Iterator[Event | None]:
        """What the training does; nothing for a lesson without one."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more will happen; what is left are questions."""

    def _text(self, part: str, markdown: str) -> None:
        for page in self.screen.pages(markdown):
            self.screen.show(part, page)

    def _question(self, part: str, question: Question) -> None:
        asked = f"**{question.text}**"
        self._text(part, asked)
        self._text(part, f"{asked}\n\n{question.answer}" if self.screen.on_screen else question.answer)

    def _output(self) -> None:
        """What demo.py printed, cut between its tables where it is too long for one frame."""
        head = [*command(self.output["command"], self.screen.width), Text("")]
        room = self.screen.height - len(head)
        pages: list[list[str]] = [[]]
        for block in self.output["text"].split("\n\n"):
            lines = [*block.splitlines(), ""]
            if pages[-1] and len(pages[-1]) + len(lines) > room + 1:
                pages.append([])
            pages[-1] += lines
        for page in pages:
            for first in range(0, len(page), room):
                self.screen.show("demo.py", text([*head, *map(Text, page[first : first + room])]))

    def _training(self) -> None:
        """Follow it to its end, then show its last frame and its books until a key is pressed."""
        started = time.monotonic()
        part = "training"
        for event in self.events():
            self.training = self.training or Training()
            if event:
                self.training.take(event)
                self._said(event)
            self.screen.update(part, text(live(self.training, time.monotonic() - started, self.screen.width)))
        if self.training:
            self.screen.show(part, text(live(self.training, time.monotonic() - started, self.screen.width)))
            for page in tables(self.training, self.screen.height):
                self.screen.show("the books", text(page))

    def _said(self, event: Event) -> None:
        """For those who see no screen: the command, and about ten steps."""
        if event["kind"] == "run":
            self.screen.say(f"\n$ {event['command']}")
        elif event["kind"] == "step" and self.training and event.get("train_loss") is not None:
            if event["step"] % max(1, self.training.about["steps"] // 10) == 0:
                self.screen.say(f"step {event['step']}, training loss {event['train_loss']:.4f}")


class Performance(Show):
    """On ranks of this machine, and recorded."""

    def __init__(self, lesson: Lesson, screen: Screen, folder: Path, how: Launched):
        super().__init__(lesson, screen, folder)
        self.how = how
        self.complete = False
        self._open = ExitStack()

    def __enter__(self) -> "Performance":
        self.recorder = Recorder(self.folder)
        self.recorder.add({"kind": "lesson", "schema": 1, "number": self.lesson.number, "name": self.lesson.name})
        self.script: Script = self._open.enter_context(script(self.how, self.folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if not self.complete and kind in (Quit, KeyboardInterrupt):  # ranks take some seconds for it
            print("shardrun: ending what the presentation has started …", file=sys.stderr, flush=True)
        self._open.__exit__(None, None, None)

    def get_output(self) -> Event:
        while self.script.running:
            seconds = time.monotonic() - self.script.started
            self.screen.update("demo.py", Text(f"$ {self.script.command}\n\nIt is running … {seconds:.0f} s"))
            time.sleep(0.1)
        return self.recorder.add(self.script.output())

    def events(self) -> Iterator[Event | None]:
        if not self.how.config:
            return
        for event in self._open.enter_context(training(self.how, self.folder)):
            yield self.recorder.add(event) if event else None

    def close(self) -> None:
        self.recorder.add({"kind": "end"})
        self.complete = True


class Replayed(Show):
    """From a recording, at the pace at which it was made, but for the pauses."""

    def __init__(self, lesson: Lesson, screen: Screen, folder: Path, events: list[Event]):
        super().__init__(lesson, screen, folder)
        self.recorded = events

    def get_output(self) -> Event:
        return next(event for event in self.recorded if event["kind"] == "output")

    def events(self) -> Iterator[Event | None]:
        before = 0.0
        for event in self.recorded:
            if event["kind"] in ("run", "step", "books"):
                if self.screen.on_screen:
                    time.sleep(min(LONGEST_GAP, event["at"] - before))
                before = event["at"]
                yield event
