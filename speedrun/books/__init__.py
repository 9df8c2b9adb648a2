"""What the ledger needs to know of this GPT: plain Python without torch, but for measured.py and stand_ins.py."""
