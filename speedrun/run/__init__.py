"""What keeps a run alive, and what it leaves behind.

The files are used one by one: whoever only reads what a run has left (progress.py, record.py) loads no torch.
"""
