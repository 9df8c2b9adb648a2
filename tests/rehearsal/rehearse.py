"""A whole run of the trainer on fake GPUs, as it happens in the process that has them (tests/fake_cuda)."""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from speedrun import evaluate
from speedrun.config import Config, DataConfig, StageConfig
from speedrun.run import context
from speedrun.run.command_line import parse
from speedrun.train import train
from strategies import catalogue
from strategies.base import Precision
from strategies.checkpoint.folder import find_checkpoint
from strategies.checkpoint.format import read_index
from strategies.checkpoint.load import verify_files
from strategies.checkpoint.save import Saver
from strategies.select import Launch
from tests.fake_cuda.device import GPUS, fake_gpus
from tests.fake_cuda.engines import engines
from tests.speedrun.runs import launch_of

SHORTER = 32
"""Windows and rows have so many times fewer tokens than a preset's."""
FEWER = 8
"""Its global batches have so many times fewer rows, and at least one for each GPU."""
MOST_ROWS = 4
"""Of a forward pass on one of GPUS."""


def small(preset: str, world_size: int, model: dict[str, Any]) -> Config:
    """A preset with all that it switches on, its stages too, on byte tokens and at a size that takes no time.

    As many steps as it takes to have one of every stage, and a third, whose books are kept.
    """
    _, config = parse([preset])
    full, stages = config.model, config.schedule.stages
    few = dataclasses.replace(
        full,
        vocab_size=257,
        layers=3 if full.block_skip else 2,
        width=16 * full.heads,
        bigram_rows=min(full.bigram_rows, 64),
        trigram_rows=min(full.trigram_rows, 64),
        fourgram_rows=min(full.fourgram_rows, 64),
        ngram_width=min(full.ngram_width, 8),
        max_sequence_length=full.max_sequence_length // SHORTER,
        window_short=full.window_short // SHORTER,
        window_long=full.window_long // SHORTER,
        long_layers=full.long_layers and (1, 2),
        value_embeddings=full.value_embeddings and (1,),
        paired_head_layers=full.paired_head_layers and (0,),
        block_skip=full.block_skip and (0, 2),
        backout=min(full.backout, 1),
    )
    length = (config.data.eval_sequence_length or config.data.sequence_length) // SHORTER
    data = dataclasses.replace(
        config.data,
        source="pydocs",
        eval_sequence_length=length,
        eval_tokens=2 * GPUS * length,
        **_fewer(config.data, world_size),
    )
    fewer = tuple(
        dataclasses.replace(
            stage,
            window_short=stage.window_short // SHORTER,
            window_long=stage.window_long // SHORTER,
            **_fewer(stage, world_size),
        )
        for stage in stages
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(few, **model),
        data=data,
        schedule=dataclasses.replace(config.schedule, stages=fewer),
        checkpoint=dataclasses.replace(config.checkpoint, every=3),
        steps=max(3, len(stages)),
        untimed_steps=1,
        progress="none",
        name="run",
    )


def _fewer(batch: DataConfig | StageConfig, world_size: int) -> dict[str, int]:
    rows = batch.global_batch and max(batch.global_batch // FEWER, GPUS)
    most = MOST_ROWS * GPUS // world_size
    return {"sequence_length": batch.sequence_length // SHORTER, "global_batch": rows, "micro_batch": min(most, rows)}


def rehearse(
    preset: str,
    strategy: str,
    precision: Precision,
    folder: str,
    model: dict[str, Any] | None = None,
    compiled: bool = False,
    engine: dict[str, Any] | None = None,
) -> dict[str, int]:
    """The run, as rank 0 of GPUS of them (single: as the one process). model: fields to change; engine: further
    settings of the strategy's.

    Raises what the trainer raises; AssertionError for a call that a GPU would not take, or a run that left something
    out. Returns how often each function was called.
    """
    world_size = 1 if strategy == "single" else GPUS
    config = dataclasses.replace(small(preset, world_size, model or {}), out=folder, compile=compiled)
    launch = dataclasses.replace(launch_of(strategy, 0, world_size, precision), cpu=False)
    launch = dataclasses.replace(launch, engine={**launch.engine, **(engine or {})})
    gpus = fake_gpus(flash=config.model.attention == "flash")
    beside = engines() if engine else contextlib.nullcontext()
    with warnings.catch_warnings(), gpus as calls, beside, _rank_0(launch):
        warnings.simplefilter("ignore")
        train(preset, config, launch)
    _check_run(Path(folder) / "run", config, launch)
    return dict(calls)


def waits(preset: str, strategy: str, folder: str) -> dict[str, int]:
    """What the host waits for the device in three steady steps, of which nothing but a line is kept, in bf16: by
    operator. (That the figures of a step before are waited for is left out.)"""
    world_size = 1 if strategy == "single" else GPUS
    config = small(preset, world_size, {"attention": "sdpa"})
    stages = tuple(dataclasses.replace(stage, until=1.0) for stage in config.schedule.stages[:1])
    config = dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, stages=stages),
        checkpoint=dataclasses.replace(config.checkpoint, every=0),
        optimizer=dataclasses.replace(config.optimizer, orthogonalization_dtype="bfloat16"),
        on_nonfinite="skip",
        spike=3.0,
        steps=12,
        eval_every=0,
        out=folder,
    )
    launch = dataclasses.replace(launch_of(strategy, 0, world_size, "bf16"), cpu=False)
    seen: list[dict[str, int]] = []
    done = context.Run.done

    def noting(run: context.Run, *args: Any, **kwargs: Any) -> None:
        done(run, *args, **kwargs)
        seen.append({name: count for name, count in calls.items() if name.startswith("waits")})

    with warnings.catch_warnings(), fake_gpus() as calls, _rank_0(launch):
        warnings.simplefilter("ignore")
        with mock.patch.object(context.Run, "done", noting):
            train(preset, config, launch)
    return {name: seen[9][name] - seen[6].get(name, 0) for name in seen[9] if seen[9][name] != seen[6].get(name, 0)}


