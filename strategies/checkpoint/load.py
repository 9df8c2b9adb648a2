"""Loading: check everything first, then read what this rank holds, whoever saved it.

    index = check(folder, expected shapes)          # before anything is started: index, sizes, names, shapes
    verify(folder, index)                           # every byte against its hash
    load(folder, index, strategy)                   # into the strategy's own tensors

Whatever is wrong is a ValueError or FileNotFoundError that names the file or the tensor, before a weight has changed.
So is a value that is not finite: no step that follows could count.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from strategies.base import Strategy
from strategies.checkpoint.finite import not_finite
from strategies.checkpoint.format import INDEX, Index, read_sums
from strategies.checkpoint.pieces import expected, generators, parts, set_generators
from strategies.checkpoint.shards import Shards, file_hash
from strategies.errors import UserError
from strategies.layout import Interval, Shape
from strategies.mesh import Place

WEIGHT, GENERATOR = "weight/", "generator."


def check_weights(folder: Path, index: Index, shapes: Mapping[str, Shape]) -> None:
    """Compare the checkpoint's weights with a model's parameters. Raises ValueError where it is another model's."""
    saved = {
        name.removeprefix(WEIGHT): tensor.shape for name, tensor in index.tensors.items() if name.startswith(WEIGHT)
    }
    if missing := [name for name in shapes if name not in saved]:
        raise UserError(f"{folder} is of another model: it has no {missing[0]} ({len(missing)} such parameters).")
    if extra := [name for name in saved if name not in shapes]:
        raise UserError(f"{folder} is of another model: it has {extra[0]}, which this one has not ({len(extra)} such).")
    for name, shape in shapes.items():
        if saved[name] != tuple(shape):
            raise UserError(
                f"{folder} is of another model: its {name} has shape {list(saved[name])}, here it has {list(shape)}."
            )


def verify_files(folder: Path, index: Index, files: Iterable[str] | None = None) -> None:
    """Compare these files (None: all) with their hashes. Raises ValueError that names the first one that differs."""
    hashes = read_sums(folder)
    for name in files if files is not None else [*index.files, INDEX]:
        if file_hash(folder / name) != hashes[name]:
            raise UserError(f"{folder / name} is damaged: its SHA-256 is not the one written; use another checkpoint.")


def load(folder: Path, index: Index, strategy: Strategy) -> None:
    """Verify, and make the strategy's weights, optimizer state, loss scale and generators what they were when it was
    saved. An fp16 run that goes on from one in another precision, or saved by an older version, begins its scale anew.

    Every rank hashes some of the files and reads only the elements that it holds, straight into what the optimizer
    uses: no second copy of its shards is made. Generators are set where a rank of
    this number saved at the same world size; at another one they have no counterpart. Collective: where one rank finds
    something wrong, all raise its ValueError.
    """
    optimizer, place = strategy.optimizer, strategy.optimizer.place
    files = sorted(index.files)
    optimizer.reset()
    optimizer.initialize()

    def examine() -> None:
        mine = files[place.global_rank :: place.ranks]
        verify_files(folder, index, mine)
        if why := not_finite(folder, index, mine):
            raise UserError(f"{folder} cannot be gone on from: {why}; use another checkpoint.")
        _check_names(folder, index, expected(optimizer))

    _together(place, examine)
    with torch.no_grad(), Shards(folder) as shards:

        def look() -> None:
            counts: dict[int, tuple[float, str]] = {}
            for part in parts(optimizer):
                shards.check({part.name: index.tensors[part.name]})
                if part.shape == ():
                    count = shards.whole(part.name, index.tensors[part.name]).item()
                    first = counts.setdefault(part.local.data_ptr(), (count, part.name))
                    if first[0] != count:  # parameters that share a flat partition share its step count
                        raise UserError(f"{folder}: {first[1]} is {first[0]:.0f} but {part.name} is {count:.0f}.")

        _together(place, look)
        for part in parts(optimizer):  # nothing is known any more that could be wrong
            shards.read(part.name, index.tensors[part.name], part.held[place.rank], part.local)
    strategy.publish_weights()
    if strategy.loss_scale and index.loss_scale:
        strategy.loss_scale.load(index.loss_scale)
    _restore_generators(folder, index, place)


def _check_names(folder: Path, index: Index, shapes: dict[str, Shape]) -> None:
    saved = {name: tensor for name, tensor in index.tensors.items() if not name.startswith(GENERATOR)}
    check_weights(folder, index, {n.removeprefix(WEIGHT): s for n, s in shapes.items() if n.startswith(WEIGHT)})
    for name in sorted(set(saved) ^ set(shapes)):
        verb = "holds" if name in saved else "does not hold"
        raise UserError(f"{folder} is of another optimizer: it {verb} {name}; resume with the optimizer that saved it.")
    for name, shape in shapes.items():
        if saved[name].shape != shape or saved[name].dtype != "float32":
            raise UserError(f"{folder}: {name} is {saved[name].dtype} {list(saved[name].shape)}, not {list(shape)}.")


def _restore_generators(folder: Path, index: Index, place: Place) -> None:
    if index.saved_by.get("world_size") != place.ranks:
        return
    now = generators(place.device)
    states = {}
    with Shards(folder) as shards:
        for name, state in now.items():
            saved = index.tensors.get(f"{GENERATOR}{name}/rank_{place.global_rank:03d}")
            if saved is not None and saved.shape == state.shape and saved.dtype == "uint8":
                states[name] = torch.empty_like(state, device="cpu")
                full_name = f"{GENERATOR}{name}/rank_{place.global_rank:03d}"
                shards.read(full_name, saved, Interval(0, state.numel()), states[name])
    set_generators({**now, **states}, place.device)


def _together(place: Place, job: Callable[[], None]) -> None:
    """Run it on all ranks; where one of them raises a user's error, all raise the first one. Collective."""
    mine: Exception | None = None
    try:
        job()
    except (ValueError, FileNotFoundError) as error:
        mine = error
    said: list[str | None] = [str(mine) if mine else None]
    if place.ranks > 1:
        said = said * place.ranks
        dist.all_gather_object(said, str(mine) if mine else None)
    if mine:
        raise mine
    if first := next((text for text in said if text), None):
        raise UserError(first)
