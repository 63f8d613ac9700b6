"""Sparse label sets: a flat id array with offsets, and the padded rows that betons hold.

Shapes: N captions, K label limit, T total number of ids.
"""

import numpy as np

from labels.schema import PAD_ID


def unique_sorted(ids: np.ndarray, offsets: np.ndarray, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label set of every caption: its ids sorted, once each, without the excluded ones.

    Args:
        ids: int32 [T], token ids of all captions one after another.
        offsets: int64 [N + 1], where each caption begins; offsets[0] = 0, offsets[N] = T.
        excluded: int32 [E], ids that are no labels (special tokens).

    Returns:
        ids int32 [T'], offsets int64 [N + 1].
    """
    rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    # One sort of (row, id) as a single integer: both fit, since ids are 31 bits and rows below 2^32.
    packed = np.unique((rows << 31) | ids.astype(np.int64))
    label_ids = (packed & ((1 << 31) - 1)).astype(np.int32)
    keep = ~np.isin(label_ids, excluded)
    kept_rows = (packed >> 31)[keep]
    counts = np.bincount(kept_rows, minlength=len(offsets) - 1)
    return label_ids[keep], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def pad_rows(ids: np.ndarray, offsets: np.ndarray, limit: int) -> np.ndarray:
    """Padded form of sparse rows.

    Args:
        ids: int32 [T].
        offsets: int [N + 1].
        limit: K, the width of a row.

    Returns:
        int32 [N, K], each row ascending as given and filled up with `PAD_ID`.

    Raises:
        ValueError: a row holds more than `limit` ids.
    """
    lengths = np.diff(offsets)
    if lengths.size and lengths.max() > limit:
        raise ValueError(f"a row holds {lengths.max()} labels, more than the limit of {limit}")
    padded = np.full((len(lengths), limit), PAD_ID, dtype=np.int32)
    padded[np.arange(limit) < lengths[:, None]] = ids[offsets[0] : offsets[-1]]
    return padded


def unpad_rows(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `pad_rows`: int32 [N, K] to ids int32 [T] and offsets int64 [N + 1]."""
    valid = padded != PAD_ID
    offsets = np.concatenate([[0], np.cumsum(valid.sum(axis=1))]).astype(np.int64)
    return padded[valid].astype(np.int32), offsets
