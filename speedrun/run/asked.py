"""What the accelerate config file asks of the trainer itself, put into its configuration. Plain Python, no torch.

Clipping, accumulation, checkpointing of activations and compilation are settings of accelerate's and DeepSpeed's too.
Where the file says one, it goes before the preset. Where the trainer's own command line says otherwise, that is a
contradiction, and refused.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from speedrun.config import Config
from speedrun.stages import number_of_steps, resolve_stages
from strategies.errors import UserError

UNITS = ("Block", "Attention", "MLP", "GPT")
"""Classes of the model's modules that FSDP can gather as one unit. GPT is the whole model, which is one in any case."""


def options_said(arguments: list[str]) -> set[str]:
    """The fields that a command line sets: `--optimizer.clip 0.5` → optimizer.clip, `--no-compile` → compile."""
    options = (word.partition("=")[0].lstrip("-") for word in arguments if word.startswith("--"))
    names = {option.replace("-", "_") for option in options}
    return {re.sub(r"(^|\.)no_", r"\1", name) for name in names}


def honoured(config: Config, asks: Mapping[str, Any], world_size: int, said: Collection[str] = ()) -> Config:
    """The configuration with what a launch asks for.

    asks: clip, accumulation, checkpointing, compile, global_batch, micro_batch → a value, which knows where it was said
    (strategies.config_keys.Said); said: fields that the trainer's command line sets, such as optimizer.clip.

    Raises ValueError where the two contradict each other, or a batch cannot be cut as asked.
    """

    def contradiction(ask: Any, name: str, ours: Any) -> UserError:
        return UserError(f"{ask} is asked for, but --{name} says {ours}: remove one.")

    if clip := asks.get("clip"):
        if "optimizer.clip" in said and config.optimizer.clip != clip.value:
            raise contradiction(clip, "optimizer.clip", config.optimizer.clip)
        config = replace(config, optimizer=replace(config.optimizer, clip=clip.value))
    if compiled := asks.get("compile"):
        if "compile" in said and not config.compile:
            raise contradiction(compiled, "no-compile", "not to")
        config = replace(config, compile=True)
    if (recompute := asks.get("checkpointing")) and config.model.checkpointing == "none":
        if "model.checkpointing" in said:
            raise contradiction(recompute, "model.checkpointing", "none")
        config = replace(config, model=replace(config.model, checkpointing=recompute.value))
    if accumulation := asks.get("accumulation"):
        config = _accumulating(config, accumulation, world_size, said)
    _check_batches(config, asks, world_size)
    return config


def _check_batches(config: Config, asks: Mapping[str, Any], world_size: int) -> None:
    """Raises ValueError where batch sizes that the file says are not those of every stage."""
    if not {"global_batch", "micro_batch"} & set(asks):
        return
    for stage in resolve_stages(config, number_of_steps(config), world_size):
        ours = {"global_batch": stage.global_batch, "micro_batch": stage.batches.micro_batch}
        for name, rows in ours.items():
            if (ask := asks.get(name)) and ask.value != rows:
                raise UserError(
                    f'{ask} is asked for, but {stage.name}.{name} over {world_size} ranks is {rows}; write "auto" '
                    f"there, or pass --data.{name.replace('_', '-')} {ask.value}."
                )


def check_units(units: Collection[str], shown: object) -> None:
    """Raises ValueError where a class to wrap is none of the model's. shown: the config's name."""
    for name in units:
        if name not in UNITS:
            raise UserError(
                f"{shown}: fsdp_transformer_layer_cls_to_wrap {name} is not supported: the model has "
                f"{', '.join(UNITS)}; write Block."
            )


def _accumulating(config: Config, ask: Any, world_size: int, said: Collection[str]) -> Config:
    """Every stage's micro-batch such that a step has so many."""
    steps, data = ask.value, config.data

    def micro_batch(name: str, global_batch: int) -> int:
        if global_batch % (world_size * steps):
            raise UserError(
                f"{ask} over {world_size} ranks cuts a global batch into {world_size * steps}, but {name}.global_batch "
                f"is {global_batch}: make it a multiple, or remove gradient_accumulation_steps."
            )
        rows = global_batch // (world_size * steps)
        if "data.micro_batch" in said and data.micro_batch != rows:
            raise UserError(
                f"{ask} over {world_size} ranks makes micro-batches of {rows} rows, but --data.micro-batch says "
                f"{data.micro_batch}: remove one."
            )
        return rows

    table = tuple(
        replace(line, micro_batch=micro_batch(f"schedule.stages.{i}", line.global_batch or data.global_batch))
        for i, line in enumerate(config.schedule.stages)
    )
    rows = data.micro_batch if table else micro_batch("data", data.global_batch)
    return replace(config, data=replace(data, micro_batch=rows), schedule=replace(config.schedule, stages=table))
