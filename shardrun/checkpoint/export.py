"""A checkpoint's weights as a folder in the layout of the Hugging Face hub: model.safetensors, config.json, README.md.

The model is this project's GPT under its own parameter names; the card says how to load it.
"""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardrun.checkpoint.tokens import Tokens, tokens_of
from strategies import strict_json
from strategies.checkpoint.finite import not_finite
from strategies.checkpoint.format import Index, Stored
from strategies.checkpoint.load import WEIGHT, verify_files
from strategies.checkpoint.shards import Shards, write_shard
from strategies.errors import UserError
from strategies.output import naming, utf8

SHARD_BYTES = 5 * 10**9
"""Weights beyond this go into several files with an index, as the hub's own libraries write them."""


def export(folder: Path, index: Index, out: Path) -> list[Path]:
    """Write the weights in float32, the model's configuration, its tokenizer and a model card; returns the files.

    Verifies the checkpoint first. Raises ValueError where `out` is there, and for a checkpoint that is damaged, was not
    saved by the trainer, or has a weight that is not finite.
    """
    config = index.run.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"{folder} was not saved by the trainer: its index says nothing of the model's configuration.")
    if out.exists():
        raise UserError(f"{out} is there already: name another folder with --out.")
    verify_files(folder, index)
    if why := not_finite(folder, index, kind=WEIGHT):
        raise UserError(f"{folder} is not exported: {why}; export an earlier checkpoint of the run.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(out):
            partial.mkdir(parents=True)
            _write_weights(folder, index, partial)
            _write_about(index, out, partial)
            os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(out.iterdir())


def _write_about(index: Index, out: Path, partial: Path) -> None:
    """All but the weights."""
    hub = {
        "architectures": ["GPT"],
        "model_type": "shardrun-gpt",
        "torch_dtype": "float32",
        **index.run["config"]["model"],
    }
    hub["document_start"] = index.run.get("document_start")
    (partial / "config.json").write_text(strict_json.dumps(hub, indent=2) + "\n", encoding="utf-8")
    tokens = tokens_of(index)
    if tokens.tokenizer:
        (partial / "tokenizer.json").write_bytes(tokens.tokenizer)
    (partial / "README.md").write_bytes(utf8(model_card(index, out.name, tokens)))


def _write_weights(folder: Path, index: Index, out: Path) -> None:
    """One file, or several of at most SHARD_BYTES and their index."""
    groups: list[dict[str, str]] = [{}]
    size = 0
    for full_name, tensor in index.tensors.items():
        if full_name.startswith(WEIGHT):
            if size and size + 4 * tensor.numel > SHARD_BYTES:
                groups.append({})
                size = 0
            groups[-1][full_name.removeprefix(WEIGHT)] = full_name
            size += 4 * tensor.numel
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        total = sum(4 * tensor.numel for name, tensor in index.tensors.items() if name.startswith(WEIGHT))
        places = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with Shards(folder) as shards:
        for file, group in zip(names, groups, strict=True):
            stored = {name: index.tensors[full_name] for name, full_name in group.items()}
            weights = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
            read = partial(_read, shards, stored)  # one at a time: the model is never whole in memory
            write_shard(out / file, weights, {"format": "pt"}, read)


def _read(shards: Shards, stored: dict[str, Stored], name: str) -> Tensor:
    return shards.whole(f"{WEIGHT}{name}", stored[name])


def model_card(index: Index, name: str, tokens: Tokens) -> str:
    """The card, with nothing in it but what the checkpoint says. Without a tokenizer it promises no text."""
    task = "pipeline_tag: text-generation\n" if tokens.tokenizer else ""
    run, by = index.run, index.saved_by
    figures: dict[str, Any] = run.get("metrics", {})
    data = run["config"].get("data", {})
    lines = [
        ("step", index.step),
        ("tokens seen", figures.get("tokens")),
        ("parameters", run.get("parameters")),
        ("validation loss, nats per token", figures.get("val_loss")),
        ("validation, bits per byte", figures.get("val_bits_per_byte")),
        ("training loss of the last step", figures.get("train_loss")),
        ("training time, s", figures["train_time_ms"] / 1e3 if figures.get("train_time_ms") is not None else None),
        ("trained by", f"{by.get('strategy')} on {by.get('world_size')} ranks, {by.get('precision')}"),
        ("preset", run.get("preset")),
        ("data", data.get("source")),
        ("seed", run["config"].get("seed")),
    ]
    table = "\n".join(f"| {what} | {_shown(value)} |" for what, value in lines if value is not None)
    return f"""---
library_name: shardrun
{task}tags:
- gpt
- speedrun
---

# {name}

A GPT trained with Shardrun.

| | |
|---|---|
{table}

Figures are those of the checkpoint's own step; what was not measured at it is not shown.

## Tokens

{tokens.words}

## Loading it

```python
import dataclasses, json
from safetensors.torch import load_file
from speedrun.config import ModelConfig
from speedrun.model import GPT

config = json.load(open("config.json"))
fields = {{field.name for field in dataclasses.fields(ModelConfig)}}
model_config = ModelConfig(**{{key: value for key, value in config.items() if key in fields}})
model = GPT(model_config, document_start=config["document_start"])  # attention stays inside a document
missing, unexpected = model.load_state_dict(load_file("model.safetensors"), strict=False)
assert not unexpected and set(missing) <= {{"head.weight"}}  # a tied head is stored once
```
"""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
