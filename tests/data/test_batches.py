"""Global batches: compared with a packer that builds the whole stream as a Python list, and across world sizes."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.data.batches import Data, DocumentRun, StageRows, Stream, batch_hash, shuffled

START = 9  # tokens of text are 0 … 8


def make_data(parts: list[list[int]], length: int, global_batch: int, seed: int = 0) -> Data:
    made = [DocumentRun(f"part {i}", np.array(tokens, dtype=np.uint16), START) for i, tokens in enumerate(parts)]
    stream = Stream(made, length, vocab_size=10, seed=seed)
    validation = [DocumentRun("validation", np.arange(90, dtype=np.uint16) % 10, START)]
    return Data(
        name="test",
        content_hash="",
        document_start=START,
        train_tokens=stream.epoch_length,
        val_tokens=90,
        global_batch=global_batch,
        validation_rows=89 // length,
        validation_length=length,
        byte_tokens=True,
        stream=stream,
        validation_parts=validation,
    )


def documents_of(tokens: list[int]) -> list[list[int]]:
    """The documents of a part, each with its document start, split by walking over the tokens."""
    documents: list[list[int]] = []
    for i, token in enumerate(tokens):
        if token == START:
            documents.append([])
        elif i == 0:
            documents.append([token])
            continue
        documents[-1].append(token)
    return [document if document[0] == START else [START, *document] for document in documents]


def brute_force_rows(parts: list[list[int]], length: int, seed: int, epochs: int) -> list[list[int]]:
    """All rows that begin in the first epochs, in their order, from one long list of tokens."""
    stream: list[int] = []
    visit_of: list[tuple[int, int]] = []  # of each position of the stream
    for epoch in range(epochs + length + 2):  # more epochs than a row can reach into
        for index, tokens in enumerate(parts):
            documents = documents_of(tokens)
            for i in shuffled(len(documents), seed, epoch, index, 0):
                stream += documents[i]
                visit_of += [(epoch, index)] * len(documents[i])
    rows = []
    for epoch in range(epochs):
        for index in range(len(parts)):
            begins = [p for p in range(0, len(stream), length) if visit_of[p] == (epoch, index)]
            order = shuffled(len(begins), seed, epoch, index, 1)
            rows += [[START, *stream[begins[i] + 1 : begins[i] + length + 1]] for i in order]
    return rows


part_tokens = st.lists(st.sampled_from([0, 1, 2, 3, 4, START]), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(part_tokens, min_size=1, max_size=3),
    length=st.integers(1, 12),
    global_batch=st.integers(1, 7),
    seed=st.integers(0, 2**40),
)
def test_rows_equal_the_brute_force(parts: list[list[int]], length: int, global_batch: int, seed: int) -> None:
    expected = brute_force_rows(parts, length, seed, epochs=3)
    data = make_data(parts, length, global_batch, seed)
    steps = range(len(expected) // global_batch)
    for step in reversed(steps):  # random access: no step depends on an earlier one
        inputs, targets = data.batch(step, 0, global_batch)
        rows = torch.tensor(expected[step * global_batch : (step + 1) * global_batch])
        assert torch.equal(inputs, rows[:, :-1])
        assert torch.equal(targets, rows[:, 1:])


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(part_tokens, min_size=1, max_size=3), length=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_token_of_an_epoch_is_a_target_once(parts: list[list[int]], length: int, seed: int) -> None:
    """Independent of the brute force above and of the order: counts of targets over `length` whole epochs."""
    data = make_data(parts, length, global_batch=1, seed=seed)
    # `length` epochs are a whole number of rows; its targets are shifted by one, from the 2nd token to the next start.
    rows = data.stream.rows(0, data.train_tokens)
    expected = Counter(token for tokens in parts for token in tokens if token != START)
    starts = sum(tokens.count(START) + (tokens[0] != START) for tokens in parts)
    expected[START] = starts
    assert Counter(rows[:, 1:].ravel().tolist()) == Counter({t: n * length for t, n in expected.items() if n})
    assert (rows[:, 0] == START).all()


def numbered(lengths: list[int]) -> tuple[list[list[int]], np.ndarray]:
    """Documents whose tokens are all different (1, 2, ...), and their part, with start 0."""
    documents, number = [], 1
    for length in lengths:
        documents.append(list(range(number, number + length)))
        number += length
    return documents, np.array([token for document in documents for token in [0, *document]], dtype=np.uint16)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), length=st.integers(1, 16))
def test_document_boundaries(lengths: list[int], length: int) -> None:
    """Between two document starts of a row stands a piece of one document, in its order."""
    documents, tokens = numbered(lengths)
    stream = Stream([DocumentRun("numbered", tokens, 0)], length, vocab_size=1000, seed=5)
    follows = {(a, b) for document in documents for a, b in zip(document, document[1:], strict=False)}
    firsts = {document[0] for document in documents if document}
    lasts = {document[-1] for document in documents if document}
    for row in stream.rows(0, 40).tolist():
        assert row[0] == 0 and len(row) == length + 1
        for i in range(1, length):  # inside the row
            a, b = row[i], row[i + 1]
            if a and b:
                assert (a, b) in follows
            elif b:
                assert b in firsts
            elif a:
                assert a in lasts


TEXT = [START, 1, 2, 3, 4, 5, 6, 7, START, 2, 2, START, 3, 1, 4, 1, 5, START, 8]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_the_global_batch_does_not_depend_on_the_split(world_size: int, micro_batch: int) -> None:
    global_batch = 24
    whole = make_data([TEXT, TEXT[3:]], 5, global_batch)
    for step in (0, 1, 7, 1000):
        parts = []
        for rank in range(world_size):
            data = make_data([TEXT, TEXT[3:]], 5, global_batch)  # each rank has its own
            first, last = rank * global_batch // world_size, (rank + 1) * global_batch // world_size
            parts += [data.batch(step, i, min(i + micro_batch, last)) for i in range(first, last, micro_batch)]
        inputs, targets = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        assert batch_hash(inputs, targets) == whole.global_batch_hash(step)
    assert len({whole.global_batch_hash(step) for step in range(50)}) == 50


def test_types_shift_and_bounds() -> None:
    data = make_data([TEXT], 5, 4)
    inputs, targets = data.batch(3, 1, 4)
    assert inputs.shape == targets.shape == (3, 5)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert data.batch(3, 2, 2)[0].shape == (0, 5)
    for wrong in ((-1, 0, 1), (0, -1, 1), (0, 3, 2), (0, 0, 5)):
        with pytest.raises(ValueError, match="There are no rows"):
            data.batch(*wrong)


def test_the_hash_sees_inputs_and_targets() -> None:
    zeros, ones = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)
    assert len({batch_hash(a, b) for a in (zeros, ones) for b in (zeros, ones)}) == 4


def test_validation_rows() -> None:
    data = make_data([TEXT], 7, 4)
    inputs, targets = data.validation(0, data.validation_rows)
    tokens = [i % 10 for i in range(90)]
    assert inputs.tolist() == [tokens[i : i + 7] for i in range(0, 84, 7)]
    assert targets.tolist() == [tokens[i : i + 7] for i in range(1, 85, 7)]
    parts = [data.validation(i, i + 5) for i in (0, 5)] + [data.validation(10, 12), data.validation(12, 12)]
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert data.target_bytes() == sum(token != START for token in tokens[1:85])
    with pytest.raises(ValueError, match="only 12 rows"):
        data.validation(0, 13)


def test_epochs_and_seeds_have_different_orders() -> None:
    _, tokens = numbered([3] * 50)

    def epoch(seed: int, number: int) -> list[int]:
        rows = Stream([DocumentRun("numbered", tokens, 0)], 200, 1000, seed).rows(number, number + 1)
        return [int(token) for token in rows[0] if token]

    assert sorted(epoch(1, 0)) == sorted(epoch(1, 1)) == sorted(epoch(2, 0)) == list(range(1, 151))
    assert len({tuple(epoch(seed, number)) for seed in (1, 2) for number in (0, 1)}) == 4


def test_a_batch_mixes_documents() -> None:
    """One document of 40 rows among 40 short ones: no batch of 8 rows comes from it alone."""
    _, tokens = numbered([400] + [9] * 40)
    stream = Stream([DocumentRun("numbered", tokens, 0)], 10, 1000, seed=0)
    for first in range(0, 72, 8):
        rows = stream.rows(first, first + 8)
        assert 0 < (rows[:, 2] <= 400).sum() < 8


def test_shuffled_is_a_fixed_permutation() -> None:
    assert shuffled(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]  # this very one, in every version of NumPy
    assert sorted(shuffled(1000, 7).tolist()) == list(range(1000))
    assert shuffled(0, 7).tolist() == []


# Stages: the stream cut where batch size or row length change.

stage_lists = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4)


def staged(parts: list[list[int]], stages: list[tuple[int, int, int]], seed: int) -> Data:
    """Stages of so many steps of so many rows of so many tokens."""
    one = make_data(parts, stages[0][2], stages[0][1], seed)
    rows, begin, step = [], 0, 0
    for i, (steps, batch, length) in enumerate(stages):
        end = None if i == len(stages) - 1 else begin + steps * batch * length
        rows.append(StageRows(step, batch, Stream(one.stream.parts, length, 10, seed, begin, end)))
        begin, step = begin + steps * batch * length, step + steps
    return dataclasses.replace(one, stream=rows[0].stream, later=rows[1:])


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(part_tokens, min_size=1, max_size=3), stages=stage_lists, seed=st.integers(0, 99))
def test_no_stage_takes_a_token_that_another_took(
    parts: list[list[int]], stages: list[tuple[int, int, int]], seed: int
) -> None:
    """The steps before the last stage have as targets exactly the stream's tokens up to there."""
    data = staged(parts, stages, seed)
    total = sum(steps * batch * length for steps, batch, length in stages[:-1])
    stream = np.empty(total + 1, dtype=np.uint16)
    Stream(data.stream.parts, 1, 10, seed)._read(0, stream)
    seen: Counter[int] = Counter()
    step = 0
    for steps, batch, length in stages[:-1]:
        for _ in range(steps):
            inputs, targets = data.batch(step, 0, batch)
            assert inputs.shape == targets.shape == (batch, length)
            seen.update(targets.flatten().tolist())
            step += 1
    assert seen == Counter(stream[1:].tolist())
    last = data.stage(step)
    assert last.stream.begin == total and last.first_step == step and data.stage(step + 999) == last
    assert data.batch(step, 0, last.global_batch)[0].shape == (last.global_batch, last.stream.sequence_length)


def test_a_single_stage_is_no_stage() -> None:
    parts = [[token % 9 for token in range(200)]]
    plain, one = make_data(parts, 6, 3, 5), staged(parts, [(1, 3, 6)], 5)
    assert [plain.global_batch_hash(k) for k in range(20)] == [one.global_batch_hash(k) for k in range(20)]


def test_rows_of_stages_are_pieces_of_the_stream_that_do_not_overlap() -> None:
    """In a stream of tokens that are all different, and within one visit that three stages share."""
    part = DocumentRun("one", np.arange(1, 400, dtype=np.uint16), 0)
    taken: list[int] = []
    for length, begin, end, count in ((10, 0, 120, 12), (7, 120, 190, 10), (30, 190, 370, 6)):
        rows = Stream([part], length, 1000, 3, begin, end).rows(0, count).tolist()
        assert rows != sorted(rows), "in a shuffled order"
        for row in rows:
            assert row[1:] == list(range(row[1], row[1] + length))
            taken += row[1:]
    assert sorted(taken) == list(range(1, 120 + 70 + 180 + 1))
