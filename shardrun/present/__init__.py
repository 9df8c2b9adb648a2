"""`shardrun present N`: a lesson, presented in the terminal: its text, then live what it is about, then the books.

    the text         the lesson's README.md, a part at a time; questions, and with the next key their answers
    the guess        of the number that demo.py will show
    demo.py          runs meanwhile; what it prints, as it comes, and its pictures in the page
    the training     of lessons with a [live] run: every rank's memory, the collectives and the loss while it trains
    one step         what rank 0 held and sent in the course of a step
    the books        predicted, measured and remainder, of every rank
    the page         the same figures in one HTML file, to share

Everything that is shown is recorded, and can be shown again from the recording, without ranks and without torch.
"""

import argparse
import signal
from pathlib import Path
from types import FrameType

from shardrun.lesson.course import Lesson, find_lesson
from shardrun.present.film import Film
from shardrun.present.notes import note_of
from shardrun.present.record import Event, find_recording, new_folder, read_recording
from shardrun.present.screen import Quit, Screen
from shardrun.present.show import Performance, Replayed, Show
from shardrun.present.training import launched
from strategies.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Present lesson N: its text, part by part; live, every rank's memory and collectives while it trains; the "
        "books at the end; and a page with the same figures, in one file, to share. Any key brings the next frame, b "
        "the one before; s skips a part, p lists the parts to go to, j and k scroll, ? shows the speaker's note, q "
        "ends. Where stdin is no terminal nothing waits for a key."
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
    parser.add_argument("--notes", action="store_true", help="print the parts with the speaker's notes, and end")
    parser.add_argument(
        "--film", type=Path, metavar="FILE.svg", help="with --auto: no terminal, but its frames as an animated SVG"
    )


def run(arguments: argparse.Namespace) -> int:
    lesson = find_lesson(arguments.number)
    if arguments.auto is not None and not 0 <= arguments.auto < float("inf"):
        raise UserError(f"--auto is a number of seconds, not {arguments.auto}.")
    title = f"Lesson {lesson.number}: {lesson.title}"
    if arguments.notes:
        return _print_notes(lesson, Screen(title))
    film = _film(arguments)
    screen = Screen(title, arguments.auto, film.terminal() if film else None)
    screen.film = film
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
    if film:
        print(f"Film: {film.write(screen.title)}")
    if isinstance(show, Performance) and show.complete:
        print(f"Again, without ranks: shardrun present {lesson.number} --replay {show.folder}")
    return 0


def _film(arguments: argparse.Namespace) -> Film | None:
    """Raises ValueError where nothing sets the pace."""
    if arguments.film is None:
        return None
    if arguments.auto is None:
        raise UserError("--film needs a pace: add --auto SECONDS.")
    replay = " --replay RUN" if arguments.replay else ""
    command = f"shardrun present {arguments.number}{replay} --auto {arguments.auto:g} --film {arguments.film.name}"
    return Film(arguments.film, command)


def _print_notes(lesson: Lesson, screen: Screen) -> int:
    """The order of the presentation, for whoever will speak."""
    show = Show(lesson, screen, Path())
    for number, part in enumerate(show.parts, start=1):
        print(f"part {number} of {len(show.parts)}: {part.name}\n    {note_of(lesson, part.key)}")
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
