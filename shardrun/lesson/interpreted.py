"""Imported before anything else by the process that all ranks of checks are forked from.

Triton decides when it is imported whether its kernels are compiled or interpreted, and torch imports it. Checks run on
the CPU: interpreted.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
