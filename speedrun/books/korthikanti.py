"""The published formula for activations, to compare with. Plain Python."""

from typing import Literal


def korthikanti(
    s: int,
    b: int,
    h: int,
    a: int,
    layers: int,
    *,
    flash: bool = False,
    recomputation: Literal["none", "selective", "full"] = "none",
) -> float:
    """Bytes of activations of `layers` 16-bit transformer layers (Korthikanti et al. 2022, arXiv 2205.05198).

    s tokens of a row, b rows, h width, a heads. Per layer

        none        s·b·h·(34 + 5·a·s/h): 11·s·b·h + 5·a·s²·b in attention, 19·s·b·h in the MLP, 4·s·b·h in two norms
        selective   34·s·b·h: scores, softmax and dropout of attention are computed again
        full        2·s·b·h: only the layer's input

    Fused attention (`flash`) drops 5·a·s/h without any recomputation that a user would see. Embedding, last norm, head
    and loss are left out, and for small models they are the most; so are weights cast to 16 bit.
    """
    if recomputation == "full":
        return layers * 2 * s * b * h
    scores = 0 if flash or recomputation == "selective" else 5 * a * s / h
    return layers * s * b * h * (34 + scores)
