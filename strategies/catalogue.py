"""The only list of strategies. Plain Python, no torch: engines, and books too, are imported when they are asked for.

A strategy is a folder, which tells its whole story:

    config.py   what an accelerate config file says of it
    books.py    what it holds, sends and hides, in numbers and in words; plain Python
    engine.py   how it does it, with torch or DeepSpeed
    fake.py     what running it on tensors without data needs, where it needs anything

A new one is a folder, a line here, and a config in accelerate_configs/.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from strategies.errors import UserError
from strategies.ledger.terms import StrategyBooks

if TYPE_CHECKING:
    from strategies.base import Settings, Strategy

FOLDERS = {
    "single": "strategies.single",
    "ddp": "strategies.ddp",
    "fsdp": "strategies.fsdp",
    "hsdp": "strategies.fsdp",
    "zero1": "strategies.zero",
    "zero2": "strategies.zero",
    "zero3": "strategies.zero",
}
"""Name → package, in the order of tables. Asked from the last to the first, the first that claims a config has it."""
WHOLE = "ddp"
"""Every rank holds everything: what the others are shown beside."""
ALIKE = ("zero1", "zero2")
"""The two that hold the same at the peak of a step of one micro-batch."""


def names() -> tuple[str, ...]:
    """All strategies."""
    return tuple(FOLDERS)


def spread(world_size: int | None = None) -> tuple[str, ...]:
    """Those that spread a run over so many ranks; None: over any number of them."""
    sizes = (2, 3) if world_size is None else (world_size,)
    return tuple(name for name in FOLDERS if name != "single" and all(books(name).fits(size) for size in sizes))


def books(name: str) -> StrategyBooks:
    """What the strategy holds, sends and hides. Raises ValueError for a name that is none."""
    return _part(name, "books").books(name)  # type: ignore[no-any-return]


def engine(name: str, settings: "Settings") -> "Strategy":
    """The strategy itself, not yet prepared. Raises ValueError for a name that is none."""
    return _part(name, "engine").engine(name, settings)  # type: ignore[no-any-return]


def look_here(name: str, cpu: bool) -> None:
    """Whether this machine has what the strategy's engine needs, before a process group starts. Raises ValueError."""
    look = getattr(_part(name, "config"), "look_here", None)
    if look is not None:
        look(cpu)


def fake(name: str) -> AbstractContextManager[None]:
    """Around a run of the engine on tensors without data: patches of what asks for data."""
    if find_spec(f"{_folder(name)}.fake") is None:
        return nullcontext()
    return _part(name, "fake").fake()  # type: ignore[no-any-return]


def configs() -> list[ModuleType]:
    """The `config.py` of every folder, the last first: in this order they are asked whether a config is theirs."""
    return [import_module(f"{folder}.config") for folder in dict.fromkeys(reversed(FOLDERS.values()))]


def distributed_types() -> tuple[str, ...]:
    """Every distributed_type that a strategy is started by, in the order of tables."""
    return tuple(dict.fromkeys(folder.DISTRIBUTED_TYPE for folder in reversed(configs())))


def _part(name: str, part: str) -> ModuleType:
    return import_module(f"{_folder(name)}.{part}")


def _folder(name: str) -> str:
    if name not in FOLDERS:
        raise UserError(f"there is no strategy {name!r}; there are {', '.join(FOLDERS)}.")
    return FOLDERS[name]
