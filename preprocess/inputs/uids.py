"""uids as numbers: 32 hex digits are two u8, and a sorted array of them is searched without reading it whole.

N uids of a batch, U of the array.
"""

import numpy as np
import pyarrow as pa

from preprocess.inputs.columns import offsets_and_bytes

UIDS = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""DataComp's: the first and the last 16 digits."""

_DIGITS = 32
_NO_DIGIT = 255
_HEX = np.full(256, _NO_DIGIT, np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_HEX[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def parse_uids(strings: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """UIDS [N] of those strings that are 32 hex digits, and their rows, int64 [N]; the others, and nulls, are left out."""
    offsets, text = offsets_and_bytes(strings)
    long_enough = np.diff(offsets) == _DIGITS
    if strings.null_count:
        long_enough &= strings.is_valid().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(long_enough)
    if len(rows) == len(strings):  # the usual case: no gather
        digits = _HEX[text[offsets[0] : offsets[-1]].reshape(-1, _DIGITS)]
    else:
        digits = _HEX[text[offsets[rows][:, None] + np.arange(_DIGITS)]]
    good = (digits != _NO_DIGIT).all(axis=1)
    if not good.all():
        digits, rows = digits[good], rows[good]
    values = (digits[:, 0::2] << 4 | digits[:, 1::2]).view(">u8").astype("<u8")
    return values.view(UIDS).reshape(-1), rows


def count_in(uids: np.ndarray, array: np.ndarray) -> np.ndarray:
    """How often each of UIDS [N] stands in the sorted UIDS [U]: int64 [N]; touches some of the array's pages only."""
    high, low = array["f0"], array["f1"]
    # In order, so that neighbours share pages of a file that is larger than memory.
    order = np.argsort(uids["f0"])
    wanted = uids[order]
    begin = np.searchsorted(high, wanted["f0"], "left")
    end = np.searchsorted(high, wanted["f0"], "right")
    counts = np.empty(len(uids), np.int64)
    counts[order] = _bound(low, begin, end, wanted["f1"], np.less_equal) - _bound(low, begin, end, wanted["f1"], np.less)
    return counts


def _bound(values: np.ndarray, begin: np.ndarray, end: np.ndarray, wanted: np.ndarray, before: np.ufunc) -> np.ndarray:
    """For each i the first place in begin[i]:end[i] of the sorted `values` that is not `before` wanted[i]: N bisections at once."""
    begin, end = begin.copy(), end.copy()
    while (open_rows := np.flatnonzero(begin < end)).size:
        middle = (begin[open_rows] + end[open_rows]) // 2
        left = before(values[middle], wanted[open_rows])
        begin[open_rows[left]] = middle[left] + 1
        end[open_rows[~left]] = middle[~left]
    return begin
