"""Saving without holding up training: copy to host memory, then write in a background thread.

    saver = Saver(folder, strategy.name, "fp32", optimizer, keep=3)
    …
    saver.save(step, run={…})     # returns when the copy is made; a save still under way is waited for first
    …
    saver.wait()

Each rank writes its own share. The ranks' threads use no collective, which would get in the way of training's: a rank
that has written leaves a note beside its file, and rank 0, when it has seen the notes of all, writes the index and
gives the folder its name. So all ranks must see one file system.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies import strict_json
from strategies.checkpoint import folder as folders
from strategies.checkpoint.disk import write_synced
from strategies.checkpoint.finite import first_not_finite, tensor_in_words
from strategies.checkpoint.format import (
    INDEX,
    SUMS,
    Index,
    Piece,
    Stored,
    index_json,
    read_index,
    shard_name,
    sums_text,
)
from strategies.checkpoint.pieces import generators, parts
from strategies.checkpoint.shards import write_shard
from strategies.errors import UserError
from strategies.layout import Interval, Shape
from strategies.loss_scale import LossScale
from strategies.mesh import Place
from strategies.optimizer import IntervalOptimizer

PEERS_TIMEOUT = 1800.0
"""Seconds that rank 0 waits for the other ranks to have written."""

Pieces = dict[str, tuple[Shape, Interval]]
"""Tensor → its whole shape, and which elements this rank saves."""


class Saver:
    """The checkpoints of a run, as one rank writes them.

    keep: how many of the newest stay; keep_best: so does the one with the lowest score. `failure` says in a sentence
    why the last save that ended did not succeed, None where it did: a full disk is no reason by itself to lose a run.
    `not_finite` says, once there was one, which value it was that is not finite: such a state is never written, and
    nothing older is let go for it. On rank 0 both speak for all ranks.
    """

    def __init__(
        self,
        folder: Path | None,
        strategy: str,
        precision: str,
        optimizer: IntervalOptimizer,
        keep: int = 2,
        keep_best: bool = False,
        loss_scale: LossScale | None = None,
    ):
        """Collective: all ranks make one; the folder is that of rank 0. loss_scale: fp16's, the strategy's own.

        Raises ValueError for a `keep` below 1, OSError for a folder that cannot be made.
        """
        if keep < 1:
            raise UserError(f"checkpoint.keep {keep} would keep none; keep at least 1.")
        self.optimizer, self.keep, self.keep_best = optimizer, keep, keep_best
        self.place: Place = optimizer.place
        self.loss_scale = loss_scale
        self.saved_by = {"strategy": strategy, "precision": precision, "world_size": self.place.ranks}
        self.saved_by["torch"] = torch.__version__
        self.failure: str | None = None
        self.not_finite: str | None = None
        self.saved: int | None = None
        """The step of the last one that is whole, on rank 0."""
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        if self.place.global_rank == 0:
            assert folder is not None
            folder.mkdir(parents=True, exist_ok=True)
            folders.clear(folder)
        # The attempt's own name: what ranks of an earlier one, killed while it saved, have left is not mistaken for
        # this one's. The broadcast also keeps the others from writing before rank 0 has cleared that away.
        said = [str(folder), os.urandom(8).hex()]
        if self.place.ranks > 1:
            dist.broadcast_object_list(said, 0)
        self.folder, self._attempt = Path(said[0]), said[1]

    def save(self, step: int, run: dict[str, Any], score: float | None = None) -> None:
        """Save the run as it is now, after so many steps; returns as soon as a copy is in host memory.

        run: whatever the trainer wants to find again, as JSON; score: lower is better, for `keep_best`. All ranks call
        it, but do not wait for one another. The outcome is in `failure`, after `wait`.
        """
        self.wait()
        self.optimizer.initialize()  # nothing to do, unless all steps so far were left out
        tensors, pieces = self._copy()
        scale = self.loss_scale.state() if self.loss_scale else None
        index = Index(step, {**self.saved_by, "score": score}, run, {}, {}, scale)
        self._thread = threading.Thread(target=self._write, args=(index, tensors, pieces), name="checkpoint")
        self._thread.daemon = True  # a run that fails does not wait for it
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether nothing is being written at this moment."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until what this rank has to do for the last save is done: on rank 0 the whole checkpoint."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _copy(self) -> tuple[dict[str, Tensor], Pieces]:
        """Copies on the host of what this rank saves, flat, and of which tensor's elements each is."""
        tensors: dict[str, Tensor] = {}
        pieces: Pieces = {}
        with torch.no_grad():
            for part in parts(self.optimizer):
                interval, local = part.share(self.place)
                if interval.numel:
                    assert local.dtype == torch.float32, f"{part.name} is {local.dtype}"
                    tensors[part.name] = self._host_copy(part.name, local)
                    pieces[part.name] = (part.shape, interval)
        for name, state in generators(self.place.device).items():
            full_name = f"generator.{name}/rank_{self.place.global_rank:03d}"
            tensors[full_name] = state.clone()
            pieces[full_name] = (tuple(state.shape), Interval(0, state.numel()))
        if self.place.device.type == "cuda":
            torch.cuda.current_stream(self.place.device).synchronize()
        return tensors, pieces

    def _host_copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in memory that is kept from save to save: new pages cost more than the copy itself."""
        if name not in self._host:
            pinned = tensor.device.type == "cuda"  # what the GPU copies to without a stop in between
            self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        return self._host[name].copy_(tensor, non_blocking=True)

    def _write(self, index: Index, tensors: dict[str, Tensor], pieces: Pieces) -> None:
        """In the thread. Whatever goes wrong is the save's failure and not the run's."""
        writing = self.folder / f"{folders.WRITING}{folders.name_of(index.step)}-{self._attempt}"
        try:
            writing.mkdir(exist_ok=True)
            note = self._write_shard(writing / shard_name(self.place.global_rank), tensors)
            self._leave(writing, {"tensors": pieces, **note})
            if self.place.global_rank == 0:
                notes = [self._await(writing, rank) for rank in range(self.place.ranks)]
                try:
                    if bad := [other["not_finite"] for other in notes if "not_finite" in other]:
                        first = next((name for name in bad if name.startswith("weight/")), bad[0])
                        self.not_finite = f"{tensor_in_words(first)} is not finite after step {index.step}"
                        raise FloatingPointError(f"{tensor_in_words(first)} is not finite")
                    if errors := [other["error"] for other in notes if "error" in other]:
                        raise OSError(errors[0])
                    self._finish(writing, index, notes)
                except BaseException:
                    shutil.rmtree(writing, ignore_errors=True)
                    raise
            self.failure = note.get("error")
        except Exception as error:
            self.failure = str(error)
        if self.failure:
            self.failure = f"the checkpoint of step {index.step} was not saved: {self.failure}"

    def _write_shard(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write this rank's file; returns its size, hash and dtypes, or the error in words. Nothing is written where a
        value is not finite: then it returns which tensor's."""
        if (name := first_not_finite(tensors)) is not None:
            return {"not_finite": name, "error": f"{tensor_in_words(name)} is not finite"}
        try:
            written = write_shard(path, tensors)
        except OSError as error:
            path.unlink(missing_ok=True)  # on a full disk, room for the note that says so
            return {"error": f"rank {self.place.global_rank} could not write its part ({error})"}
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        return {"size": written.size, "sha256": written.sha256, "dtypes": dtypes}

    def _leave(self, writing: Path, note: dict[str, Any]) -> None:
        """Tell rank 0, whole or not at all, how this rank's writing went."""
        target = writing / f"rank_{self.place.global_rank:03d}.json"
        partial = target.with_suffix(".partial")
        partial.write_text(strict_json.dumps(note), encoding="utf-8")
        os.replace(partial, target)

    def _await(self, writing: Path, rank: int) -> dict[str, Any]:
        """What that rank has left."""
        path = writing / f"rank_{rank:03d}.json"
        deadline = time.monotonic() + PEERS_TIMEOUT
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} had not written its part after {PEERS_TIMEOUT:.0f} s")
            time.sleep(0.01)
        return json.loads(path.read_text(encoding="utf-8"))

    def _finish(self, writing: Path, index: Index, notes: list[dict[str, Any]]) -> None:
        """On rank 0: the index, the hashes, the name; then older ones go."""
        found: dict[str, tuple[tuple[int, ...], str, list[Piece]]] = {}
        hashes = {}
        for rank, note in enumerate(notes):
            file = shard_name(rank)
            index.files[file] = note["size"]
            hashes[file] = index.finite[file] = note["sha256"]
            for name, (shape, (start, stop)) in note["tensors"].items():
                found.setdefault(name, (tuple(shape), note["dtypes"][name], []))[2].append(Piece(file, start, stop))
        for name, (shape, dtype, held) in found.items():
            index.tensors[name] = Stored(shape, dtype, tuple(sorted(held, key=lambda piece: piece.start)))
        content = index_json(index)
        hashes[INDEX] = hashlib.sha256(content).hexdigest()
        write_synced(writing / INDEX, content)
        write_synced(writing / SUMS, sums_text(hashes).encode())
        for rank in range(len(notes)):
            (writing / f"rank_{rank:03d}.json").unlink()
        read_index(writing)  # what it says of itself must hold before anything older is let go
        folders.publish(writing, index.step)
        self.saved = index.step
        folders.prune(self.folder, self.keep, self._best if self.keep_best else lambda _: None, index.step)

    def _best(self, found: dict[int, Path]) -> int | None:
        """The step with the lowest score; a checkpoint that cannot be read has none."""
        scores = {}
        for step, path in found.items():
            try:
                score = read_index(path).saved_by.get("score")
            except (ValueError, FileNotFoundError):
                continue
            if isinstance(score, int | float):
                scores[step] = score
        return min(scores, key=lambda step: scores[step], default=None)
