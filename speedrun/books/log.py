"""The forward pass as a log of what is allocated, kept for backward and let go. Plain Python without torch.

activations.py writes it for the whole GPT, attention.py and stream.py for what their names say.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from speedrun.books.kernels import Kernels, View, view_of
from speedrun.config import ModelConfig
from strategies.ledger.terms import ComputePrecision


class LiveTensor(NamedTuple):
    """One tensor that is alive."""

    module: str
    part: str
    what: str
    bytes: int


@dataclass(frozen=True)
class PredictedActivations:
    """The counterpart of `strategies.ledger.activations.ActivationBook`, with the same names of parts."""

    lines: tuple[LiveTensor, ...]
    """Kept between forward and backward."""
    peak_lines: tuple[LiveTensor, ...]
    """Alive when most bytes are."""
    in_blocks: int = 0
    """The most bytes alive before the head."""

    @property
    def total(self) -> int:
        """Bytes kept between forward and backward."""
        return sum(line.bytes for line in self.lines)

    @property
    def peak(self) -> int:
        """The most bytes alive at any moment of the forward pass."""
        return sum(line.bytes for line in self.peak_lines)

    def by_part(self, peak: bool = False) -> dict[str, int]:
        """Bytes by part of the model, layers added up, the largest first."""
        sums: dict[str, int] = {}
        for line in self.peak_lines if peak else self.lines:
            sums[line.part] = sums.get(line.part, 0) + line.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def largest(self, count: int = 5, peak: bool = False) -> list[tuple[str, int]]:
        """The parts with most bytes."""
        return list(self.by_part(peak).items())[:count]


@dataclass(eq=False)
class Tensor:
    module: str
    part: str
    what: str
    elements: int
    size: int  # bytes of an element
    kept: bool = False

    @property
    def line(self) -> LiveTensor:
        return LiveTensor(self.module, self.part, self.what, self.elements * self.size)


class Log:
    """The forward pass as a log of allocations and releases.

    `new` allocates, `keep` says that backward needs a tensor, `drop` that the code has let go of it: it is freed
    unless it is kept. Inside a checkpoint `keep` keeps nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        sequence_length: int,
        precision: ComputePrecision,
        documents: bool,
        attention: Literal["fused", "math"],
        future: int,
        kernels: Kernels,
    ) -> None:
        self.config, self.rows, self.time, self.tokens = config, rows, sequence_length, rows * sequence_length
        self.autocast = precision == "autocast"
        self.stream_size = 2 if precision in ("bf16", "fp16") else 4
        self.product_size = 4 if precision == "fp32" else 2
        self.fused = attention == "fused"
        self.documents, self.future, self.kernels = documents, future, kernels
        self.checkpointing = "none"  # where we are now
        self.module = ""
        self.log: list[tuple[bool, Tensor]] = []  # (allocated, else released; which)

    def new(self, part: str, what: str, elements: int, size: int, product: bool = False) -> Tensor:
        """product: what selective checkpointing keeps, the output of a matrix product or of fused attention."""
        tensor = Tensor(self.module, part, what, elements, size)
        tensor.kept = product and self.checkpointing == "selective"
        self.log.append((True, tensor))
        return tensor

    def pass_through(self, part: str, what: str, bytes: int) -> None:
        """What an operator holds inside, and has let go of before it returns."""
        self.drop(self.new(part, what, bytes, 1))

    def keep(self, part: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            if self.checkpointing == "none" and not tensor.kept:
                tensor.kept, tensor.part, tensor.module = True, part, self.module

    def drop(self, *tensors: Tensor) -> None:
        self.log += [(False, tensor) for tensor in tensors if not tensor.kept]

    def replay(self) -> PredictedActivations:
        total = peak = end = in_blocks = 0
        at_head = False
        for i, (allocated, tensor) in enumerate(self.log):
            total += tensor.line.bytes if allocated else -tensor.line.bytes
            at_head = at_head or tensor.module == "head"
            if total > peak:
                peak, end = total, i + 1
                in_blocks = in_blocks if at_head else total
        return PredictedActivations(_alive(self.log), _alive(self.log[:end]), in_blocks)

    def view(self, layer: int) -> View:
        return view_of(self.config, layer, self.time)

    def norm(self, part: str, x: Tensor) -> Tensor:
        """Of the stream. LayerNorm keeps its input and two statistics per token, r·n·h + 2·r·n (+ 2·4·n on a GPU).

        RMSNorm keeps a float32 input (x itself where it is that) and one statistic, 4·n·h + 4·n in every precision.
        """
        if self.config.norm == "rms":
            return self.rms_norm(part, x, self.tokens)
        self.keep(part, x)
        y = self.new(part, "normalised", x.elements, x.size)
        statistics = self.new(part, "mean and deviation", 2 * self.tokens, 4 if self.kernels.cuda else x.size)
        self.keep(part, statistics)
        self.drop(statistics)
        return y

    def rms_norm(self, part: str, x: Tensor, vectors: int) -> Tensor:
        """Keeps 4·elements + 4·vectors: the input in float32 and a reciprocal length per vector.

        On a GPU it is one kernel, which keeps its input as it is.
        """
        if self.kernels.cuda:
            source = x
            if self.autocast and x.size < 4 and self.kernels.widens_rms_norm:
                source = self.new(part, "cast input", x.elements, 4)
            y = self.new(part, "normalised", x.elements, source.size)
            scale = self.new(part, "reciprocal length", vectors, 4)
            self.keep(part, source, scale)
            self.drop(scale, *([] if source is x else [source]))
            return y
        single = x if x.size == 4 else self.new(part, "float32 input", x.elements, 4)
        squares = self.new(part, "squares", x.elements, 4)
        mean = self.new(part, "mean square", vectors, 4)
        scale = self.new(part, "reciprocal length", vectors, 4)
        self.keep(part, single, scale)
        self.drop(mean, squares)
        y = self.new(part, "normalised", x.elements, 4)
        if single is not x:
            wide, y = y, self.new(part, "normalised", x.elements, x.size)
            self.drop(wide, single)
        self.drop(scale)
        return y

    def linear(
        self,
        part: str,
        x: Tensor,
        outputs: int,
        output_part: str | None = None,
        bias: bool | None = None,
        cached: bool = True,
        inputs: int = 0,
    ) -> Tensor:
        """Keeps its input, c·n·inputs, which functions before it may have kept already.

        Under autocast a float32 input is cast first and the copy is kept; so are 2·inputs·outputs of cast weights, by
        autocast's cache, checkpoint or not. A bias, and under autocast its cast, goes into a sum of its own. Not
        `cached`: a fused kernel's cast of its weight, which no cache keeps and a checkpoint makes anew. inputs: of the
        layer, where there may be no token to tell.
        """
        inputs = inputs or x.elements // self.tokens
        if bias is None:
            bias = self.config.bias and self.module != "head"
        casts = []
        if self.autocast:
            casts = [self.new("weight casts", "weight", inputs * outputs, 2)]
            casts[0].kept = cached or self.checkpointing == "none"
        source = x
        if x.size > self.product_size:
            source = self.new(part, "cast input", x.elements, self.product_size)
        self.keep(part, source)
        y = self.new(
            output_part or part,
            "product",
            self.tokens * outputs,
            self.product_size,
            product=outputs >= inputs,
        )
        if source is not x:
            self.drop(source)
        self.drop(*casts)
        if bias:
            cast = [self.new("weight casts", "bias", outputs, 2)] if self.autocast else []
            product, y = y, self.new(output_part or part, "with bias", y.elements, y.size)
            self.drop(product, *cast)
        return y


def _alive(log: list[tuple[bool, Tensor]]) -> tuple[LiveTensor, ...]:
    alive: dict[int, Tensor] = {}
    for allocated, tensor in log:
        if allocated:
            alive[id(tensor)] = tensor
        else:
            del alive[id(tensor)]
    return tuple(tensor.line for tensor in alive.values() if tensor.elements)
