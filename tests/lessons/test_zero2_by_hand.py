"""Lesson 6's hand-written ZeRO-2 against one process without any framework, and against the books."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lessons import compared, kit
from tests.lessons.hand import STEPS, alone, assert_is_the_books, by_hand, place
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of

TO_OWNERS = {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}}

pytestmark = pytest.mark.ranks


def on_rank(broken: bool = False) -> compared.Trained:
    class LastMicroBatchOnly(by_hand("06_zero2").HandZero2):  # type: ignore[misc]
        def backward(self, loss: Tensor, last: bool) -> None:
            self.mine = {}
            super().backward(loss, last)

    cls = LastMicroBatchOnly if broken else by_hand("06_zero2").HandZero2
    model = kit.build()
    return compared.train_by_hand(cls(model, compared.groups_of(model), 2**17), place(), STEPS)


def most_alive(bucket: int) -> tuple[int, int]:
    """Elements of gradients alive at most in a backward pass of eight layers; elements of the model."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
    zero = by_hand("06_zero2").HandZero2(model, [{"params": list(model.parameters())}], bucket)
    found = []

    def watch(p: nn.Parameter) -> None:
        found.append(sum(t.untyped_storage().nbytes() // 4 for t in zero.held()["gradients"]))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)  # after its own
    zero.backward(model(torch.ones(1, 16)).sum(), last=True)
    return max(found), sum(p.numel() for p in model.parameters())


def test_it_is_one_process_in_weights_and_the_books_in_bytes(ranks: RankPool) -> None:
    reference = alone()
    books = replace(
        kit.launched_scenario(launch_of("zero2", 0, 2), accumulation=compared.ACCUMULATION), engine=TO_OWNERS
    )
    for rank, found in enumerate(ranks.run(2, on_rank)):
        assert found.away_from(reference) < 1e-5
        assert_is_the_books(found, books, rank)


def test_a_lost_micro_batch_is_seen(ranks: RankPool) -> None:
    """The comparison above can fail."""
    assert ranks.run(2, on_rank, True)[0].away_from(alone()) > 1e-5


def test_gradients_are_freed_while_backward_runs(ranks: RankPool) -> None:
    """Rank 1 owns the second half, whose gradients come first and stay; rank 0's are never all there."""
    layer = 16 * 16
    small, large = ranks.run(2, most_alive, layer), ranks.run(2, most_alive, 8 * layer)
    assert [most for most, _ in large] == [whole for _, whole in large]  # one bucket: everything waits
    assert small[1][0] == (4 + 1) * layer
    assert small[0][0] == 4 * layer  # its own half, the last of which has just come
