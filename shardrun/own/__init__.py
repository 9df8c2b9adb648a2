"""A strategy of one's own: a file with one class, trained with by the trainer as if it were in the catalogue.

    accelerate launch --config_file accelerate_configs/cpu/ddp.yaml -m shardrun.own my_ddp.py tiny --steps 100

What the class promises stands in its file as a lesson gives it (lessons/04_ddp/my_ddp.py). The file says `LIKE = "…"`:
the strategy of the catalogue that it takes the place of, and with which its bytes are compared.
"""

import inspect
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shardrun.by_path import import_file
from strategies import catalogue
from strategies.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

LAUNCHED_BY = "ddp.yaml"
"""The accelerate config that starts its ranks, on a CPU or on GPUs: plain processes of torch's."""

METHODS = ("backward", "wait", "parts", "norm", "update", "clear", "held")
"""That the class has, beside `__init__(model, groups)`."""


class Portion(NamedTuple):
    """The elements of a parameter that a rank updates: flat, float32, views of the memory that counts."""

    parameter: "nn.Parameter"
    start: int
    """The first of them, in the flattened parameter."""
    weight: "Tensor"
    gradient: "Tensor | None"
    """Of the mean loss over all ranks, once it has been waited for; None where there is none yet."""


@dataclass(frozen=True)
class Own:
    """A strategy of one's own, as its file has it."""

    name: str
    """The file's name, without .py."""
    path: Path
    strategy: Any
    """The class."""
    like: str
    """The strategy of the catalogue that it is like."""
    lesson: Path
    """Folder of the lesson whose capstone it is."""


OWN: dict[str, Own] = {}
"""Those that were registered, by name."""


def register(path: Path) -> Own:
    """Import the file and put its strategy into this process's catalogue, under the file's name.

    Raises UserError where the file has no such class, and whatever importing it raises.
    """
    if path.stem in catalogue.FOLDERS and path.stem not in OWN:
        raise UserError(f"{path}: a strategy is named after its file, and {path.stem} is one of the catalogue's.")
    like, lesson = capstone_of(path)
    module = import_file(path, path.stem)
    found = [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]
    found = [each for each in found if all(hasattr(each, method) for method in METHODS)]
    if len(found) != 1:
        raise UserError(f"{path} has {len(found) or 'no'} classes with the methods {', '.join(METHODS)}; it needs one.")
    OWN[path.stem] = Own(path.stem, path, found[0], like, lesson)
    catalogue.FOLDERS[path.stem] = __name__
    return OWN[path.stem]


def capstone_of(path: Path) -> tuple[str, Path]:
    """What the file is like, by its line LIKE, and the folder of the lesson whose capstone it is.

    Raises UserError where it has no such line, or is not there.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: a strategy of your own begins with `shardrun lesson start 4`.")
    text = path.read_text(encoding="utf-8")
    targets = sorted(Path(str(resources.files("lessons"))).glob("*/target.py"))
    tomls = [tomllib.loads(target.with_name("lesson.toml").read_text(encoding="utf-8")) for target in targets]
    lessons = {toml["capstone"]["like"]: target.parent for toml, target in zip(tomls, targets, strict=True)}
    for like, lesson in lessons.items():
        if f'\nLIKE = "{like}"' in f"\n{text}":
            return like, lesson
    raise UserError(f'{path} does not say what it is like: give it a line LIKE = "…" with one of {", ".join(lessons)}.')


def target_of(own: Own) -> Any:
    """What its lesson asks for: the module target.py."""
    return import_file(own.lesson / "target.py", "target")


def new_state(rule: Any, weight: "Tensor") -> "dict[str, Tensor]":
    """What an update rule keeps of a weight, before its first step: zeros. The rule changes them in place."""
    import torch

    state = {buffer: torch.zeros_like(weight) for buffer in rule.buffers}
    return state if rule.whole_matrix else {**state, "step": torch.zeros((), device=weight.device)}
