"""Training a few steps under a strategy and without any framework, and finding where the two part.

The reference is one process, torch's own AdamW, Muon in a dozen plain lines, torch's own clipping: it shares the model,
the data and the orthogonalisation with the product and nothing of `strategies`. It is float32, whatever the strategy
computes in.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, StageConfig
from speedrun.data import open_data
from speedrun.model import GPT
from speedrun.optim.policy import kind_of, parameter_groups
from speedrun.optim.rules import Muon
from speedrun.optim.schedule import adamw_updates, forward_options
from speedrun.stages import Stage, resolve_stages, stage_at
from strategies.base import Precision, Strategy
from strategies.errors import UserError

PHASES = ("gradient", "reduce", "clip", "update")
"""In the order of a step: what autograd computed, what the strategy reduced, what it clipped, what it made of it."""

LOSS_TOLERANCE = 1e-5
"""Relative, for every step's loss and gradient norm."""
WEIGHT_TOLERANCE = 3e-5
"""Absolute, for every final weight."""


@dataclass(frozen=True)
class Tolerance:
    """How far a run may be from the reference: relative for losses and gradient norms, absolute for final weights."""

    loss: float
    norm: float
    weight: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(LOSS_TOLERANCE, LOSS_TOLERANCE, WEIGHT_TOLERANCE),
    "bf16": Tolerance(3e-3, 4e-2, 0.15),
    "fp16": Tolerance(2e-4, 1.5e-3, 0.02),
}
"""In 16 bits three times what DDP, FSDP and ZeRO-2 were found to be apart on two ranks in the certificate's cases: bf16
1.0e-3, 1.2e-2 and 0.054; fp16, which has three bits more, 5.8e-5, 3.3e-4 and 0.0072."""


@dataclass(frozen=True)
class Case:
    """What is trained. The sizes do not divide by 2, 3 or 4 where they need not; clipping is active at every step."""

    optimizer: str = "muon"
    accumulation: int = 1
    tied: bool = False
    steps: int = 20
    seed: int = 1
    record: bool = False
    """With the record's attention, NorMuon, cautious decay, AdamW at every other step, and two stages of which the
    second has a larger batch, longer rows and windows."""
    rows: int = 72
    """Of a global batch: divides by 1, 2, 3, 4 and 8 ranks times 3 micro-batches."""

    def config(self) -> Config:
        """A width of 48, 3 heads, 257 tokens; untied with the modern parts, or tied with most of the baseline's.

        AdamW's eps is large on purpose: some gradients are zero but for rounding (a key bias shifts all scores of a
        query alike), and a small eps would blow their rounding errors up to whole steps, in one process already.
        """
        parts: dict[str, Any] = {}
        if self.tied:
            parts = dict(positions="learned", mlp="gelu", qk_norm=False, bias=True, softcap=0.0)
        record: dict[str, Any] = {}
        if self.record:
            parts |= dict(
                heads=4,
                window_short=3,
                window_long=6,
                long_layers=(1,),
                yarn=True,
                paired_head_layers=(0,),
                attention_gate=True,
                partial_key_offset=True,
            )
            record = dict(
                normuon=self.optimizer == "muon",
                muon_weight_decay=0.003,  # an element whose update is nearly zero may decay here and not there
                cautious_weight_decay=True,
                adamw_every=2,
                gate_lr=0.003,
            )
        second = StageConfig(1.0, 2 * self.rows, 24, window_short=5, window_long=15, lr=1.5)
        return Config(
            model=ModelConfig(**(dict(layers=2, heads=3, width=48, mlp_width=101, tied_head=self.tied) | parts)),
            optimizer=OptimizerConfig(
                name=self.optimizer,  # type: ignore[arg-type]
                orthogonalization_dtype="float32",
                weight_decay=0.1,
                embedding_lr=0.003,
                head_lr=0.003,
                vector_lr=0.003,
                table_lr=0.003,
                eps=1e-5,
                clip=0.05,
                **({"muon_weight_decay": 0.01} | record),
            ),
            schedule=ScheduleConfig(name="constant", stages=(StageConfig(0.5), second) if self.record else ()),
            data=DataConfig(sequence_length=16, global_batch=self.rows, eval_tokens=16),
            steps=self.steps,
            seed=self.seed,
        )


def certificate_cases(steps: int) -> list[Case]:
    """What a certificate covers: both optimizers, with and without accumulation, both kinds of head."""
    return [
        Case(optimizer=optimizer, accumulation=accumulation, tied=tied, steps=steps)
        for optimizer in ("adamw", "muon")
        for accumulation in (1, 3)
        for tied in (False, True)
    ]


