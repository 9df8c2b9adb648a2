"""The checks of the capstones: a strategy that a learner wrote (shardrun/own), in levels.

levels.py    the levels: right, frugal, overlapped, muon
watched.py   the strategy as the trainer runs it, and what is looked at around each of its calls
reasons.py   from what it computed to the mistake that gives just that
events.py    what was sent while what was computed
targets.py   what the books of several capstones have in common
"""
