"""The options that say which model, which rows and which GPU: the same for `plan` and `diff`."""

import argparse


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", help="a GPT of about this size in place of the preset's: 350M, 7B, 1T")
    for name, what in (
        ("layers", "number of layers"),
        ("width", "width"),
        ("heads", "number of heads"),
        ("vocab", "vocabulary"),
        ("seq", "row length"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"override the model's {what}")
    parser.add_argument("--gpu", default="h100", help="h100, h200, a100, rtx4090 or a memory in GiB (default: h100)")
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="rows of one forward pass (default: 8); with a preset, the most in any stage (default: its own)",
    )
    parser.add_argument(
        "--accumulation",
        type=int,
        help="micro-batches of a step (default: 1); with a preset, those of every stage (default: what batch and "
        "micro-batch make). Both together set the batch: micro-batch × accumulation × ranks",
    )
    parser.add_argument("--torch", help="torch's version on the GPU, such as 2.11 (default: the one installed here)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), help="override the preset's optimizer")
    parser.add_argument("--checkpointing", choices=("none", "block", "selective"), help="default: the preset's")
