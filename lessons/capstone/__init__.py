"""The checks of the capstones: a strategy that a learner wrote (shardrun/own), in levels.

levels.py    the levels: right, frugal, overlapped, muon
watched.py   the strategy as the trainer runs it, and what is looked at around each of its calls
reasons.py   from what it computed to the mistake that gives just that
network.py   collectives whose results are there only once they have been waited for, and whose calls are compared
events.py    what was sent while what was computed
targets.py   what the books of several capstones have in common
recorded_step.py   a step for a picture: `lesson check --show`
"""
