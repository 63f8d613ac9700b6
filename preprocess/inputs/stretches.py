"""Stretches of mapped bytes as an Arrow array, compiled. B bytes, N stretches."""

import numpy as np
import pyarrow as pa

from labels.native import njit


def gather_strings(data: np.ndarray, places: np.ndarray) -> pa.LargeBinaryArray:
    """Stretches of `data`, uint8 [B], as an Arrow array; places int64 [N, 2] are begin and end, begin -1 is null."""
    offsets = np.zeros(len(places) + 1, np.int64)
    np.cumsum(places[:, 1] - places[:, 0], out=offsets[1:])
    text = np.empty(offsets[-1], np.uint8)
    _gather(data, np.ascontiguousarray(places), offsets, text)
    missing = places[:, 0] < 0
    valid = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.large_binary(), len(places), buffers, int(missing.sum()))  # type: ignore[return-value]


@njit(nogil=True, cache=True)
def _gather(data: np.ndarray, places: np.ndarray, offsets: np.ndarray, text: np.ndarray) -> None:
    for row in range(len(places)):
        begin, at = places[row, 0], offsets[row]
        for i in range(offsets[row + 1] - at):
            text[at + i] = data[begin + i]
