"""Packing moves examples about and changes nothing in them."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqlora.data import Example, pack, pad
from jqlora.data.packing import longest
from jqlora.errors import DataError

LENGTH = 16
LENGTHS = st.lists(st.integers(1, LENGTH), min_size=1, max_size=60)


def make_examples(lengths):
    """Examples whose tokens are all different, so that each can be followed."""
    starts = np.cumsum([0, *lengths])
    rng = np.random.default_rng(0)
    return [
        Example(np.arange(a, b, dtype=np.int32), rng.random(b - a) < 0.5, f"f:{i}")
        for i, (a, b) in enumerate(itertools.pairwise(starts))
    ]


def segments(row):
    """The examples of a row, as (ids, mask, positions) by segment."""
    for segment in range(1, row["segment_ids"].max() + 1):
        at = row["segment_ids"] == segment
        assert (np.diff(np.flatnonzero(at)) == 1).all(), "a segment is one run"
        yield row["input_ids"][at], row["loss_mask"][at], row["positions"][at]


@pytest.mark.parametrize("lay", [pack, pad])
@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS)
def test_every_example_comes_whole_and_once_with_its_own_positions(lay, lengths):
    examples = make_examples(lengths)
    rows = lay(examples, LENGTH)
    laid = [segment for row in rows for segment in segments(row)]
    for ids, mask, positions in laid:
        original = next(e for e in examples if e.input_ids[0] == ids[0])
        np.testing.assert_array_equal(ids, original.input_ids)
        np.testing.assert_array_equal(mask, original.loss_mask)
        np.testing.assert_array_equal(positions, np.arange(len(ids)))
    assert Counter(len(ids) for ids, _, _ in laid) == Counter(lengths)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS)
def test_padding_is_the_rest_of_a_row_and_no_target(lengths):
    rows = pack(make_examples(lengths), LENGTH)
    used = sum(int((row["segment_ids"] > 0).sum()) for row in rows)
    assert used == sum(lengths)
    assert rows.fill == pytest.approx(used / (len(rows) * LENGTH))
    for row in rows:
        padding = row["segment_ids"] == 0
        assert not padding[: (~padding).sum()].any(), "padding comes last"
        assert not row["loss_mask"][padding].any()


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS)
def test_packing_wastes_no_row_that_first_fit_decreasing_would_save(lengths):
    room = []
    for size in sorted(lengths, reverse=True):
        fit = next((i for i, free in enumerate(room) if free >= size), None)
        if fit is None:
            room.append(LENGTH)
            fit = len(room) - 1
        room[fit] -= size
    fewest = -(-sum(lengths) // LENGTH)
    assert (
        fewest <= len(pack(make_examples(lengths), LENGTH)) <= max(len(room), 11 / 9 * fewest + 1)
    )


def test_pad_keeps_the_order_and_pack_fills_rows():
    examples = make_examples([4, 12, 8, 8])
    assert [row["input_ids"][0] for row in pad(examples, LENGTH)] == [0, 4, 16, 24]
    assert pack(examples, LENGTH).layout == [[1, 0], [2, 3]]
    assert pack(examples, LENGTH).fill == 1.0


def test_rows_have_the_promised_dtypes():
    row = pack(make_examples([3]), LENGTH)[0]
    assert {name: str(array.dtype) for name, array in row.items()} == {
        "input_ids": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "loss_mask": "bool",
    }


@pytest.mark.parametrize("lay", [pack, pad])
def test_an_example_longer_than_a_row_is_an_error(lay):
    with pytest.raises(DataError, match=r"f:1: 17 tokens do not fit a row of 16"):
        lay(make_examples([3, 17]), LENGTH)
    with pytest.raises(DataError, match="no examples"):
        lay([], LENGTH)


def test_longest_rounds_up():
    assert longest(make_examples([3, 9])) == 16
    assert longest(make_examples([8])) == 8
