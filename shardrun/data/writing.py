"""Files of a folder of shards that get their names together, when all are complete, or are not there at all."""

import re
from pathlib import Path
from types import TracebackType
from typing import Self

from strategies.errors import UserError
from strategies.output import naming

PART = ".part"

OURS = re.compile(r"((text|tokens)_(train|val)_\d{6}\.bin|held_out|tokens\.json|tokenizer\.json)\.part")
"""What a run that was killed may have left."""


class Together:
    """with Together(out) as files:
        write(files.part("a.bin"))

    At the end each has its name; after any error none is there, and the folder neither if it was not there before.

    Raises ValueError where `out` holds shards already.
    """

    def __init__(self, out: Path) -> None:
        if any(out.glob("*.bin")):
            raise UserError(f"{str(out)!r} holds .bin shards already: name another folder with --out, or remove them.")
        self.out = out
        self._names: list[str] = []
        self._made = [folder for folder in (out, *out.parents) if not folder.exists()]

    def part(self, name: str) -> Path:
        """Where a file is to be written that is going to be `out / name`."""
        self._names.append(name)
        return self.out / (name + PART)

    def __enter__(self) -> Self:
        with naming(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for path in self.out.iterdir():
                if OURS.fullmatch(path.name):
                    path.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        named: list[Path] = []
        try:
            if error is None:
                with naming(self.out):
                    for name in self._names:
                        (self.out / (name + PART)).replace(self.out / name)
                        named.append(self.out / name)
                named = []
        finally:
            for path in (*named, *(self.out / (name + PART) for name in self._names)):
                path.unlink(missing_ok=True)
            for folder in self._made if error or named else ():
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
