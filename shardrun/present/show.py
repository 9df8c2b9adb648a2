"""The parts of a presentation, in order, and who shows them: a performance on ranks, or a replay of a recording."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from shardrun.lesson.course import Lesson
from shardrun.lesson.guess import compared, keep, parsed, shown_in, worded
from shardrun.present.figures import Training
from shardrun.present.frame import command, live, one_step, tables
from shardrun.present.notes import note_of
from shardrun.present.page import write_page
from shardrun.present.readme import Question, read_readme
from shardrun.present.record import Event, Recorder
from shardrun.present.screen import Heading, Lines, Quit, Screen, Wish
from shardrun.present.training import Launched, Script, script, training

LONGEST_GAP = 1.0
"""Seconds that a replay waits between two events at most: nobody wants to see the ranks import torch again."""

FILMED_GAP = 0.15
"""The same where it is filmed, which need not take as long as it took."""

Frames = list[RenderableType]


@dataclass(frozen=True)
class Part:
    """frames: what is shown, asked when the part is; before: what happens until then, and may be left with a wish."""

    name: str
    key: str
    """Of its speaker's note."""
    frames: Callable[[], Frames]
    before: Callable[[Heading], Wish | None] | None = None


class Show:
    """The order of things. Where demo.py's output and the training's events come from is its children's."""

    def __init__(self, lesson: Lesson, screen: Screen, folder: Path, ranks: int = 2):
        self.lesson, self.screen, self.folder, self.ranks = lesson, screen, folder, ranks
        self.readme = read_readme(lesson.folder / "README.md")
        self.output: Event = {}
        self.training: Training | None = None
        self.trained = False
        self.guessed: float | None = None
        self.page: Path | None = None
        self.started = time.monotonic()
        self.printed = False
        """Whether demo.py's output has been printed while it came, for those who see no screen."""
        self.parts = self._parts()
        screen.names = [part.name for part in self.parts]

    def __enter__(self) -> "Show":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is Quit:  # what has been shown so far is as good a page, if it is all there
            self.write()

    def _parts(self) -> list[Part]:
        def pages(markdown: str) -> Callable[[], Frames]:
            return lambda: list(self.screen.pages(markdown))

        readme = self.readme
        parts = [
            Part("Goal", "goal", pages(f"**{self.lesson.about}**\n\n{readme.goal}")),
            Part("Mental model", "model", pages(readme.model)),
            Part("Terms", "terms", pages(readme.terms)),
        ]
        if self.lesson.guess:
            parts.append(Part("Guess first", "guess", self._guess_frames, self._ask))
        parts.append(Part("demo.py", "demo", self._output_frames, self._run_demo))
        parts.append(Part("What to look at", "look", pages(readme.look)))
        if self.lesson.live.config:
            parts.append(Part("Training", "training", self._training_frames, self._train))
            parts.append(Part("One step", "step", self._step_frames))
            parts.append(Part("The books", "books", self._books_frames))
        for number, question in enumerate(readme.questions, start=1):
            name = f"Question {number} of {len(readme.questions)}"
            parts.append(Part(name, "question", self._question_frames(question)))
        return [*parts, Part("The page to share", "page", self._page_frames, self._finish)]

    def play(self) -> None:
        """From the goal to the last answer. Raises Quit where that is enough before."""
        at, backwards = 0, False
        while at < len(self.parts):
            wish = self._play(at, backwards)
            backwards = wish.step < 0 and wish.part is None
            at = wish.part if wish.part is not None else max(0, at + wish.step)

    def _play(self, at: int, backwards: bool) -> Wish:
        part = self.parts[at]
        if part.before and (wish := part.before(Heading(part.name, at, len(self.parts)))):
            return wish
        frames = part.frames()
        page = len(frames) - 1 if backwards else 0
        while 0 <= page < len(frames):
            heading = Heading(part.name, at, len(self.parts), page, len(frames))
            wish = self.screen.show(heading, frames[page], note_of(self.lesson, part.key))
            if wish.part is not None or wish.skip:
                return wish
            page += wish.step
        return Wish(step=-1 if page < 0 else 1)

    def get_output(self, heading: Heading) -> Event | Wish:
        """What demo.py printed, once it has ended; a wish where somebody goes elsewhere before."""
        raise NotImplementedError

    def events(self) -> Iterator[Event | None]:
        """What the training does."""
        raise NotImplementedError

    def stop_training(self) -> None:
        """End the run that is shown."""

    def close(self) -> None:
        """Nothing more will happen."""

    # The parts that are more than text.

    def _ask(self, heading: Heading) -> Wish | None:
        """Have a number typed, where somebody can."""
        if self.output or not self.screen.keys or self.guessed is not None:
            return None
        said = self.screen.ask(heading, lambda typed: self._question_of_guess(f"{typed}█"))
        if isinstance(said, Wish):
            return said
        self.guessed = parsed(said)
        if self.guessed is not None:
            self.note_guess(self.guessed)
        return Wish()

    def note_guess(self, guess: float) -> None:
        """It is part of the recording."""

    def _question_of_guess(self, typed: str) -> RenderableType:
        assert self.lesson.guess
        text = Text(worded(self.lesson.guess, self.ranks), "bold")
        text.append(f"\n\n{self.lesson.guess.unit}: ", "dim")
        return text.append(typed)

    def _guess_frames(self) -> Frames:
        typed = "" if self.guessed is None else f"{self.guessed:g}"
        return [self._question_of_guess(typed)]

    def _run_demo(self, heading: Heading) -> Wish | None:
        """Show demo.py's output as it comes, to its end."""
        if self.output:
            return None
        found = self.get_output(heading)
        if isinstance(found, Wish):
            return found
        self.output = found
        return None

    def _head(self) -> list[Text]:
        return [*command(self.output["command"], self.screen.width), Text("")]

    def _output_frames(self) -> Frames:
        """What demo.py printed, cut between its tables where it is too long for one frame."""
        head = self._head()
        lines = self.output["text"].splitlines()
        told = self._comparison()
        if not self.screen.on_screen:
            return [] if self.printed else [Lines([*head, *map(Text, lines), *told])]
        room = self.screen.height - len(head)
        pages: list[list[Text]] = [[]]
        for block in "\n".join(lines).split("\n\n"):
            rows = [*map(Text, block.splitlines()), Text("")]
            if pages[-1] and len(pages[-1]) + len(rows) > room + 1:
                pages.append([])
            pages[-1] += rows
        pages[-1] += told
        return [Lines([*head, *page]) for page in pages]

    def _comparison(self) -> list[Text]:
        """The guess beside the number that the demo found."""
        shown = shown_in(self.output["text"])
        if self.guessed is None or shown is None or not self.lesson.guess:
            return []
        return [Text(compared(self.guessed, shown, self.lesson.guess.unit), "bold")]

    def _train(self, heading: Heading) -> Wish | None:
        """Follow the run to its end, or until it is skipped."""
        if self.trained:
            return None
        if wish := self._run_demo(heading):  # one launch at a time: both want the same port
            return wish
        self.screen.say_heading(heading)
        for event in self.events():
            self.training = self.training or Training()
            if event:
                self.training.take(event)
                self._said(event)
            wish = self.screen.update(heading, self._live(), foot="s skip · p parts · q end")
            if wish and wish.skip:
                self.stop_training()
                break
            if wish:
                return wish
        self.trained = True
        return None

    def _live(self) -> RenderableType:
        assert self.training
        return Lines(live(self.training, time.monotonic() - self.started, self.screen.width, self.screen.height))

    def _training_frames(self) -> Frames:
        return [self._live()] if self.training and self.training.about else []

    def _step_frames(self) -> Frames:
        shown = self.training and self.training.timeline
        return [Lines(one_step(self.training, self.screen.width, self.screen.height))] if shown else []  # type: ignore[arg-type]

    def _books_frames(self) -> Frames:
        if not self.training or not self.training.about:
            return []
        return [Lines(page) for page in tables(self.training, self.screen.width, self.screen.height)]

    def _said(self, event: Event) -> None:
        """For those who see no screen: the command, and about ten steps."""
        if event["kind"] == "run":
            self.screen.say(f"$ {event['command']}")
        elif event["kind"] == "step" and self.training and event.get("train_loss") is not None:
            if event["step"] % max(1, self.training.about["steps"] // 10) == 0:
                self.screen.say(f"step {event['step']}, training loss {event['train_loss']:.4f}")

    def _question_frames(self, question: Question) -> Callable[[], Frames]:
        asked = f"**{question.text}**"
        return lambda: [
            *self.screen.pages(asked),
            *self.screen.pages(f"{asked}\n\n{question.answer}" if self.screen.on_screen else question.answer),
        ]

    def _finish(self, heading: Heading) -> Wish | None:
        """What has not run by now, because somebody went past it, runs before the page is made."""
        wish = self._run_demo(heading) or (self._train(heading) if self.lesson.live.config else None)
        if not wish:
            self.write()
        return wish

    def write(self) -> None:
        """The page, and the end of the recording; where all is there and it was not done before."""
        if self.page or not self.output or (self.lesson.live.config and not self.trained):
            return
        self.page = write_page(self.folder, self.lesson, self.readme, self.output, self.training)
        self.close()

    def _page_frames(self) -> Frames:
        return [Text(f"{self.page}\n\nThe same figures in one file, that works offline.")]


class Performance(Show):
    """On ranks of this machine, and recorded."""

    def __init__(self, lesson: Lesson, screen: Screen, folder: Path, how: Launched):
        super().__init__(lesson, screen, folder, how.processes or 2)
        self.how = how
        self.complete = False
        self._open = ExitStack()
        self._training = ExitStack()
        self._events: Iterator[Event | None] | None = None

    def __enter__(self) -> "Performance":
        self.recorder = Recorder(self.folder)
        self.recorder.add({"kind": "lesson", "schema": 1, "number": self.lesson.number, "name": self.lesson.name})
        self.script: Script = self._open.enter_context(script(self.how, self.folder))
        self._open.enter_context(self._training)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        super().__exit__(kind, *exception)
        if not self.complete and kind in (Quit, KeyboardInterrupt):  # ranks take some seconds for it
            print("shardrun: ending what the presentation has started …", file=sys.stderr, flush=True)
        self._open.__exit__(None, None, None)

    def note_guess(self, guess: float) -> None:
        self.recorder.add({"kind": "guess", "guess": guess})

    def get_output(self, heading: Heading) -> Event | Wish:
        head = command(self.script.command, self.screen.width)
        self.screen.say_heading(heading)
        self.screen.say_lines([*head, Text("")])
        self.printed, said = True, 0
        while self.script.running:
            said = self._say_new(said)
            if wish := self.screen.update(heading, self._running(head), foot="s skip · p parts · q end"):
                if not wish.skip:
                    return wish
                self.script.skip()
            time.sleep(0.1)
        event = self.recorder.add(self.script.output())
        self.screen.say_lines(map(Text, event["text"].splitlines()[said:]))
        shown, guess = shown_in(event["text"]), self.lesson.guess
        if self.guessed is not None and shown is not None and guess:
            keep(self.lesson.number, worded(guess, self.ranks), self.guessed, shown, guess.unit)
        return event

    def _running(self, head: list[Text]) -> RenderableType:
        """The end of what demo.py has printed so far."""
        lines = self.script.lines()
        above = max(0, len(lines) - (self.screen.height - len(head) - 3))
        first = Text(f"… {above} lines above" if above else "", "dim")
        foot = Text(f"It is running … {time.monotonic() - self.script.started:.0f} s", "dim")
        return Lines([*head, first, *map(Text, lines[above:]), Text(""), foot])

    def _say_new(self, said: int) -> int:
        """Print what has come since, up to its last line that is not empty, where there is no screen."""
        if self.screen.on_screen:
            return 0
        lines = "\n".join(self.script.lines()).strip("\n").splitlines()
        self.screen.say_lines(map(Text, lines[said:]))
        return len(lines)

    def events(self) -> Iterator[Event | None]:
        """The same run goes on where somebody went elsewhere and came back."""
        if self._events is None:
            self.started = time.monotonic()
            self._events = self._training.enter_context(training(self.how, self.folder))
        for event in self._events:
            yield self.recorder.add(event) if event else None

    def stop_training(self) -> None:
        self._training.close()

    def close(self) -> None:
        self.recorder.add({"kind": "end"})
        self.complete = True


class Replayed(Show):
    """From a recording, at the pace at which it was made, but for the pauses."""

    def __init__(self, lesson: Lesson, screen: Screen, folder: Path, events: list[Event]):
        super().__init__(lesson, screen, folder)
        self.recorded = events
        self.guessed = next((event["guess"] for event in events if event["kind"] == "guess"), None)
        self._left = [event for event in events if event["kind"] in ("run", "whole", "step", "books")]

    def get_output(self, heading: Heading) -> Event | Wish:
        return next(event for event in self.recorded if event["kind"] == "output")

    def events(self) -> Iterator[Event | None]:
        before = self._left[0]["at"] if self._left else 0.0
        while self._left:
            event = self._left.pop(0)
            if self.screen.on_screen:
                longest = FILMED_GAP if self.screen.film else LONGEST_GAP
                time.sleep(min(longest, event["at"] - before))
            before = event["at"]
            yield event
