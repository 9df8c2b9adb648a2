"""What a verb prints and what it leaves: no character, no closed pipe and no interruption loses a result."""

from __future__ import annotations  # imported before the doctor looks at Python's version

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from strategies.output import naming, utf8


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: what was begun is tidied up as after Ctrl-C."""


class _Outliving:
    """A stream that is written to nowhere once nobody reads it any more (`| head`)."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            to_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            to_nowhere(self._stream)


def to_nowhere(stream: Any) -> None:
    """Let what is still written to this stream go to /dev/null, so that the last flush is quiet too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Go on where nobody reads the output any more: for verbs that leave files."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Outliving(streams[0]), _Outliving(streams[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP (unless it is ignored, as under nohup) raise Terminated, so that every `finally` is gone
    through: started processes are ended, what is half-written is taken away.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole, as UTF-8, or leave what was there. Raises ValueError, which names it, where that fails."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            partial.write_bytes(utf8(content) if isinstance(content, str) else content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def save_picture(figure: Any, path: Path, dpi: int) -> None:
    """A matplotlib figure as a file, whole."""
    import io

    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=dpi)
    write_whole(path, picture.getvalue())
