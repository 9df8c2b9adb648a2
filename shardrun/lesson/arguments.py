"""What a function was given, before and after: has it changed what belongs to its caller?

Everything that hangs on the arguments is looked at: tensors with their whole storage, gradients, flags and hooks;
modules; arrays; lists, dictionaries and plain objects, however deep. Callables are called and not looked into.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

VALUES, STORAGE, ITEMS, FLAGS, HOOKS = "values", "storage", "items", "flags", "hooks"
GRADIENTS, NEW_GRADIENTS = "gradients", "new gradients"

ALLOWED = {
    "values": {VALUES},
    "items": {ITEMS},
    "gradients": {GRADIENTS, NEW_GRADIENTS},
    "gradients in place": {GRADIENTS},
    "storage": {VALUES, STORAGE},
    "anything": {VALUES, GRADIENTS, NEW_GRADIENTS, STORAGE, ITEMS, FLAGS, HOOKS},
}
"""What `changes` of lesson.toml may say of an argument → the changes that it allows. `values`: elements, in the same
storage; `items`: of a list or dictionary; `gradients`: .grad, of a tensor or a module's parameters (`in place`: where
there is one it stays the same tensor); `storage`: other data, of another dtype too."""

HOOKS_OF_MODULES = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip
DEEPEST = 12

Look = Callable[[], dict[str, Any]]


class Snapshot:
    """Arguments by name, as they are now. `changed` says in a sentence what has become of them since."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # so that no id is used again
        self._storages: set[int] = set()  # each is copied once, however many views of it are given
        self._parts: list[tuple[str, str, Look, dict[str, Any], Any]] = []
        with _unseen():
            for name, value in arguments.items():
                for path, part, owner in self._walk(value, f"`{name}`", 0):
                    self._parts.append((name, path, part, part(), owner))

    def changed(self, allowed: Mapping[str, Iterable[str]]) -> str:
        """One sentence on the first thing that has changed and should not have; empty where there is none."""
        with _unseen():
            for name, path, part, before, _ in self._parts:
                for aspect, now in self._differences(part, before, allowed.get(name, ())):
                    kind, _, about = aspect.partition(":")
                    return _sentence(path, kind, about, before[aspect], now, bool(allowed.get(name, ())))
        return ""

    def put_back(self, allowed: Mapping[str, Iterable[str]], result: Any) -> bool:
        """Undo what should not have changed, so that a check can go on with it; whether that was possible.

        Not where the result lies in the same memory, and not for storages, flags and the like.
        """
        with _unseen():
            own = {tensor.untyped_storage().data_ptr() for tensor in tensors(result)}
            for name, _, part, before, value in self._parts:
                for aspect, _now in list(self._differences(part, before, allowed.get(name, ()))):
                    if aspect == f"{VALUES}:version" or aspect == HOOKS:
                        continue
                    if not _restore(value, aspect, before[aspect], own):
                        return False
        return True

    def _differences(self, part: Look, before: dict[str, Any], words: Iterable[str]) -> Iterator[tuple[str, Any]]:
        kinds = set().union(*(ALLOWED[word] for word in words))
        for aspect, now in part().items():
            kind = aspect.partition(":")[0]
            new = kind == NEW_GRADIENTS and before[aspect] is None and GRADIENTS in kinds
            if kind not in kinds and not new and not _equal(before[aspect], now):
                yield aspect, now

    def _walk(self, value: Any, path: str, depth: int) -> Iterator[tuple[str, Look, Any]]:
        """Everything that can change below `value`: (path in words, what it looks like now, the thing itself)."""
        if depth > DEEPEST or id(value) in self._seen or isinstance(value, (str, bytes, int, float, type, type(None))):
            return
        self._seen.add(id(value))
        self._kept.append(value)
        inner: Iterable[tuple[str, Any]] = ()
        if isinstance(value, Tensor):
            whole = value.layout == torch.strided and value.device.type != "meta"
            first = whole and (at := value.untyped_storage().data_ptr()) not in self._storages
            if first:
                self._storages.add(at)
            yield path, lambda: _tensor(value, with_values=first), value
        elif isinstance(value, np.ndarray):
            yield path, lambda: _array(value), value
        elif isinstance(value, nn.Module):
            yield path, lambda: _module(value), value
            parts = [*value._parameters.items(), *value._buffers.items(), *value._modules.items()]
            inner = [(_key(key, path), part) for key, part in parts]
        elif isinstance(value, dict):
            yield path, lambda: {ITEMS: list(value.items())}, value
            inner = [(f"entry {key!r} of {path}", part) for key, part in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield path, lambda: {ITEMS: list(value)}, value
            inner = [(f"entry {i} of {path}", part) for i, part in enumerate(value)]
        elif hasattr(value, "__dict__") and not callable(value) and _plain(value):
            yield path, lambda: {ITEMS: list(vars(value).items())}, value
            inner = [(f"{key} of {path}", part) for key, part in vars(value).items()]
        for where, part in inner:
            yield from self._walk(part, where, depth + 1)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result: itself, or in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value] if value.layout == torch.strided and value.device.type != "meta" else []
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in tensors(part)] if isinstance(value, (list, tuple)) else []


def _restore(value: Any, aspect: str, before: Any, own: set[int]) -> bool:
    """Make one thing what it was; whether that can be done. own: addresses of the storages of the result."""
    if aspect == VALUES and isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in own:
            return False
        torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage).copy_(before)
        return True
    if aspect == VALUES and isinstance(value, np.ndarray) and value.flags.writeable:
        value[...] = np.frombuffer(before, value.dtype).reshape(value.shape)
        return True
    if aspect == ITEMS and isinstance(value, list):
        value[:] = before
        return True
    if aspect == ITEMS and isinstance(value, dict):
        value.clear()
        value.update(before)
        return True
    return False


