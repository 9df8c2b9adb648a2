"""Ranks on named axes, in plain numbers."""

import torch

from strategies.layout import EMPTY, Interval, speaks
from strategies.mesh import Mesh, Place


def test_ranks_along_axes() -> None:
    mesh = Mesh((("replicate", 2), ("shard", 3)))
    assert mesh.ranks == 6 and mesh.axes == ("replicate", "shard")
    assert mesh.coordinate(4) == {"replicate": 1, "shard": 1}
    assert mesh.coordinate(2) == {"replicate": 0, "shard": 2}


def test_a_place_counts_replica_by_replica() -> None:
    place = Place(1, 3, torch.device("cpu"), replica=1, replicas=2)
    assert place.global_rank == 4 and place.ranks == 6
    assert Place(1, 3, torch.device("cpu")).global_rank == 1


def test_of_equal_copies_the_first_speaks() -> None:
    whole, half = Interval(0, 6), Interval(3, 6)
    assert [speaks((whole,) * 3, rank) for rank in range(3)] == [True, False, False]
    assert [speaks((Interval(0, 3), half), rank) for rank in range(2)] == [True, True]
    assert [speaks((EMPTY, whole, whole), rank) for rank in range(3)] == [True, True, False]
