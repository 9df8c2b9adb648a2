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
