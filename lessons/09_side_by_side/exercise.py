"""Lesson 9, All strategies side by side. Write the five functions; `shardrun lesson check 9` says what is right."""


def states_gb(parameters: int, ranks: int) -> dict[str, float]:
    """GB (10⁹ bytes) of model states on a rank just before a step, in bf16 with AdamW.

    Returns a dictionary: "ddp", "fsdp", "zero1", "zero2", "zero3".

    As the libraries really are, without accumulation. torch (ddp, fsdp): parameters, gradients and moments all in
    float32, no master weights. DeepSpeed (zero1, zero2, zero3): parameters and gradients in bf16, master weights and
    moments in float32; just before a step a rank has kept the reduced gradients of its own slice alone, in stage 1 too.
    """
    raise NotImplementedError


def largest_model(room: float, ranks: int) -> dict[str, float]:
    """The most parameters whose model states (as above) fit into `room` bytes on each rank: "ddp", "zero2", "fsdp"."""
    raise NotImplementedError


def wire_bytes(parameters: int, ranks: int, accumulation: int) -> dict[str, float]:
    """Bytes that a rank puts on the wire of a ring in one step of `accumulation` micro-batches, in bf16.

    ddp    gradients all-reduced in float32, once a step
    fsdp   parameters gathered in bf16 for forward and for backward of every micro-batch; gradients reduce-scattered in
           float32, once a step
    zero1  gradients all-reduced in bf16 once a step (DeepSpeed's default); parameters gathered in bf16 once a step
    zero2  the same, but gradients are all-reduced at every micro-batch
    zero3  parameters gathered in bf16 for forward and for backward of every micro-batch; gradients reduce-scattered in
           bf16 at every micro-batch
    """
    raise NotImplementedError


def choose(memory: dict[str, float], sent: dict[str, float], room: float) -> str | None:
    """The strategy that fits and sends least; of several that send the same, the one that holds least.

    memory, sent: strategy → bytes; room: bytes of the GPU (all of them may be used). None where nothing fits.
    """
    raise NotImplementedError


def worst_difference(losses: dict[str, list[float]]) -> tuple[str, int, float]:
    """Where loss curves that should agree are furthest apart: (strategy, step, relative difference).

    losses: strategy → loss of every step, all equally many; the first entry is the reference of all others, and its
    losses are positive numbers. Steps count from 1. A loss that is no number (nan) is further away than any other: its
    difference is math.inf. Of several that are equally far apart the first: in the order of losses, then of steps.
    """
    raise NotImplementedError
