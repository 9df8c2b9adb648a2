"""Which kernels a forward pass runs, as far as they decide what it keeps: a CPU's, or those that a run resolves to on a
GPU. Plain Python without torch, for speedrun/books/activations.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from speedrun.attention_choice import Kind, Where, choose_attention
from speedrun.config import Attention, ModelConfig
from speedrun.wiring import check_fp8
from strategies.errors import UserError

Version = tuple[int, int]

View = tuple[int, bool]
"""A layer's window, and whether its heads are paired: `speedrun.model.masks.View`, which needs torch."""


@dataclass(frozen=True)
class Kernels:
    """Of one device, as a run resolves them."""

    where: Where
    asked: Attention
    """model.attention."""
    triton: bool
    """The fused kernels of speedrun/kernels: a loss without logits, a linear layer that squares its ReLU."""

    @property
    def cuda(self) -> bool:
        return self.where.device == "cuda"

    @property
    def widens_rms_norm(self) -> bool:
        """Whether autocast casts RMSNorm's input to float32: on its list for CUDA since torch 2.12."""
        return self.cuda and self.where.torch >= (2, 12)

    def attention(self, window: int, length: int) -> Kind:
        """The attention function of a layer, both as in `choose_attention`."""
        return choose_attention(self.asked, self.where, window, length)[0]

    def as_dict(self, attention: Sequence[str]) -> dict[str, str]:
        """For people: what a prediction is of."""
        torch = ".".join(map(str, self.where.torch))
        if not self.cuda:
            return {"device": "cpu", "torch": torch, "kernels": "torch", "attention": " and ".join(attention)}
        return {
            "device": "GPU of compute capability {}.{}".format(*self.where.capability),
            "torch": torch,
            "kernels": "triton" if self.triton else "torch",
            "attention": " and ".join(attention),
        }


CPU = Kernels(Where("cpu", (0, 0), (2, 13), sixteen_bit=False), "sdpa", triton=False)
"""What torch 2.13 picks on a CPU."""


def kernels_on_gpu(capability: Version, torch: Version, model: ModelConfig, precision: str) -> Kernels:
    """The kernels of a run on a GPU of this compute capability with Triton, as a run resolves them there.

    torch: its version; precision: fp32, bf16 or fp16, of the run. Triton's kernels are for bf16. Raises ValueError for
    what cannot run there.
    """
    check_fp8(model, precision, capability)
    if model.kernels == "triton" and precision == "fp16":
        raise UserError("model.kernels is triton, but the run computes in fp16: use model.kernels torch or auto.")
    where = Where("cuda", capability, torch, sixteen_bit=precision != "fp32")
    triton = model.kernels == "triton" or (model.kernels == "auto" and precision == "bf16")
    return Kernels(where, model.attention, triton)


def view_of(config: ModelConfig, layer: int, time: int) -> View:
    """The layer's window, 0 where it reaches as far as the row, and whether its heads are paired."""
    window = config.window_long if layer in config.long_layers else config.window_short
    return window if window < time - 1 else 0, layer in config.paired_head_layers


def attention_kind(view: View, time: int, kernels: Kernels) -> Kind:
    """The attention function of a layer with this view; one of paired heads gets two positions per token."""
    window, paired = view
    return kernels.attention((1 + paired) * window, (1 + paired) * time)


def attention_kinds(config: ModelConfig, time: int, kernels: Kernels) -> list[Kind]:
    """Those of all layers, each once."""
    return list(
        dict.fromkeys(attention_kind(view_of(config, layer, time), time, kernels) for layer in range(config.layers))
    )


def parse_version(text: str) -> Version:
    """'2.11.0+cu130' → (2, 11). Raises ValueError for what is no version."""
    parts = text.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        raise UserError(f"torch {text!r} is no version; write for example 2.11.") from None


def installed_torch() -> Version:
    """The version of the torch package that is installed here, without loading it."""
    return parse_version(metadata.version("torch"))