@contextlib.contextmanager
def _rank_0(launch: Launch) -> Iterator[None]:
    """What differs between ranks is answered for all of them by this one."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  of fake tensors, for torch.ops.c10d
    from accelerate.state import PartialState
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {"ACCELERATE_USE_FSDP": str(launch.strategy == "fsdp").lower()}
    if launch.strategy != "single":
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(GPUS), "LOCAL_WORLD_SIZE": str(GPUS)}
    mean = context.mean_over_ranks

    def of_all(objects: list[Any], ours: Any, *args: Any) -> None:
        objects[:] = [ours] * len(objects)

    def keeping_signals(loss: Tensor, *signals: float) -> list[float]:
        return [mean(loss, *signals)[0], *signals]  # a number from the device would be one, and stop the run

    anybody = evaluate.Wishes.any

    def keeping_wishes(wishes: evaluate.Wishes, mine: bool) -> bool:
        anybody(wishes, mine)
        return mine  # likewise, and break a validation off

    PartialState._reset_state()
    patches: list[Any] = [
        mock.patch.dict(os.environ, environment),
        mock.patch.object(dist, "rendezvous", lambda *args: iter([(FakeStore(), 0, GPUS)])),
        mock.patch.object(dist, "init_process_group", _fake_group),
        mock.patch.object(dist, "get_backend", lambda group=None: "nccl"),
        mock.patch.object(dist, "all_gather_object", of_all),
        mock.patch.object(dist, "broadcast_object_list", lambda *args, **kwargs: None),
        mock.patch.object(context, "mean_over_ranks", keeping_signals),
        mock.patch.object(context.Figures, "read", lambda figures: [1.0, *[0.0] * 5, 1.0]),  # likewise
        mock.patch.object(evaluate.Wishes, "any", keeping_wishes),
        catalogue.fake(launch.strategy),
        # DDP times itself with CUDA events, from the first forward pass that it counts on.
        mock.patch.object(dist.Logger, "set_runtime_stats_and_log", lambda logger: None),
        mock.patch.object(dist.Reducer, "prepare_for_forward", lambda reducer: None),
    ]
    if launch.world_size > 1:  # the others' shards are not there to be put together with ours
        patches += [
            mock.patch.object(Saver, "_await", lambda saver, folder, rank: {}),
            mock.patch.object(Saver, "_finish", lambda saver, folder, index, notes: None),
        ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
        yield


_init_process_group = dist.init_process_group


def _fake_group(backend: str, store: Any, device_id: Any, **options: Any) -> None:
    assert (backend, device_id.type) == ("nccl", "cuda"), f"a process group on {backend} and {device_id}"
    _init_process_group("fake", store=store, **options)


def _check_run(folder: Path, config: Config, launch: Launch) -> None:
    """It came to its end, and left its books and its checkpoint."""
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", config.steps)
    assert "val_loss" in summary
    books = json.loads((folder / "ledger.json").read_text())
    assert (books["step"], len(books["ranks"])) == (3, launch.world_size)
    saved = folder / "checkpoints"
    if launch.world_size == 1:
        found = find_checkpoint(saved)
        verify_files(found, read_index(found))
    else:
        shards = list(saved.glob("**/rank_000.safetensors"))
        assert shards and shards[0].stat().st_size > 0
