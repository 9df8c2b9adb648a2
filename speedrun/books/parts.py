"""Which part of the GPT a tensor belongs to. Plain Python without torch."""

FEATURES = {
    "grams.": "n-grams",
    "smear.": "smear",
    "value_embedding.": "value embedding",
    "skip.": "skips",
    "backout.": "skips",
}
"""Module (or the one it is in) → part."""
FUNCTIONS = ("scaled_dot_product_attention", "flex", "varlen_attn", "reshape")
"""Attention functions, and what lays their output out anew."""


def part_of(module: str, operator: str, kernel: str) -> str:
    """The part of this GPT to which a tensor of the measured account belongs, by the names used above.

    module: path of the module that keeps (or made) it; operator: torch's function that does; kernel: what made it.
    """
    for path, part in FEATURES.items():
        if path in f"{module}.":
            return part
    name = module.rpartition(".")[2]
    if kernel in ("eq", "cumsum", "ones", "tril", "triu", "bitwise_and", "scalar_tensor", "repeat_interleave"):
        return "masks"
    if kernel == "where" and operator == "scaled_dot_product_attention":
        return "masks"
    if name in ("q", "k", "v"):
        return "qkv"
    if name == "attention":
        if operator == "rms_norm":
            return "qk norm"
        if kernel == "sigmoid":
            return "gate"
        result = kernel in ("clone", "bmm") or (operator, kernel) == ("mul", "_to_copy")  # that a gate multiplies
        fused = result or kernel.startswith("_scaled_dot_product")
        return "attention" if fused or operator in FUNCTIONS else "rope"
    if name == "out":
        return "attention"
    if name == "gate":
        return "gate"
    if name == "mlp":
        return "activation"
    if name in ("up", "down"):
        return f"mlp {name}"
    if name.startswith("norm") or operator == "rms_norm":
        return "norm"
    if name.isdigit():  # a block: sums, and what a checkpoint keeps
        return "residual"
    if name in ("embed", "positions") or operator in ("arange", "embedding") or kernel == "add":
        return "embedding"
    if name == "head" and kernel not in ("mm", "addmm", "fp8_linear_fp8_backward"):
        return "head"
    return "logits and loss"
