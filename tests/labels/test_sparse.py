"""Sparse label sets against Python's own sets."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labels.arrays import pad_rows, unique_sorted
from labels.manifest import PAD_ID

IDS = st.one_of(st.integers(0, 12), st.integers(0, 2**31 - 1))
ROWS = st.lists(st.lists(IDS, max_size=9), max_size=9)


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([token for row in rows for token in row], np.int32)
    return ids, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


def nested(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[start:end].tolist() for start, end in pairwise(offsets)]


@given(ROWS, st.lists(IDS, max_size=3))
def test_unique_sorted_is_the_set_of_every_row(rows: list[list[int]], excluded: list[int]) -> None:
    ids, offsets = unique_sorted(*flat(rows), np.array(excluded, np.int32))
    assert nested(ids, offsets) == [sorted(set(row) - set(excluded)) for row in rows]
    assert ids.dtype == np.int32 and offsets.dtype == np.int64


@given(ROWS, st.integers(0, 3))
def test_padding_fills_every_row_to_the_limit(rows: list[list[int]], room: int) -> None:
    limit = max((len(row) for row in rows), default=0) + room
    padded = pad_rows(*flat(rows), limit)
    assert padded.dtype == np.int32
    assert padded.tolist() == [row + [PAD_ID] * (limit - len(row)) for row in rows]


@given(ROWS, st.data())
def test_padding_a_slice(rows: list[list[int]], data: st.DataObject) -> None:
    ids, offsets = flat(rows)
    first = data.draw(st.integers(0, len(rows)))
    padded = pad_rows(ids, offsets[first:], 9)
    assert [row[row != PAD_ID].tolist() for row in padded] == rows[first:]


def test_a_row_beyond_the_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row holds 3 labels, more than the limit of 2"):
        pad_rows(*flat([[1], [1, 2, 3]]), 2)
