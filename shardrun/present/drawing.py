"""What a drawing of a diagram is made of, in character cells."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Box:
    """x, y: its corner; width, height with its frame. The title stands in the frame, `name` lines are the name."""

    x: int
    y: int
    width: int
    height: int
    lines: tuple[str, ...]
    title: str = ""
    name: int = 1


@dataclass(frozen=True)
class Path:
    """Corners of an arrow, and at which of its ends there is a head."""

    points: tuple[tuple[int, int], ...]
    at_start: bool = False
    at_end: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Words:
    """Text at a place; quiet: not in the first row of importance."""

    x: int
    y: int
    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Fill:
    """A filled stretch of a row; strong: to be seen first."""

    x: int
    y: int
    width: int
    strong: bool = False


@dataclass
class Drawing:
    """All of it; width and height are those that it takes."""

    boxes: list[Box] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    words: list[Words] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)

    @property
    def width(self) -> int:
        ends = [box.x + box.width for box in self.boxes] + [x + 1 for path in self.paths for x, _ in path.points]
        ends += [word.x + len(word.text) for word in self.words] + [fill.x + fill.width for fill in self.fills]
        return max(ends, default=0)

    @property
    def height(self) -> int:
        ends = [box.y + box.height for box in self.boxes] + [y + 1 for path in self.paths for _, y in path.points]
        ends += [word.y + 1 for word in self.words] + [fill.y + 1 for fill in self.fills]
        return max(ends, default=0)
