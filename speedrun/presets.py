"""The presets: what a run is by default, by name. Every field can be set on the command line beside it."""

from dataclasses import replace

from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, StageConfig

SPEEDRUN = Config(
    model=ModelConfig(
        vocab_size=50257,
        pad_vocab_to=128,
        layers=11,
        heads=6,
        width=768,
        max_sequence_length=2048,
        tied_head=True,
        untie_at=2 / 3,
        softcap=23.0,
        softcap_form="sigmoid",
        bigram_rows=65_536,
        smear=True,
        value_embeddings=(1, 9, 10),
        embedding_skip=True,
        block_skip=(3, 6),
        backout=7,
        window_short=768,
        window_long=1664,
        long_layers=(3, 6, 10),
        yarn=True,
        attention_scale=0.1,
        paired_head_layers=(0, 2, 5, 9),
        attention_gate=True,
        partial_key_offset=True,
    ),
    optimizer=OptimizerConfig(
        muon_lr=0.02,
        muon_momentum_cooldown=50,
        normuon=True,
        muon_weight_decay=0.01,
        weight_decay=0.01,
        cautious_weight_decay=True,
        adamw_every=2,
        sharded_adam=True,
        eps=1e-10,
        clip=0.0,
    ),
    schedule=ScheduleConfig(
        final=0.15,
        future_weights=(0.5, 0.25),
        stages=(
            StageConfig(
                0.25, global_batch=128, sequence_length=1024, micro_batch=32, window_short=128, window_long=384
            ),
            StageConfig(
                0.5,
                global_batch=256,
                sequence_length=1024,
                micro_batch=32,
                window_short=384,
                window_long=896,
                lr=1.52,
            ),
            StageConfig(0.75, window_short=640, window_long=1408, lr=1.73),
            StageConfig(1.0, lr=1.73),
        ),
    ),
    data=DataConfig(
        source="data/fineweb10B",
        sequence_length=2048,
        global_batch=192,
        micro_batch=16,
        eval_sequence_length=2048,
        eval_tokens=10_485_760,
    ),
    steps=3_000,
    eval_every=125,
)
"""Every idea of the records that is a field here. Constants are the public records' where those publish one for the
same thing; sizes of tables, the layers chosen and the number of steps (885M tokens, fewer than nine shards hold) are
guesses that no run on GPUs has tested yet. The last stage is the one that `data` and `model` describe."""

PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "about 1M parameters, byte tokens: minutes on two CPU cores",
        Config(
            # Bytes say little alone, and a table costs memory but next to no arithmetic: tables of two to four bytes in
            # place of two more blocks make a step a third cheaper and a token worth more.
            model=ModelConfig(
                layers=2,
                heads=2,
                positions="rope",
                bigram_rows=4000,
                trigram_rows=4000,
                fourgram_rows=4000,
                ngram_width=32,
                smear=True,
            ),
            # Rates found by short runs on the laptop track (benchmarks/laptop_track.py). An embedding row is seen by
            # few tokens of a step, and RMSNorm follows it, so it bears, and needs, a far larger rate than anything
            # else.
            optimizer=OptimizerConfig(muon_lr=0.03, embedding_lr=0.1),
            data=DataConfig(sequence_length=128, global_batch=24),
            steps=480,
            eval_every=80,
        ),
    ),
    "gpt2": (
        "124M parameters, the llm.c baseline: learned positions, GELU, LayerNorm, AdamW",
        Config(
            model=ModelConfig(
                vocab_size=50257,
                pad_vocab_to=128,
                layers=12,
                heads=12,
                width=768,
                positions="learned",
                mlp="gelu",
                norm="layer",
                qk_norm=False,
                bias=True,
                tied_head=True,
                softcap=0.0,
                zero_init_projections=False,
            ),
            optimizer=OptimizerConfig(
                name="adamw",
                adamw_lr=0.0015,
                embedding_lr=0.0015,
                head_lr=0.0015,
                vector_lr=0.0015,
                betas=(0.9, 0.95),
                weight_decay=0.1,
                clip=1.0,
            ),
            schedule=ScheduleConfig(name="cosine", warmup=256, final=0.0),
            data=DataConfig(
                source="data/fineweb10B",
                sequence_length=1024,
                global_batch=256,
                micro_batch=32,
                eval_tokens=10_485_760,
            ),
            steps=19_560,
            eval_every=250,
        ),
    ),
    "modern": (
        "124M parameters: half-truncated RoPE, QK-norm, ReLU², softcap, Muon; no further idea of the records",
        Config(
            model=ModelConfig(
                vocab_size=50257,
                pad_vocab_to=128,
                layers=12,
                heads=6,
                width=768,
                tied_head=True,
            ),
            optimizer=OptimizerConfig(muon_lr=0.02, embedding_lr=0.0036, vector_lr=0.0036, eps=1e-10, clip=0.0),
            data=DataConfig(
                source="data/fineweb10B",
                sequence_length=1024,
                global_batch=512,
                micro_batch=32,
                eval_tokens=10_485_760,
            ),
            steps=5_800,
            eval_every=125,
        ),
    ),
    "speedrun": ("the record's ideas all together, for 8 × H100 or, by accumulation, one GPU of 80 GB", SPEEDRUN),
    "speedrun_24gb": (
        "the same mathematics in micro-batches, and with recomputation, that fit a card of 24 GB",
        replace(
            SPEEDRUN,
            model=replace(SPEEDRUN.model, checkpointing="selective"),
            data=replace(SPEEDRUN.data, micro_batch=4),
            schedule=replace(
                SPEEDRUN.schedule,
                stages=tuple(replace(s, micro_batch=s.micro_batch and 8) for s in SPEEDRUN.schedule.stages),
            ),
        ),
    ),
}
