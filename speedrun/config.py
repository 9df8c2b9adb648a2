"""Everything a run is made of, as frozen dataclasses, and the presets.

Nothing here says how the run is spread over ranks or in which precision it computes: that is the accelerate config
file's part. A preset is a whole `Config`; the command line replaces single fields of it.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from speedrun.ranges import Range, Text

Attention = Literal["auto", "sdpa", "flex", "varlen", "flash"]
Kernels = Literal["auto", "triton", "torch"]
Rate = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]
"""What a running mean keeps of itself at every step; with 1 it would never learn of anything."""
Block = Annotated[int, Range(0, 999)]
"""A block of the model, by number."""
Length = Annotated[int, Range(0, 10**7)]
"""Tokens of a row, or of a window in it."""
Steps = Annotated[int, Range(0, 10**9)]
Rows = Annotated[int, Range(0, 10**6)]
"""Of a batch."""
Hashed = Annotated[int, Range(2, 10**9, zero="none")]
"""Rows of a hash table; the first one is for what has no n-gram."""
GATE_CHANNELS = 12
"""Channels of the stream that a gate reads: enough to tell kinds of tokens apart, and nearly free."""


SIGMOID_MIDDLE, SIGMOID_SCALE = -5.0, 7.5
"""Constants of the sigmoid softcap (`ModelConfig.softcap_form`)."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the GPT and which of its parts are on."""

    vocab_size: Annotated[int, Range(1, 10**7)] = 257
    """Distinct tokens of the data (bytes and a document start: 257; GPT-2: 50257). On the command line 0, or nothing,
    is what the shards' tokens.json says. Allowed: from 1 to 10,000,000."""
    pad_vocab_to: Annotated[int, Range(1, 10**6)] = 1
    """The embedding and the head get a multiple of this many rows; the added logits are masked out. Allowed: from 1 to
    1,000,000."""
    layers: Annotated[int, Range(1, 1000)] = 4
    """Transformer blocks. Allowed: from 1 to 1,000."""
    heads: Annotated[int, Range(1, 10_000)] = 4
    """Attention heads; must divide `width`. Allowed: from 1 to 10,000."""
    width: Annotated[int, Range(1, 10**6)] = 128
    """Channels of the residual stream. Allowed: from 1 to 1,000,000."""
    mlp_width: Annotated[int, Range(0, 10**7)] = 0
    """Hidden channels of the MLP; 0 means 4 × width. Allowed: from 0 to 10,000,000."""
    max_sequence_length: Annotated[int, Range(1, 10**7)] = 1024
    """Longest row that the model accepts; the number of rows of a learned position table. Allowed: from 1 to
    10,000,000."""
    positions: Literal["rope", "half_rope", "learned"] = "half_rope"
    """Rotary positions on all head channels, on half of them (the others carry no position), or a learned table."""
    rope_base: Annotated[float, Range(1, 10**12)] = 1024.0
    """RoPE's slowest frequency is 1 / rope_base radians per token. Allowed: from 1 to 1,000,000,000,000."""
    mlp: Literal["relu2", "gelu"] = "relu2"
    """The MLP's nonlinearity: squared ReLU or GELU."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm without weights, or LayerNorm with weight and bias."""
    qk_norm: bool = True
    """Normalise queries and keys per head (RMSNorm) before positions are applied."""
    bias: bool = False
    """Biases in the linear layers."""
    tied_head: bool = False
    """The output head is the token embedding itself."""
    untie_at: Share = 0.0
    """Share of the run after which a tied head goes its own way, with a copy of the optimizer's state; 0 for never.
    Costs a second table from the start; while tied, the gradient norm that clipping goes by counts it twice. Allowed:
    from 0 to 1."""
    softcap: Annotated[float, Range(0.001, 10**6, zero="off")] = 15.0
    """Logits become softcap · tanh(logits / softcap); 0 leaves them alone. Allowed: 0 (off), or from 0.001 to
    1,000,000."""
    softcap_form: Literal["tanh", "sigmoid"] = "tanh"
    """sigmoid: softcap · σ((logits + 5) / 7.5), asymmetric (with a softcap of 23 in the records)."""
    zero_init_projections: bool = True
    """Output projections of attention and MLP start at zero, so that every block starts as the identity."""
    bigram_rows: Hashed = 0
    """Rows of a hash table of bigram embeddings, which are added to the token's embedding; 0 for none. Allowed: 0
    (none), or from 2 to 1,000,000,000."""
    trigram_rows: Hashed = 0
    """The same for trigrams. They pay where a token is a byte and says little alone. Allowed: 0 (none), or from 2 to
    1,000,000,000."""
    fourgram_rows: Hashed = 0
    """The same for four tokens. Allowed: 0 (none), or from 2 to 1,000,000,000."""
    ngram_width: Annotated[int, Range(0, 10**6)] = 0
    """Width of these tables, with a projection up to `width` behind; 0 means `width`, without projection. Allowed: from
    0 to 1,000,000."""
    smear: bool = False
    """Every position's embedding takes in a gated share of the one before it."""
    value_embeddings: tuple[Block, ...] = ()
    """Blocks (0 is the first) whose attention adds a gated embedding of each token to its values. Allowed, each: from 0
    to 999."""
    embedding_skip: bool = False
    """Every block reads λ·stream + μ·embedding, with λ and μ learned per block."""
    unet_skips: bool = False
    """The second half of the blocks reads, each with a learned strength, the outputs of the first half in reverse."""
    block_skip: tuple[Block, Block] | None = None
    """(from, to): the output of one block, gated, is added to what a later one reads. Allowed, each: from 0 to 999."""
    backout: Block = 0
    """Before the head, a learned share of the stream after this number of blocks is taken away; 0 for none. Allowed:
    from 0 to 999."""
    window_short: Length = 0
    """Sliding-window attention: a query sees keys at most this many tokens back; 0: the whole row. Allowed: from 0 to
    10,000,000."""
    window_long: Length = 0
    """The same for the layers in `long_layers`. A stage of the schedule may change both windows. Allowed: from 0 to
    10,000,000."""
    long_layers: tuple[Block, ...] = ()
    """Layers with the long window; with 0 for both windows they differ from others in `partial_key_offset` alone.
    Allowed, each: from 0 to 999."""
    yarn: bool = False
    """When a stage changes the long window, stretch RoPE's slow frequencies by as much and sharpen attention (YaRN)."""
    attention_scale: Annotated[float, Range(0, 1000)] = 0.0
    """Factor on attention scores before the softmax; 0 means 1 / √(head dimension). Allowed: from 0 to 1,000."""
    paired_head_layers: tuple[Block, ...] = ()
    """Layers in which two adjacent heads attend as one, over a sequence in which every token stands twice. Allowed,
    each: from 0 to 999."""
    attention_gate: bool = False
    """Multiply every head's output by a sigmoid of the first 12 channels of the layer's input."""
    partial_key_offset: bool = False
    """In `long_layers`, take the half of a key that carries no position from the token before (positions half_rope)."""
    attention: Attention = "auto"
    """The attention function: torch's own with a boolean mask, FlexAttention, torch's variable-length attention,
    FlashAttention-3, or by measured times, for each window and length of rows (speedrun/attention_choice.py; a run says
    which and why). All compute the same; on a CPU there is sdpa only."""
    checkpointing: Literal["none", "block", "selective"] = "none"
    """What backward computes again in place of keeping it (the numbers stay the same): nothing; every block, from its
    input; or only what is cheap between its matrix products, whose outputs are kept."""
    kernels: Kernels = "auto"
    """Who computes the MLP's first layer, the loss and Muon's products: plain torch; Triton's fused kernels, each where
    it was measured to pay (speedrun/kernels/measured.py); or Triton where there is a CUDA GPU and the run computes in
    bf16, else torch (a run says which and why)."""
    fp8: bool = False
    """Matrix products of the head and the MLP in 8-bit floating point while training; validation never is. On a GPU of
    compute capability 8.9 or more by torch._scaled_mm, which has not been seen there yet; on a CPU imitated."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Which rule updates which parameter, and how fast. Learning rates are peaks; the schedule multiplies them."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices inside the blocks, AdamW for all else. adamw: AdamW for everything."""
    muon_lr: Rate = 0.02
    """Muon's learning rate (a spectral step: the update has singular values near one). Allowed: 0 or above."""
    muon_momentum: Decay = 0.95
    """Muon's momentum after its warm-up. Allowed: from 0 to below 1."""
    muon_momentum_start: Decay = 0.85
    """Muon's momentum at step 0. Allowed: from 0 to below 1."""
    muon_momentum_warmup: Steps = 300
    """Steps over which the momentum goes from start to full; a shorter run ends on the way. Allowed: from 0 to
    1,000,000,000."""
    muon_momentum_cooldown: Steps = 0
    """Steps at the end of the run over which it goes back. Allowed: from 0 to 1,000,000,000."""
    muon_weight_decay: Rate = 0.0
    """Decoupled: every step multiplies the matrix by 1 − lr · weight_decay. Allowed: 0 or above."""
    normuon: bool = False
    """NorMuon: after orthogonalisation every row (every column of a wide matrix) is divided by a running root mean
    square of its own updates, and the whole brought back to its norm."""
    normuon_beta2: Decay = 0.9
    """Decay rate of NorMuon's running mean of squares. Allowed: from 0 to below 1."""
    orthogonalization: Literal["newton_schulz", "polar_express"] = "polar_express"
    """Newton–Schulz with one fixed quintic, or Polar Express with a quintic per iteration."""
    orthogonalization_steps: Annotated[int, Range(1, 100)] = 5
    """Iterations of it. Allowed: from 1 to 100."""
    orthogonalization_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of its matrix products; auto: bfloat16 where rank 0's device computes in it, float32 elsewhere (a run
    says which and why, and keeps it when it is resumed). bfloat16 moves an update by 2 to 5 %: compare runs in one."""
    embedding_lr: Rate = 0.008
    """AdamW's learning rate for token and position embeddings (and for a tied head). Allowed: 0 or above."""
    head_lr: Rate = 0.008
    """AdamW's learning rate for an untied head. Allowed: 0 or above."""
    vector_lr: Rate = 0.008
    """AdamW's learning rate for vectors and scalars (norm weights, biases, strengths of skips). Allowed: 0 or above."""
    table_lr: Rate = 0.008
    """AdamW's learning rate for n-gram and value embeddings. Allowed: 0 or above."""
    adamw_lr: Rate = 0.003
    """AdamW's learning rate for block matrices where `name` is adamw. Allowed: 0 or above."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the two moments. Allowed, each: from 0 to below 1."""
    eps: Annotated[float, Range(1e-30, 1)] = 1e-8
    """AdamW's denominator offset. Allowed: from 1e-30 to 1."""
    weight_decay: Rate = 0.0
    """AdamW's decoupled weight decay, on tensors of two or more dimensions; times a rate at most 1, as Muon's. Allowed:
    0 or above."""
    cautious_weight_decay: bool = False
    """Both weight decays act only where the update too leads towards zero: update and weight have the same sign."""
    adamw_every: Annotated[int, Range(1, 10**9)] = 1
    """Steps between two updates of AdamW, with the sum of the gradients since its last update; Muon at every step. The
    sum takes 4 more bytes of state per element of an AdamW parameter. Allowed: from 1 to 1,000,000,000."""
    sharded_adam: bool = False
    """Under ddp every rank updates an equal part of each large AdamW parameter and has its moments for that part only:
    a reduce-scatter and an all-gather in place of the all-reduce. The other strategies do so anyway, or are alone."""
    gate_lr: Rate = 0.008
    """AdamW's learning rate for the small matrices of gates. Allowed: 0 or above."""
    clip: Annotated[float, Range(0, zero="off")] = 1.0
    """Gradients are scaled down to this global L2 norm where they exceed it; 0 switches clipping off. Allowed: 0 (off)
    or above."""