def micro_batches(case: Case, stage: Stage) -> int:
    """A stage with more rows takes them in as many more micro-batches."""
    return case.accumulation * (stage.global_batch // case.rows)


@dataclass
class Trace:
    """What happened: per step the loss, the gradient norm before clipping and, if asked for, every phase's tensors."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    phases: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)
    """Per step: phase → parameter → the whole tensor (on rank 0)."""


def run_reference(case: Case, phases: bool = False) -> Trace:
    """Train in this process without accelerate, DeepSpeed or anything of `strategies`."""
    config = case.config()
    stages = resolve_stages(config, case.steps)
    data = open_data(config.data, config.model.vocab_size, config.seed, stages)
    model = GPT(config.model, document_start=data.document_start)
    model.init_weights(config.seed)
    named = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    names = {id(p): name for name, p in named.items()}
    options = config.optimizer
    learning_rates = {
        "block matrix": options.adamw_lr,
        "embedding": options.embedding_lr,
        "head": options.head_lr,
        "table": options.table_lr,
        "gate": options.gate_lr,
        "vector": options.vector_lr,
    }
    kinds = {name: kind_of(name, shape) for name, shape in shapes.items()}
    cautious = options.cautious_weight_decay
    muon = [name for name in named if kinds[name] == "block matrix" and options.name == "muon"]
    adamw = torch.optim.AdamW(
        [
            {
                "params": [named[name]],
                "lr": learning_rates[kinds[name]],
                "weight_decay": 0.0 if cautious or kinds[name] in ("gate", "vector") else options.weight_decay,
            }
            for name in named
            if name not in muon
        ],
        betas=options.betas,
        eps=options.eps,
    )
    momenta = {name: torch.zeros_like(named[name]) for name in muon}
    row_squares: dict[str, Tensor] = {}
    sums = {name: torch.zeros_like(p) for name, p in named.items() if name not in muon}
    transform = {"orthogonalization": options.orthogonalization, "orthogonalization_steps": 5}
    trace = Trace()
    for step in range(case.steps):
        stage = stage_at(stages, step)
        model.set_windows(stage.windows)
        accumulation = micro_batches(case, stage)
        rows = stage.global_batch // accumulation
        losses = []
        for i in range(accumulation):
            loss = model(*data.batch(step, i * rows, (i + 1) * rows), **forward_options(config, step, case.steps))
            (loss / accumulation).backward()
            losses.append(loss.item())
        seen = {"gradient": _copies(named)}
        seen["reduce"] = seen["gradient"]
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        seen["clip"] = _copies(named)
        before = {name: p.detach().clone() for name, p in named.items()}
        for name, total in sums.items():
            gradient = named[name].grad
            assert gradient is not None
            total += gradient
            gradient.copy_(total)
        if (step + 1) % options.adamw_every == 0:
            for group in adamw.param_groups:
                group["lr"] = learning_rates[kinds[names[id(group["params"][0])]]] * stage.lr
            adamw.step()
            for name, total in sums.items():
                total.zero_()
                if cautious and kinds[name] not in ("gate", "vector"):
                    old, lr = before[name], learning_rates[kinds[name]] * stage.lr
                    shrinks = adamw.state[named[name]]["exp_avg"] * old >= 0
                    named[name].data -= lr * options.weight_decay * torch.where(shrinks, old, 0)
        for name in muon:
            weight, gradient, momentum = named[name].data, named[name].grad, momenta[name]
            assert gradient is not None
            momentum.mul_(options.muon_momentum).add_(gradient, alpha=1 - options.muon_momentum)
            nesterov = options.muon_momentum * momentum + (1 - options.muon_momentum) * gradient
            update = Muon().transform(nesterov[None], {**transform, "orthogonalization_dtype": "float32"})[0]
            if options.normuon:
                tall = weight.shape[0] >= weight.shape[1]
                orthogonal = update / max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                squares = (orthogonal if tall else orthogonal.T).square().mean(1)
                average = options.normuon_beta2 * row_squares.get(name, 0) + (1 - options.normuon_beta2) * squares
                row_squares[name] = average
                root = average.clamp(min=1e-10).sqrt()
                scaled = update / (root[:, None] if tall else root)
                update = scaled * (update.norm() / scaled.norm().clamp(min=1e-10))
            lr = options.muon_lr * stage.lr
            shrunk = weight * lr * options.muon_weight_decay
            weight.sub_(torch.where(weight * update >= 0, shrunk, 0) if cautious else shrunk).sub_(lr * update)
        model.zero_grad()
        trace.losses.append(sum(losses) / len(losses))
        trace.norms.append(norm.item())
        if phases:
            seen["update"] = {name: p.detach().clone() for name, p in named.items()}
            trace.phases.append(seen)
    trace.weights = {name: p.detach().clone() for name, p in named.items()}
    return trace


def run_strategy(case: Case, strategy: Strategy, rank: int, world_size: int, phases: bool = False) -> Trace:
    """Train under a strategy that is not yet prepared. Collective; every rank returns the same trace."""
    config = case.config()
    stages = resolve_stages(config, case.steps)
    data = open_data(config.data, config.model.vocab_size, config.seed, stages)
    with torch.device("meta"):
        model = GPT(config.model, document_start=data.document_start)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    recipe = parameter_groups(shapes, config.optimizer)
    strategy.prepare(model, recipe, config.optimizer.clip, case.accumulation, model.initial(config.seed))
    optimizer, place = strategy.optimizer, strategy.optimizer.place
    seen: dict[str, dict[str, Tensor]] = {}
    if phases:

        def observe(phase: str, gradients: dict[str, Tensor]) -> None:
            pieces = {piece.name: piece for piece in optimizer.all_slices()}
            seen.setdefault(phase, {}).update(
                {name: optimizer.gather(pieces[name], part) for name, part in gradients.items()}
            )

        optimizer.observe = observe
    trace = Trace()
    for step in range(case.steps):
        stage = stage_at(stages, step)
        accumulation = micro_batches(case, stage)
        if step == stage.first:
            model.set_windows(stage.windows)
            strategy.set_accumulation(accumulation)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * stage.lr
            group["update"] = adamw_updates(config.optimizer, step)
        rows = stage.global_batch // (world_size * accumulation)
        first = rank * rows * accumulation
        total = torch.zeros((), device=place.device)
        for i in range(accumulation):
            batch = data.batch(step, first + i * rows, first + (i + 1) * rows)
            with strategy.micro_batch(last=i == accumulation - 1):
                options = forward_options(config, step, case.steps)
                loss = strategy.model(*(tensor.to(place.device) for tensor in batch), **options)
                strategy.backward(loss)
            total += loss.detach() / accumulation
        trace.norms.append(float(strategy.step()))
        if world_size > 1:
            torch.distributed.all_reduce(total)
        trace.losses.append(total.item() / world_size)
        if phases:
            trace.phases.append({**seen, "update": optimizer.full_weights()})
            seen = {}
    trace.weights = {name: weight.cpu() for name, weight in optimizer.full_weights().items()}
    return trace


@dataclass(frozen=True)
class Verdict:
    """How far a trace is from the reference, and whether that is within the tolerances."""

    loss: float
    norm: float
    weight: float
    weight_name: str
    precision: Precision = "fp32"

    @property
    def equal(self) -> bool:
        allowed = TOLERANCES[self.precision]
        return self.loss <= allowed.loss and self.norm <= allowed.norm and self.weight <= allowed.weight

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "equal": self.equal}


def compare(trace: Trace, reference: Trace, precision: Precision = "fp32") -> Verdict:
    """Largest relative difference of a loss and of a gradient norm, largest absolute one of a final weight.

    precision: that the trace was computed in, whose tolerances count.

    Raises ValueError where the two are not of the same parameters or number of steps.
    """
    shapes, expected = ({name: tuple(w.shape) for name, w in t.weights.items()} for t in (trace, reference))
    if unmatched := sorted(shapes.items() ^ expected.items()):
        name = unmatched[0][0]
        raise UserError(
            f"the run and its reference are of different models: {name} is {shapes.get(name, 'not there')} in the one "
            f"and {expected.get(name, 'not there')} in the other; train both from the same model configuration."
        )
    if len(trace.losses) != len(reference.losses):
        raise UserError(
            f"the run has {len(trace.losses)} steps and its reference {len(reference.losses)}; "
            "train both for the same number."
        )
    differences = {
        name: (trace.weights[name] - weight).abs().max().item() for name, weight in reference.weights.items()
    }
    worst = max(differences, key=lambda name: _or_inf(differences[name]))
    return Verdict(
        loss=_relative(trace.losses, reference.losses),
        norm=_relative(trace.norms, reference.norms),
        weight=_or_inf(differences[worst]),
        weight_name=worst,
        precision=precision,
    )


@dataclass(frozen=True)
class Parting:
    """Where two traces part first, and the parameter that is off most there: by `off` of its largest element."""

    step: int
    phase: str
    name: str
    off: float
    parted: int
    parameters: int

    def __str__(self) -> str:
        return (
            f"step {self.step}, {self.phase}: {self.name} is off by {self.off:.1e} of its largest element "
            f"({self.parted} of {self.parameters} parameters part here)"
        )


def parting(trace: Trace, reference: Trace, tolerance: float = 1e-4) -> Parting | None:
    """Where two traces with phases part first; None where no tensor does.

    A tensor parts when it differs by more than `tolerance` of the reference's largest element (and, for updates, by
    more than the weights' tolerance)."""
    for step, (here, there) in enumerate(zip(trace.phases, reference.phases, strict=True)):
        for phase in PHASES:
            parted = {}
            for name, expected in there[phase].items():
                if phase in here and name in here[phase]:
                    difference = _or_inf((here[phase][name].cpu() - expected).abs().max().item())
                    scale = expected.abs().max().item()
                    floor = WEIGHT_TOLERANCE if phase == "update" else 1e-7
                    if difference > max(tolerance * scale, floor):
                        parted[name] = difference / max(scale, 1e-30)
            if parted:
                name = max(parted, key=lambda name: parted[name])
                return Parting(step, phase, name, parted[name], len(parted), len(there[phase]))
    return None


def first_parting(trace: Trace, reference: Trace, tolerance: float = 1e-4) -> str:
    """`parting` in words."""
    found = parting(trace, reference, tolerance)
    return str(found) if found else "no single tensor parts by more than the tolerance: the difference builds up slowly"


def _copies(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def _relative(values: list[float], references: list[float]) -> float:
    return max(
        _or_inf(abs(value - reference) / abs(reference)) for value, reference in zip(values, references, strict=True)
    )


def _or_inf(value: float) -> float:
    return value if value == value else float("inf")
