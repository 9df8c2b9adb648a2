"""The ideas that can be dropped or added, one line each: the fields of a run with the idea, and without it.

A field is written as on the trainer's command line with dots, `model.qk_norm`; those of the section `launch` go to
accelerate launch. No torch in here.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from speedrun.config import Config
from speedrun.wiring import check_model

Changes = dict[str, Any]
"""Field → value."""


@dataclass(frozen=True)
class Setting:
    """What a run is to be: the trainer's configuration, and the accelerate config with what replaces single keys."""

    config: Config
    accelerate: Path
    launch: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """The value of a field now."""
        section, _, key = name.rpartition(".")
        if section == "launch":
            written = yaml.safe_load(self.accelerate.read_text(encoding="utf-8")).get(key)
            return self.launch.get(key) or written or "no"
        return getattr(getattr(self.config, section) if section else self.config, key)

    def has(self, changes: Changes) -> bool:
        """Whether all those fields have those values already."""
        return all(self.get(name) == value for name, value in changes.items())

    def with_changes(self, changes: Changes) -> "Setting":
        """The same with these fields replaced. Raises TypeError or AttributeError for a field that there is not."""
        config, launch = self.config, dict(self.launch)
        for name, value in changes.items():
            section, _, key = name.rpartition(".")
            if section == "launch":
                launch[key] = value
            elif section:
                config = dataclasses.replace(
                    config, **{section: dataclasses.replace(getattr(config, section), **{key: value})}
                )
            else:
                config = dataclasses.replace(config, **{key: value})
        return Setting(config, self.accelerate, launch)


@dataclass(frozen=True)
class Idea:
    """off and on: the fields that make it absent and present; needs: without which it would change nothing."""

    group: str
    about: str
    off: Changes
    on: Changes
    needs: Changes = field(default_factory=dict)

    def is_on(self, setting: Setting) -> bool:
        return not setting.has(self.off)

    def hindrance(self, setting: Setting) -> str | None:
        """Why it can be neither dropped nor added here; None where it can."""
        missing = [f"{name} {value}" for name, value in self.needs.items() if setting.get(name) != value]
        if missing:
            return f"only with {', '.join(missing)}"
        try:
            check_model(setting.with_changes(self.off if self.is_on(setting) else self.on).config.model)
        except ValueError as error:
            return str(error)
        return None


def _field(name: str, off: Any, on: Any, about: str, needs: Changes | None = None) -> Idea:
    """An idea of a single field."""
    return Idea(GROUPS[name.rpartition(".")[0]], about, {name: off}, {name: on}, needs or {})


GROUPS = {
    "optimizer": "optimizer",
    "model": "architecture",
    "schedule": "schedule",
    "launch": "precision and execution",
    "": "precision and execution",
}

MUON = {"optimizer.name": "muon"}
NGRAMS = {"model.bigram_rows": 4000, "model.trigram_rows": 4000, "model.fourgram_rows": 4000, "model.ngram_width": 32}
NO_NGRAMS = dict.fromkeys(NGRAMS, 0)

