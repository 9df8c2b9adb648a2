"""What every rank imports, imported once: ranks are forked from a process that has loaded this (tests/ranks.py).

Nothing here may start a thread or a device, which would not survive the fork.
"""
# ruff: noqa: E402, F401  the environment comes before the imports that read it; they are there to have been made

import gc
import importlib.util
import os
import warnings

os.environ.update(
    OMP_NUM_THREADS=os.environ.get("SHARDRUN_TEST_THREADS", "1"),
    ACCELERATE_USE_CPU="true",
    DS_ACCELERATOR="cpu",
    DEEPSPEED_LOG_LEVEL="ERROR",
    PYTHONWARNINGS="ignore",
)
warnings.simplefilter("ignore")

import hypothesis
import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor

import speedrun.train
import strategies.ddp.engine
import strategies.fsdp.engine
import strategies.zero.engine

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if importlib.util.find_spec("deepspeed"):
    import deepspeed
    import deepspeed.module_inject.auto_ep_layer  # this and the rest only when an engine starts
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer

# Half a million objects of imported modules that no collection need look at again: a full one then takes microseconds,
# not 0.2 s, in every rank after every test (and does not touch, and so copy, the pages shared with other ranks).
gc.collect()
gc.freeze()
