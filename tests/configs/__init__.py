"""Config files as people have them, each with the outcome that is right: the tables of this folder, read.

An entry of a table:

    id                  its name in the tests
    about               why the outcome is the one it is, where that is not plain
    yaml                the accelerate config, as written; `tail` names lines of the table's `tails` to append
    file                its name, else config.yaml (accelerate reads config.json too)
    encoding            its encoding, else UTF-8
    engine              DeepSpeed's JSON, as written; ENGINE in `yaml` stands for its path
    is                  accepted as: strategy, processes, precision, device
    asks                what else was asked for: see Entry
    refused             refused in a sentence that names `key`, as the user wrote it, and `value`, in the file where it
                        stands (`file: engine`, else the accelerate config), and says `says`. Of a list any one will do;
                        of a key with dots every part is named.
    at_launch           accepted by itself, but refused (key, value) by a run that it contradicts: global
                        batch 8 and clipping at 1.0, as many rows a micro-batch as a rank has
    accelerate: refuses accelerate 1.15 itself does not launch it
    launch              one of those that a test launches for real
    without_async_io    refused only where DeepSpeed's async_io is missing

Both `is` and `refused`: either is right. The files are written for this project, in the layouts that versions of
accelerate and well-known training projects produce. What is right was decided without Shardrun's code: by what
accelerate and DeepSpeed document and do, and by the rule that a setting which changes memory or mathematics is
honoured or refused, never ignored.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
TABLES = (
    "questionnaire",
    "questionnaire_sharded",
    "versions",
    "projects",
    "values",
    "engine",
    "engine_projects",
    "found",
)


@dataclass(frozen=True)
class Accepted:
    strategy: str
    world_size: int
    precision: str
    cpu: bool


@dataclass(frozen=True)
class Refused:
    keys: tuple[str, ...]
    """Any one of them is named."""
    values: tuple[str, ...]
    """Any one of them is named, in either case of letters; empty: none has to be."""
    engine: bool
    """Whether they stand in DeepSpeed's JSON."""
    says: str


@dataclass(frozen=True)
class Entry:
    table: str
    id: str
    yaml: str
    engine: str | None
    file: str
    accepted: Accepted | None
    refused: Refused | None
    asks: dict[str, Any] = field(default_factory=dict)
    """wrap (classes), reshard, replicas; checkpointing, compile; clip, accumulation, global_batch, micro_batch; ignored
    (modules); offload_params, offload_optimizer (devices); communication (dtype); not_predicted (keys).
    """
    at_launch: Refused | None = None
    accelerate_refuses: bool = False
    launch: bool = False
    without_async_io: bool = False
    encoding: str = "utf-8"

    def write(self, folder: Path) -> Path:
        """The files of the entry, in a folder. Returns the accelerate config's path."""
        text = self.yaml
        if self.engine is not None:
            engine = folder / "engine.json"
            engine.write_text(self.engine, encoding="utf-8")
            text = text.replace("ENGINE", str(engine))
        path = folder / self.file
        path.write_text(text, encoding=self.encoding)
        return path


def entries() -> list[Entry]:
    """All, in the order of the tables."""
    return [entry for table in TABLES for entry in _read(table)]


def _read(table: str) -> list[Entry]:
    content = yaml.safe_load((FOLDER / f"{table}.yaml").read_text(encoding="utf-8"))
    return [_entry(table, dict(row), content.get("tails", {})) for row in content["entries"]]


def _entry(table: str, row: dict[str, Any], tails: dict[str, str]) -> Entry:
    """Raises TypeError for a field that is none."""
    row.pop("about", None)
    accelerate = row.pop("accelerate", None)
    assert accelerate in (None, "refuses"), row["id"]
    text = row.pop("yaml", "")
    if tail := row.pop("tail", None):
        text += tails[tail]
    return Entry(
        table=table,
        yaml=text,
        engine=row.pop("engine", None),
        file=row.pop("file", "config.yaml"),
        accepted=_accepted(row.pop("is", None)),
        refused=_refused(row.pop("refused", None)),
        at_launch=_refused(row.pop("at_launch", None)),
        accelerate_refuses=accelerate == "refuses",
        **row,
    )


def _accepted(words: str | None) -> Accepted | None:
    if words is None:
        return None
    strategy, ranks, precision, device = words.split()
    return Accepted(strategy, int(ranks), precision, {"cpu": True, "gpu": False}[device])


def _refused(row: dict[str, Any] | None) -> Refused | None:
    if row is None:
        return None
    assert set(row) <= {"key", "value", "file", "says"}, row
    return Refused(
        _several(row.get("key")), _several(row.get("value")), row.get("file") == "engine", row.get("says", "")
    )


def _several(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(str(one) for one in (value if isinstance(value, list) else [value]))
