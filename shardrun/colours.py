"""The colour of every category of the books: the same in terminals, pages and pictures.

From Okabe and Ito's palette, whose colours most colour-blind readers can tell apart.
"""

COLOURS = {
    "parameters": "#0072B2",
    "master parameters": "#56B4E9",
    "gradients": "#E69F00",
    "optimizer states": "#009E73",
    "communication buffers": "#999999",
    "activations": "#CC79A7",
    "other": "#F0E442",
}
"""Category → colour, in the order in which bars stack them."""

SENT = "#D55E00"
"""Of what a rank sends."""

ACCENT = "#0072B2"
"""Of whatever is shown alone: a loss curve, a bar of progress, computation."""

REFERENCE = "#A9B0B8"
"""Of what stands beside for comparison only: DDP's prediction, a baseline."""

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
"""Of curves and bars that stand for no category, one after another."""