def _key(key: str, path: str) -> str:
    """A module's part by its whole name: "weight" in "0 of `model`" is "0.weight of `model`"."""
    own, _, rest = path.rpartition(" of ")
    return f"{own}.{key} of {rest}" if own else f"{key} of {path}"


def _plain(value: Any) -> bool:
    """An object that is nothing but what it holds; of torch's own, an optimizer."""
    return isinstance(value, torch.optim.Optimizer) or not type(value).__module__.startswith(("torch", "numpy"))


class _unseen:
    """Looking must not be noticed: by counters of memory, by autograd, by overridden functions."""

    def __enter__(self) -> None:
        self._inside = (torch._C.DisableTorchFunction(), torch.no_grad(), _disable_current_modes())
        for each in self._inside:
            each.__enter__()

    def __exit__(self, *error: Any) -> None:
        for each in reversed(self._inside):
            each.__exit__(*error)


def _tensor(tensor: Tensor, with_values: bool) -> dict[str, Any]:
    gradient = tensor.grad if tensor.is_leaf else None
    hooks = [list(getattr(tensor, name, None) or ()) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    place = (_address(tensor), tuple(tensor.shape), _strides(tensor), tensor.dtype, str(tensor.device))
    return {
        f"{STORAGE}:dtype": tensor.dtype,
        f"{STORAGE}:shape": tuple(tensor.shape),
        STORAGE: place,
        VALUES: _bytes(tensor) if with_values else None,
        f"{VALUES}:version": None if tensor.is_inference() else tensor._version,
        f"{FLAGS}:requires_grad": tensor.requires_grad,
        HOOKS: hooks,
        NEW_GRADIENTS: None if gradient is None else _address(gradient),
        GRADIENTS: None if gradient is None else _bytes(gradient),
    }


def _array(array: np.ndarray) -> dict[str, Any]:
    return {
        f"{STORAGE}:dtype": array.dtype,
        f"{STORAGE}:shape": array.shape,
        STORAGE: (array.__array_interface__["data"][0], array.strides),
        VALUES: array.tobytes(),
        f"{FLAGS}:writeable": array.flags.writeable,
    }


def _module(module: nn.Module) -> dict[str, Any]:
    parts = [*module._parameters.items(), *module._buffers.items(), *module._modules.items()]
    return {
        f"{FLAGS}:training": module.training,
        HOOKS: [list(getattr(module, name, None) or ()) for name in HOOKS_OF_MODULES],
        ITEMS: parts,
    }


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided and tensor.device.type != "meta" else id(tensor)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()) if tensor.layout == torch.strided else ()


def _bytes(tensor: Tensor) -> Tensor | None:
    """A copy of all of the tensor's storage: who gets a view must not write beside it either."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).clone()


def _equal(before: Any, now: Any) -> bool:
    """Bit for bit; entries of a list are the same objects, or the same plain values (nan is nan)."""
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return torch.equal(before, now)
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        return len(before) == len(now) and all(map(_equal, before, now))
    if before is now:
        return True
    simple = (str, bytes, int, float, complex, type(None), torch.dtype, np.dtype)
    if isinstance(before, simple) and type(before) is type(now):
        return before == now or repr(before) == repr(now)
    return False


def _sentence(path: str, kind: str, about: str, before: Any, now: Any, in_place: bool) -> str:
    """What happened to whom, and what to do about it."""
    mine = "which belongs to its caller"
    if kind == STORAGE and in_place:
        what = {"dtype": "another dtype", "shape": "another shape"}.get(about, "another storage")
        return (
            f"Your function has given {path} {what}: it is to be changed in place, for others hold views of it. Write "
            "into it (copy_, add_, mul_ …)."
        )
    if kind == STORAGE:
        return f"Your function has given {path}, {mine}, {'another ' + about if about else 'another storage'}."
    if about == "version":
        return f"Your function has written into {path}, {mine}, if only to put it back: work on a copy (clone)."
    if kind == VALUES:
        return f"Your function has changed {path}, {mine}: its numbers are others than before. Work on a copy (clone)."
    if kind == NEW_GRADIENTS and in_place:
        return (
            f"Your function has given {path} another gradient tensor: its gradient is to be changed in place (copy_)."
        )
    if kind in (GRADIENTS, NEW_GRADIENTS):
        what = "has a gradient now" if before is None else "has none any more" if now is None else "is another now"
        return f"Your function has changed the gradient of {path}, {mine}: it {what}."
    if kind == HOOKS:
        left = sum(map(len, now)) > sum(map(len, before))
        what = "hooks are still on it: remove them when you are done" if left else "hooks that were on it are gone"
        return f"Your function has changed {path}, {mine}: {what}."
    if kind == FLAGS:
        return f"Your function has changed {path}, {mine}: its {about} was {before} and is {now}."
    if len(before) != len(now):
        return f"Your function has changed {path}, {mine}: it had {len(before)} entries and has {len(now)} now."
    if sorted(map(id, before)) == sorted(map(id, now)) or sorted(map(repr, before)) == sorted(map(repr, now)):
        return f"Your function has changed {path}, {mine}: its entries stand in another order. Sort a copy (sorted)."
    return f"Your function has changed {path}, {mine}: it has other entries than before. Work on a copy."


def in_few_words(value: Any, most: int = 60) -> str:
    """A value in few words: small ones whole, of large tensors dtype and shape."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if value.numel() <= 8 and value.device.type != "meta":
            return f"{kind} {value.tolist()}"
        return f"{kind} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        return f"[{', '.join(in_few_words(part, 20) for part in value[:4])}{', …' if len(value) > 4 else ''}]"
    if callable(value):
        return getattr(value, "__name__", "a function")
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= most else text[: most - 2] + " …"
