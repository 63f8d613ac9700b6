"""Label sets of rows of ids: the compiled function equals np.unique."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guarded_array import guarded
from labels.tokenizers.kernels.label_sets import gather


def assert_gathered(rows: np.ndarray, counts: np.ndarray) -> None:
    """Before and behind all arrays is memory that may not be touched."""
    for at_end in (True, False):
        assert_gathered_within(rows, counts, at_end)


def assert_gathered_within(rows: np.ndarray, counts: np.ndarray, at_end: bool) -> None:
    total, size = int(counts.sum()), len(counts) + 1
    ids, label_ids = (guarded(np.full(total, -7, np.int32), at_end=at_end) for _ in range(2))
    offsets, label_offsets = (guarded(np.zeros(size, np.int64), at_end=at_end) for _ in range(2))
    rows, counts = guarded(rows, at_end=at_end), guarded(counts, at_end=at_end)
    gather(rows, counts, ids, offsets, label_ids, label_offsets)
    kept = [rows[row, : counts[row]] for row in range(len(counts))]
    sets = [np.unique(row) for row in kept]
    assert np.array_equal(ids, np.concatenate([*kept, np.empty(0, np.int32)]))
    assert np.array_equal(label_ids[: label_offsets[-1]], np.concatenate([*sets, np.empty(0, np.int32)]))
    assert np.diff(offsets).tolist() == counts.tolist()
    assert np.diff(label_offsets).tolist() == [len(row) for row in sets]


@pytest.mark.parametrize("vocabulary", [1, 3, 40, 1 << 31])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 64, 65, 75, 127, 128, 129, 200])
def test_every_length(width: int, vocabulary: int) -> None:
    draw = np.random.default_rng(width)
    counts = np.concatenate([draw.integers(0, width + 1, 300), np.arange(width + 1)])  # the last row is full
    rows = draw.integers(0, vocabulary, (len(counts), width)).astype(np.int32)
    assert_gathered(rows, counts)


@settings(deadline=None)
@given(
    lists=st.lists(st.lists(st.integers(0, 9) | st.integers(0, (1 << 31) - 1), max_size=140), max_size=12),
    filler=st.integers(-9, 9),
)
def test_values_after_the_end_of_a_row_do_not_count(lists: list[list[int]], filler: int) -> None:
    width = max(map(len, lists), default=0)
    rows = np.full((len(lists), width), filler, np.int32)
    for row, ids in zip(rows, lists, strict=True):
        row[: len(ids)] = ids
    assert_gathered(rows, np.array([len(ids) for ids in lists], np.int64))
