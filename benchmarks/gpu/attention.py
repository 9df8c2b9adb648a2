"""Every attention function that runs here, on the rows, heads and windows of `speedrun`'s stages, as on one of eight
GPUs. Documents of about 500 tokens, bf16 on a card, attention alone: q, k and v are there.

Beside them torch's causal attention without any mask, which computes something else.
"""

import dataclasses
from collections.abc import Callable
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from benchmarks.gpu.card import seconds
from benchmarks.gpu.results import Result, asked
from benchmarks.gpu.sizes import config_of
from benchmarks.gpu.steps import SHARE
from benchmarks.train_step_loop import alone
from speedrun.config import ModelConfig
from speedrun.model import GPT
from speedrun.model.attend import attend
from speedrun.model.masks import Mask, View, dense_mask, document_numbers
from speedrun.stages import resolve_stages

KINDS = tuple(kind for kind in get_args(get_type_hints(ModelConfig)["attention"]) if kind != "auto")
"""All that model.attention can ask for."""

TOLERANCE = 0.02
"""Relative, against float32: bf16 rounds to 0.004."""

START = 1
"""The token that opens a document."""


def main() -> None:
    arguments = asked()
    config = config_of("speedrun", arguments.tiny)
    device = torch.device("cpu" if arguments.tiny else "cuda")
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    bench = Bench(arguments.result, config.model, device, dtype, repeats=1 if arguments.tiny else 20)
    kinds = [kind for kind in KINDS if bench.runs(kind)]
    failed: list[str] = []
    for index, stage in enumerate(resolve_stages(config, config.steps)):
        rows = alone(config, stage, SHARE).stage.global_batch
        short, long = stage.windows[-1]
        for view in (View(short), View(short, paired=True), View(long)):
            failed += bench.time(index, rows, stage.sequence_length, view, kinds)
    if failed:
        raise SystemExit(f"failed: {', '.join(dict.fromkeys(failed))}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and of what attention is timed."""

    result: Result
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    repeats: int

    def runs(self, kind: str) -> bool:
        """Whether this function can run here; where it cannot, the result says why."""
        try:
            self.masks(kind, View(), torch.full((1, 128), START, device=self.device))()
        except ValueError as error:
            self.result.note(f"Left out: {kind}. {error}")
            return False
        return True

    def masks(self, kind: str, view: View, tokens: Tensor) -> Callable[[], Mask | None]:
        """Makes the mask as a model of one such layer makes it for itself; that raises ValueError where the function
        cannot run here."""
        paired = (0,) if view.paired else ()
        layer = ModelConfig(
            layers=1, heads=2, width=8, window_short=view.window, paired_head_layers=paired, attention=kind
        )
        model = GPT(layer, document_start=START)
        return lambda: model._masks(tokens, self.dtype)[0]

    def time(self, stage: int, rows: int, time: int, view: View, kinds: list[str]) -> list[str]:
        """A line for each function. Returns those that failed."""
        failed = []
        generator = torch.Generator().manual_seed(stage)
        tokens = (torch.rand(rows, time, generator=generator) > 1 / 500).long() + START
        tokens = tokens.to(self.device)
        heads, positions = (self.model.heads // 2, 2 * time) if view.paired else (self.model.heads, time)
        shape = (rows, positions, heads, self.model.width // self.model.heads)
        q, k, v = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(3))
        exact = self.reference(tokens[:1], view, q[:1], k[:1], v[:1])
        about = {
            "stage": stage,
            "rows × positions × heads": f"{rows} × {positions} × {heads}",
            "window": 2 * view.window if view.paired else view.window,
            "paired": "yes" if view.paired else "",
        }
        for kind in kinds:
            try:
                make = self.masks(kind, view, tokens)
                mask = make()
                y = attend(q, k, v, mask, None)
                error = ((y[:1].float() - exact).norm() / exact.norm()).item()
                masked = 1e3 * seconds(make, self.device, self.repeats)
                forward, both = self.clock(lambda mask=mask: attend(q, k, v, mask, None), q, k, v)
            except Exception as failure:  # whatever it is, of Triton or of torch: the next function can be timed
                failed.append(kind)
                said = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:200]}"
                self.result.note(f"Stage {stage}, {view}: {kind} failed: {said}")
                continue
            self.row(about, kind, masked, forward, both, error)
            if not error <= TOLERANCE:
                failed.append(kind)
        forward, both = self.clock(lambda: attend(q, k, v, None, None), q, k, v)
        self.row(about, "causal, no mask", None, forward, both, None)
        return failed

    def row(
        self,
        about: dict[str, str | int],
        kind: str,
        mask: float | None,
        forward: float,
        both: float,
        error: float | None,
    ) -> None:
        times = {"mask (ms)": mask, "forward (ms)": forward, "forward and backward (ms)": both}
        self.result.row("Attention", **about, function=kind, **times, **{"relative error": error})

    def reference(self, tokens: Tensor, view: View, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In float32, with a dense mask."""
        documents, window = document_numbers(tokens, START), view.window
        if view.paired:
            documents, window = documents.repeat_interleave(2, dim=1), 2 * window
        mask = Mask(dense=dense_mask(documents, q.shape[1], window, q.device))
        return attend(q.float(), k.float(), v.float(), mask, None)

    def clock(self, run: Callable[[], Tensor], *inputs: Tensor) -> tuple[float, float]:
        """Milliseconds of the forward pass, and of both passes."""
        with torch.no_grad():
            forward = seconds(run, self.device, self.repeats)
        for tensor in inputs:
            tensor.requires_grad_()
        upstream = torch.ones_like(inputs[0])
        both = seconds(lambda: torch.autograd.grad(run(), inputs, upstream), self.device, self.repeats)
        for tensor in inputs:
            tensor.requires_grad_(False)
        return 1e3 * forward, 1e3 * both


if __name__ == "__main__":
    main()
