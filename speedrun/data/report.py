"""What became of the files of a folder of text. Plain Python."""

from dataclasses import dataclass, field

NAMED = 3
"""Files named per reason in a line; the others are counted."""


@dataclass
class TextReport:
    """What was read of a folder, and what was not."""

    files: int = 0
    """That gave documents."""
    documents: int = 0
    text_bytes: int = 0
    """Of the documents, as UTF-8."""
    copies: int = 0
    """Documents that say the same as one before them; a document counts once."""
    empty_documents: int = 0
    """Lines and rows without text."""
    converted: dict[str, int] = field(default_factory=dict)
    """Encoding → files, where it was not plain UTF-8."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Reason → names of files and folders, relative to the source."""

    def leave_out(self, name: str, why: str) -> None:
        self.left_out.setdefault(why, []).append(printable(name))

    def convert(self, encoding: str) -> None:
        self.converted[encoding] = self.converted.get(encoding, 0) + 1

    def what_is_missing(self) -> list[str]:
        """A line per reason why something of the folder is no document."""
        found = []
        if self.empty_documents:
            found.append(f"left out {_count(self.empty_documents, 'line or row', 'lines or rows')} without text")
        for why, names in self.left_out.items():
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            found.append(f"left out {', '.join(names[:NAMED])}{more}: {why}")
        return found

    def lines(self) -> list[str]:
        """All of it, in words."""
        found = [f"read {_count(self.files, 'file')}: {_count(self.documents, 'document')}, {self.text_bytes:,} bytes"]
        found += [f"converted to UTF-8: {_count(count, 'file')} in {name}" for name, count in self.converted.items()]
        if self.copies:
            are = "document is a copy of another" if self.copies == 1 else "documents are copies of others"
            found.append(f"{self.copies:,} {are}: each text counts once")
        return found + self.what_is_missing()

    def in_short(self) -> str:
        """One line where anything was converted, left out or there twice; else nothing."""
        parts = [f"{count:,} converted from {name}" for name, count in self.converted.items()]
        if self.copies:
            parts.append(f"{_count(self.copies, 'copy', 'copies')}, counted once")
        hidden_last = sorted(self.left_out, key=lambda why: why.startswith("hidden"))
        names = [name for why in hidden_last for name in self.left_out[why]]
        if names:
            parts.append(f"{len(names):,} left out: {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}")
        if self.empty_documents:
            parts.append(f"{self.empty_documents:,} without text")
        if not parts:
            return ""
        read = f"{_count(self.documents, 'document')} from {_count(self.files, 'file')}"
        return f"text: {read}; {'; '.join(parts)} (`shardrun data inspect FOLDER` says why)"


def printable(name: str) -> str:
    """A file's name that can be printed, whatever bytes it has."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def _count(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"
