"""What a part leaves: sentences and tables, written after every line, so that a part cut off keeps what it had."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from strategies import strict_json

Cell = str | int | float | None


class Result:
    """The open result of a part. file: where it is written, as JSON."""

    def __init__(self, file: Path):
        self.file = file
        self.folder = file.with_suffix(".work")
        self.content: dict[str, Any] = {"notes": [], "tables": {}, "missing": []}

    def work(self) -> Path:
        """A new folder for what the part needs meanwhile; whoever runs the part removes it."""
        self.folder.mkdir()
        return self.folder

    def note(self, sentence: str) -> None:
        """A sentence above the tables."""
        self.content["notes"].append(sentence)
        self._write()

    def row(self, table: str, **cells: Cell) -> None:
        """A row under the title `table`; the names of the cells are its columns."""
        self.content["tables"].setdefault(table, []).append(cells)
        self._write()

    def table(self, table: str, rows: list[dict[str, Cell]]) -> None:
        """All rows under that title, in the place of those that were there."""
        self.content["tables"][table] = rows
        self._write()

    def has(self, package: str, without: str) -> bool:
        """Whether the package is installed; where it is not, the result says that `without` it is left out."""
        if find_spec(package):
            return True
        self.content["missing"].append(package)
        self.note(f"Left out: {without}, because the package {package} is not installed.")
        return False

    def _write(self) -> None:
        write_json(self.file, self.content)


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(strict_json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def asked() -> argparse.Namespace:
    """The command line of a part: result (a Result), what (its own arguments), tiny, peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=lambda text: Result(Path(text)))
    parser.add_argument("what", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at sizes that say nothing of speed")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    return parser.parse_args()
