"""What a run tells its ranks of one another after a step."""

import pytest
import torch
import torch.distributed as dist

from speedrun.run.context import mean_over_ranks
from tests.ranks import RankPool


def means_and_messages(preempted: int, interrupted: int) -> tuple[list[float], list[int]]:
    """On a rank, with a loss of its own number: the figures when those two ranks are told to end, and the elements of
    every message."""
    sent = []

    def all_reduce(tensor: torch.Tensor) -> None:
        sent.append(tensor.numel())
        original(tensor)

    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        original = dist.all_reduce
        patch.setattr(dist, "all_reduce", all_reduce)
        figures = mean_over_ranks(torch.tensor(float(rank)), rank == preempted, rank == interrupted, False)
    return figures, sent


@pytest.mark.ranks
def test_the_loss_and_what_each_rank_is_told_go_in_one_message(ranks: RankPool) -> None:
    assert ranks.run(2, means_and_messages, 1, -1) == [([0.5, 0.5, 0.0, 0.0], [4])] * 2
    assert ranks.run(3, means_and_messages, 0, 2) == [(pytest.approx([1.0, 1 / 3, 1 / 3, 0.0]), [4])] * 3
