"""Files of a lesson beside one another: a folder whose name begins with a digit is no package."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_beside(file: str, name: str) -> ModuleType:
    """The module NAME.py in the folder of `file` (a `__file__`), loaded anew; or in the lesson's own folder here, where
    the learner has no copy of it (by_hand.py)."""
    path = Path(file).with_name(f"{name}.py")
    if not path.is_file():
        path = Path(__file__).parent / Path(file).resolve().parent.name / path.name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