IDEAS: dict[str, Idea] = {
    "muon": _field("optimizer.name", "adamw", "muon", "Muon for the matrices of the blocks, not AdamW"),
    "polar_express": _field(
        "optimizer.orthogonalization",
        "newton_schulz",
        "polar_express",
        "a quintic per iteration, not one for all",
        MUON,
    ),
    "normuon": _field("optimizer.normuon", False, True, "Muon's rows (columns) are brought to one size", MUON),
    "momentum_warmup": _field("optimizer.muon_momentum_warmup", 0, 300, "Muon's momentum rises over 300 steps", MUON),
    "muon_weight_decay": _field("optimizer.muon_weight_decay", 0.0, 0.1, "decoupled, of Muon's matrices", MUON),
    "cautious_weight_decay": Idea(
        "optimizer",
        "weight decay only where the update goes towards zero too (0.1, of Muon's matrices)",
        {"optimizer.cautious_weight_decay": False},
        {"optimizer.cautious_weight_decay": True, "optimizer.muon_weight_decay": 0.1},
        MUON,
    ),
    "momentum_cooldown": _field("optimizer.muon_momentum_cooldown", 0, 24, "and falls over the last 24 steps", MUON),
    "adamw_every": _field("optimizer.adamw_every", 1, 2, "AdamW updates at every second step"),
    "clipping": _field("optimizer.clip", 0.0, 1.0, "the global gradient norm is clipped at 1"),
    "embedding_lr": _field("optimizer.embedding_lr", 0.008, 0.1, "a larger rate for the embedding than the head's"),
    "rope": _field("model.positions", "learned", "rope", "rotary positions, not a learned table"),
    "half_rope": _field("model.positions", "rope", "half_rope", "half of a head's channels carry no position"),
    "window": _field("model.window_short", 0, 32, "attention sees 32 tokens back"),
    "paired_heads": _field("model.paired_head_layers", (), (0,), "two heads attend as one in block 0"),
    "attention_gate": _field("model.attention_gate", False, True, "a gate on every head's output"),
    "key_offset": Idea(
        "architecture",
        "half of every key is that of the token before",
        {"model.partial_key_offset": False},
        {"model.partial_key_offset": True, "model.long_layers": (0, 1)},
        {"model.positions": "half_rope"},
    ),
    "qk_norm": _field("model.qk_norm", False, True, "queries and keys are normalised"),
    "relu2": _field("model.mlp", "gelu", "relu2", "squared ReLU, not GELU"),
    "rms_norm": _field("model.norm", "layer", "rms", "RMSNorm without weights, not LayerNorm"),
    "bias": _field("model.bias", False, True, "biases in the linear layers"),
    "softcap": _field("model.softcap", 0.0, 15.0, "logits are softly capped"),
    "sigmoid_softcap": Idea(
        "architecture",
        "the asymmetric cap of the records",
        {"model.softcap_form": "tanh"},
        {"model.softcap_form": "sigmoid", "model.softcap": 23.0},
    ),
    "zero_init": _field("model.zero_init_projections", False, True, "output projections start at zero"),
    "tied_head": _field("model.tied_head", False, True, "head and embedding are one table"),
    "late_untying": Idea(
        "architecture",
        "head and embedding are one table for two thirds of the run",
        {"model.untie_at": 0.0},
        {"model.untie_at": 0.667, "model.tied_head": True},
    ),
    "ngrams": Idea(
        "architecture",
        "hash tables of two to four tokens (without them the model is smaller)",
        NO_NGRAMS,
        NGRAMS,
    ),
    "ngrams_for_blocks": Idea(
        "architecture",
        "the same tables in place of two more blocks",
        {**NO_NGRAMS, "model.layers": 4},
        {**NGRAMS, "model.layers": 2},
        {"model.layers": 2},
    ),
    "smear": _field("model.smear", False, True, "an embedding takes in the one before it"),
    "value_embeddings": _field("model.value_embeddings", (), (0, 1), "the values of two blocks take in the token"),
    "embedding_skip": _field("model.embedding_skip", False, True, "every block reads the embedding too"),
    "unet_skips": _field("model.unet_skips", False, True, "late blocks read early ones, in reverse"),
    "block_skip": _field("model.block_skip", None, (0, 2), "block 2 reads what block 0 wrote, too"),
    "backout": _field("model.backout", 0, 1, "the stream after block 0 is partly taken away before the head"),
    "lr_warmup": _field("schedule.warmup", 0, 12, "the learning rates rise over 12 steps"),
    "lr_decay": _field("schedule.name", "constant", "trapezoid", "rates fall to zero, not constant ones"),
    "multi_token": _field("schedule.future_weights", (), (0.5, 0.25), "two more tokens ahead in the loss, fading"),
    "bf16": _field("launch.mixed_precision", "no", "bf16", "matrix products in bf16 (slow on most CPUs)"),
    "fp8": Idea(
        GROUPS["launch"],
        "head and MLP in FP8 (emulated, and slow, on a CPU)",
        {"model.fp8": False},
        {"model.fp8": True},
    ),
    "compile": _field("compile", False, True, "torch.compile of every block"),
    "kernels": Idea(
        GROUPS["launch"],
        "Triton's kernels where they can run and pay, not plain torch",
        {"model.kernels": "torch"},
        {"model.kernels": "auto"},
        {"launch.use_cpu": "no"},
    ),
}
"""Name → idea. What an idea is replaced by when it is dropped is its `off`; a preset that is without it can have it
added, with `on`. Sizes in `on` are those that suit the preset tiny."""


def trainer_options(changes: Changes) -> list[str]:
    """The same changes as the trainer's options, without those of the section `launch`."""
    options: list[str] = []
    for name, value in changes.items():
        section, _, key = name.replace("_", "-").rpartition(".")
        dotted = f"--{section}." if section else "--"
        if section == "launch":
            continue
        if isinstance(value, bool):
            options.append(f"{dotted}{key}" if value else f"{dotted}no-{key}")
        elif isinstance(value, tuple):
            options += [f"{dotted}{key}", *map(str, value)]
        else:
            options += [f"{dotted}{key}", str(value)]
    return options


def described(changes: Changes) -> str:
    """Changes in words: field and value."""
    return ", ".join(f"{name.partition('.')[2] or name} {_shown(value)}" for name, value in changes.items())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else "none" if value is None else str(value)
