"""A micro-batch as the books need it: what its passes hold on a device, predicted. Plain Python without torch.

A strategy's books know what it holds, speedrun/books/activations.py what this GPT does; here they come together for the
kernels that a run resolves to. A run's ledger, `shardrun plan` and `diff` all ask here.
"""

from dataclasses import dataclass, replace
from functools import cache

from speedrun.books.activations import batch_bytes, loss_backward, predict_activations
from speedrun.books.backward import backward_moments
from speedrun.books.kernels import CPU, Kernels, attention_kinds
from speedrun.books.log import PredictedActivations
from speedrun.config import ModelConfig
from strategies import catalogue
from strategies.forecast.predict import predict_after_forward, predict_memory, predict_peak
from strategies.ledger.allocator import block, workspaces
from strategies.ledger.terms import BackwardMoment, ComputePrecision, Held, Scenario


@dataclass(frozen=True)
class ForwardPass:
    """What a micro-batch's activations depend on."""

    model: ModelConfig
    rows: int
    sequence_length: int
    future: int = 0
    """Tokens after the next one in the loss."""
    kernels: Kernels = CPU

    def predict(self, run: Scenario) -> PredictedActivations:
        """With documents, which the trainer's rows always have."""
        return _predict(self, compute_precision(run))

    @property
    def batch(self) -> int:
        """Bytes of tokens and targets."""
        return batch_bytes(self.rows, self.sequence_length)

    def predict_peak(self, run: Scenario) -> list[Held]:
        """For every rank: category → bytes at the peak of the passes."""
        kept = self.predict(run)
        passing = loss_backward(self.model, self.rows, self.sequence_length, self.kernels)
        forward = kept.peak - kept.total + self.batch
        return predict_peak(run, kept.total, passing, forward, kept.in_blocks + self.batch, self.backward(run))

    def backward(self, run: Scenario) -> list[BackwardMoment]:
        """The moments of the backward pass, after the loss."""
        kept, precision = self.predict(run), compute_precision(run)
        whole = kept
        if self.model.checkpointing != "none":
            whole = _predict(replace(self, model=replace(self.model, checkpointing="none")), precision)
        tokens = self.rows * self.sequence_length
        return backward_moments(self.model, tokens, precision, run.shapes, kept, whole, self.batch)

    def moments(self, run: Scenario) -> dict[str, int]:
        """Moment → bytes of all tensors, of the rank that holds most at the peak: after the last forward pass, in the
        backward pass of the first block, before the update and after it.
        """
        peaks = [sum(held.values()) for held in self.predict_peak(run)]
        rank = peaks.index(max(peaks))
        states, between = predict_memory(run)[rank], sum(predict_after_forward(run)[rank].values())
        passes = self.backward(run)
        later = catalogue.books(run.strategy).in_backward(run, passes)
        first = 2 * self.model.layers - 1  # the head, then two moments a block, the last block first
        return {
            "after forward": between + self.predict(run).total,
            "first block": between + sum(later[first].values()) + passes[first].activations + passes[first].passing,
            "before step": sum(states["after backward"].values()),
            "after step": sum(states["after step"].values()),
        }

    def overhead(self, run: Scenario, peak: bool = True) -> Held:
        """What a GPU's allocator has allocated beside all categories, from the first step on.

        cuBLAS's workspaces, and what the blocks of activations (with `peak` of those at the forward pass's peak, else
        of what is kept) are larger than the tensors in them. Model states take more than their bytes too, by up to
        1 MiB a tensor; how much depends on what was allocated before and is left out: 45 MB of gpt2's 1.6 GB after a
        step under single, where AdamW's moments are a tensor per parameter (benchmarks/gpu_books.md).
        """
        if not self.kernels.cuda:
            return {}
        kept = self.predict(run)
        lines = kept.peak_lines if peak else kept.lines
        rounding = sum(block(line.bytes) - line.bytes for line in lines)
        return {"cuBLAS workspaces": workspaces(self.kernels.where.capability), "rounding": rounding}

    def allocated(self, run: Scenario, rank: int = 0) -> dict[str, int]:
        """Moment → bytes that a GPU's allocator has allocated, all predicted categories and the overhead together."""
        states = predict_memory(run)[rank]
        fixed = workspaces(self.kernels.where.capability)
        kept = sum(self.overhead(run, peak=False).values()) + self.predict(run).total + self.batch
        return {
            "after forward": sum(predict_after_forward(run)[rank].values()) + kept,
            "after backward": sum(states["after backward"].values()) + fixed,
            "after step": sum(states["after step"].values()) + fixed,
            "peak": sum(self.predict_peak(run)[rank].values()) + sum(self.overhead(run).values()),
        }

    def predicted_for(self, run: Scenario) -> dict[str, str]:
        """For people: the device, the kernels and the precision that the predictions are of."""
        kinds = attention_kinds(self.model, self.sequence_length, self.kernels)
        return {**self.kernels.as_dict(kinds), "precision": compute_precision(run)}


@cache
def _predict(forward: ForwardPass, precision: ComputePrecision) -> PredictedActivations:
    """The same for every number of ranks."""
    return predict_activations(
        forward.model,
        forward.rows,
        forward.sequence_length,
        precision,
        documents=True,
        future=forward.future,
        kernels=forward.kernels,
    )


def compute_precision(run: Scenario) -> ComputePrecision:
    """How a strategy computes in a run's precision."""
    if run.precision == "fp32":
        return "fp32"
    computes = catalogue.books(run.strategy).computes_bf16
    return "fp16" if (computes, run.precision) == ("bf16", "fp16") else computes
