"""The trainer: a GPT, its optimizer rules, its data and the loop that trains it."""

__version__ = "0.1.0"
