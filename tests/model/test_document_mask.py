"""The document mask against its definition."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from speedrun.model.masks import document_mask


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3))
def test_a_position_sees_itself_and_what_came_before_it_in_its_document(rows: list[list[int]]) -> None:
    start = 2
    mask = document_mask(torch.tensor(rows), start)
    assert mask.dtype == torch.bool and mask.shape == (len(rows), 1, 7, 7)
    for b, row in enumerate(rows):
        for i in range(7):
            for j in range(7):
                a_start_lies_between = start in row[j + 1 : i + 1]
                assert mask[b, 0, i, j].item() == (j <= i and not a_start_lies_between)