@dataclass(frozen=True)
class StageConfig:
    """A line of the stage table: what holds for a part of the run. 0 leaves a field to its own section."""

    until: Annotated[float, Range(above=0, most=1)] = 1.0
    """The share of the run's steps at which the stage ends; the last one's is 1. Allowed: above 0 and up to 1."""
    global_batch: Rows = 0
    """Rows of an optimizer step (else data.global_batch). Allowed: from 0 to 1,000,000."""
    sequence_length: Length = 0
    """Tokens of a row (else data.sequence_length). Allowed: from 0 to 10,000,000."""
    micro_batch: Rows = 0
    """Rows of one forward pass on one rank at most (else data.micro_batch). Allowed: from 0 to 1,000,000."""
    window_short: Length = 0
    """Tokens that most layers look back (else model.window_short). Allowed: from 0 to 10,000,000."""
    window_long: Length = 0
    """Tokens that model.long_layers look back (else model.window_long). Allowed: from 0 to 10,000,000."""
    lr: Rate = 1.0
    """Factor on all learning rates, beside the schedule's. Allowed: 0 or above."""
    momentum: Decay | None = None
    """Muon's full momentum (else optimizer.muon_momentum). Allowed: from 0 to below 1."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning-rate multiplier over the run, and what changes with its stages."""

    name: Literal["trapezoid", "cosine", "cosine_warmdown", "linear", "constant"] = "trapezoid"
    """trapezoid: warm-up, constant, linear decay at the end (also called warm-up–stable–decay); cosine_warmdown: a
    cosine down to a tenth, linear decay at the end."""
    warmup: Steps = 0
    """Steps of linear warm-up from zero, no more than the run has. Allowed: from 0 to 1,000,000,000."""
    decay: Share = 0.6
    """trapezoid, cosine_warmdown: the share of the run, counted from its end, over which the rate decays in a line,
    after the warm-up at the earliest. Allowed: from 0 to 1."""
    final: Share = 0.0
    """The multiplier that the decay ends at (reached as the last step is done). Allowed: from 0 to 1."""
    future_weights: tuple[Annotated[float, Range(0, 100)], ...] = ()
    """Weights in the training loss of the tokens after the next one (.5 .25: two of them). They fade to zero one after
    the other, the farthest first, in equal parts of the run, of which the last has the plain loss. Allowed, each: from
    0 to 100."""
    stages: tuple[StageConfig, ...] = ()
    """Batch size, sequence length, windows, rate and momentum by parts of the run, in order; none: nothing changes."""


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they become batches."""

    source: Annotated[str, Text()] = "pydocs"
    """`pydocs` (the documentation inside Python, as bytes), a folder of text files, or a folder of .bin shards."""
    encoding: Annotated[str, Text(empty=True)] = ""
    """What text files are in (cp1252, latin-1, shift_jis) that have no byte order mark and are not UTF-8."""
    text_field: Annotated[str, Text()] = "text"
    """The field of .jsonl lines and the column of .parquet rows that holds the text."""
    sequence_length: Annotated[int, Range(1, 10**7)] = 256
    """Tokens of a row. Allowed: from 1 to 10,000,000."""
    global_batch: Annotated[int, Range(1, 10**6)] = 48
    """Rows of an optimizer step, over all ranks and all accumulation. Allowed: from 1 to 1,000,000."""
    micro_batch: Rows = 0
    """Rows of one forward pass on one rank at most: it takes the largest number up to this one that divides the rank's
    share. 0 means the whole share, without accumulation. Allowed: from 0 to 1,000,000."""
    eval_sequence_length: Length = 0
    """Tokens of a validation row; 0 means sequence_length. Allowed: from 0 to 10,000,000."""
    eval_tokens: Annotated[int, Range(1, 10**12)] = 65_536
    """Targets of a validation, the same ones every time (rounded down to whole rows). Allowed: from 1 to
    1,000,000,000,000."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, into `checkpoints/` of its folder, and what is kept."""

    every: Steps = 0
    """Steps between two saves; it also saves at the end, on Ctrl-C, SIGTERM and its like; 0: never. Allowed: from 0 to
    1,000,000,000."""
    keep: Annotated[int, Range(1, 10**9)] = 2
    """How many of the newest checkpoints stay. Allowed: from 1 to 1,000,000,000."""
    keep_best: bool = False
    """Also keep the one with the lowest validation loss (`every` must be a multiple of `eval_every`)."""
    on_failure: Literal["warn", "stop"] = "warn"
    """If a checkpoint cannot be written (a full disk): say so and train on, or end the run. The one before stays."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: Annotated[str, Text()] = "none"
    """none; a checkpoint's folder, or a run's (its newest); or auto: the newest of this run (it needs a `name`), the
    beginning where there is none. Strategy and number of ranks may be others than those that saved."""
    steps: Annotated[int, Range(1, 10**9)] = 200
    """Optimizer steps, unless the token budget or the target ends the run earlier. Allowed: from 1 to 1,000,000,000."""
    tokens: Annotated[int, Range(1, 10**15)] | None = None
    """Token budget: the run ends at the last step that stays within it. Allowed: from 1 to 1,000,000,000,000,000."""
    target_val_loss: Annotated[float, Range(0)] | None = None
    """The run ends at the first validation at or below this loss (nats per token). Allowed: 0 or above."""
    eval_every: Steps = 50
    """Steps between two validations; the last step always has one; 0: only the last. Allowed: from 0 to
    1,000,000,000."""
    books_every: Steps = 0
    """Steps after which the books are kept again, for whoever watches the run; such a step takes longer. 0: once.
    Allowed: from 0 to 1,000,000,000."""
    compile: bool = False
    """torch.compile every block, under any strategy but ZeRO-3. Needs a C++ compiler on a CPU."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or the gradient's norm is NaN or infinite, or the loss spikes: end the run, or leave the step out on
    all ranks, with weights and optimizer state as they were. Either way the first such tensor is named. Where that is a
    weight or optimizer state, and after 20 steps in a row that are left out, the run ends in any case."""
    spike: Annotated[float, Range(above=1, zero="off")] = 0.0
    """A loss above this factor times the median of the last 32 losses is a spike; 0 switches the check off. Each step
    then waits for the loss. Allowed: 0 (off), or above 1."""
    collective_timeout: Annotated[float, Range(1, 10**6)] = 600.0
    """Seconds that ranks wait in a collective for one that hangs; then all end. More than the longest compilation.
    Allowed: from 1 to 1,000,000."""
    untimed_steps: Annotated[int, Range(0, 1000)] = 2
    """Warm-up steps on each stage's first batch before the clock starts; weights and optimizer state are restored.
    Allowed: from 0 to 1,000."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1
    """Seed of the initial weights and of the data order. Allowed: from 0 to 4,294,967,295."""
    name: Annotated[str, Text(empty=True, name=True)] = ""
    """The run's folder under `out`; empty: preset, strategy, world size and time. Allowed: empty, or one name of at
    most 200 bytes: no slash, no `..`, no space around it."""
    out: Annotated[str, Text()] = "runs"
    """Where runs are written."""
    log: Literal["none", "wandb"] = "none"
    """Also log to Weights & Biases (offline where there is no key)."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """Live display on a terminal, plain lines elsewhere, or nothing."""
