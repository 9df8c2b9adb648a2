"""What DeepSpeed needs to run on tensors without data, and what is taken back of it afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from strategies.zero.engine import import_deepspeed


@contextmanager
def fake() -> Iterator[None]:
    """DeepSpeed compares lists of integers with rank 0's, which it does not get here; the broadcasts remain. It refuses
    fp16 on most CPUs, and here it stands for a GPU. And what it leaves behind for the whole process is taken back: the
    process groups in its modules, which end with ours, and ZeRO-3's own linear layer.
    """
    import_deepspeed(torch.device("cpu"))
    import deepspeed.comm.comm as comm
    import deepspeed.runtime.zero.utils as utils
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups

    def from_rank_0(integers: list[int]) -> list[int]:
        dist.broadcast(torch.tensor(integers), src=0)
        return integers

    no_groups = {name: None for name, value in vars(groups).items() if isinstance(value, dist.ProcessGroup)}
    with (
        mock.patch.object(comm, "cdb", None),
        mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True),
        mock.patch.object(F, "linear", F.linear),
        mock.patch.dict(vars(groups), no_groups),
        mock.patch.object(utils, "assert_lst_len_same_as_other_ranks", lambda ints: from_rank_0([len(ints)])),
        mock.patch.object(utils, "get_lst_from_rank0", from_rank_0),
    ):
        yield
