"""Writes one .beton file (layout: labels/beton.py) in a single pass, with the JPEG bytes as they are given."""

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from labels import beton


class BetonWriter:
    """Append samples, then close; without an exception the file is then a whole beton.

    Args:
        path: created anew.
        capacity: at most this many samples will be added; the metadata array gets that much room.
        page_bytes: a power of two, MIN_PAGE_BYTES or more.
        label_limit: K, the width of a label row.
    """

    def __init__(self, path: Path, capacity: int, page_bytes: int, label_limit: int) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by __exit__)
        self._page_bytes, self._label_limit = page_bytes, label_limit
        self._metadata = np.zeros(capacity, beton.METADATA)
        self._allocations = np.zeros((capacity, 2), beton.ALLOCATION)
        self._at = beton.first_page_offset(capacity, page_bytes)
        self._file.seek(self._at)
        self.samples = 0

    def add(self, jpeg: bytes, width: int, height: int, label_row: np.ndarray, index: int) -> None:
        """One sample.

        Args:
            jpeg: the image file's bytes.
            width, height: pixels, at most 65,535.
            label_row: int32 [K], padded.
            index: the row's position in the label files.

        Raises:
            ValueError: the sample does not fit a page, or the label row has another width.
        """
        labels = label_row.astype("<i4").tobytes()
        size = len(jpeg) + len(labels)
        if size > self._page_bytes:
            raise ValueError(f"a sample of {size} bytes does not fit a page of {self._page_bytes}")
        if len(labels) != 4 * self._label_limit:
            raise ValueError(f"a label row of {len(label_row)} ids, not {self._label_limit}")
        left = -self._at % self._page_bytes
        if left < size and left:
            self._at += left
            self._file.seek(self._at)
        self._file.write(jpeg)
        self._file.write(labels)
        labels_at = self._at + len(jpeg)
        self._metadata[self.samples] = ((beton.JPG_MODE, width, height, self._at), labels_at, index)
        self._allocations[self.samples, 0] = (self.samples, self._at, len(jpeg))
        self._allocations[self.samples, 1] = (self.samples, labels_at, len(labels))
        self._at += size
        self.samples += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def _finish(self) -> None:
        table_at = -(-self._at // self._page_bytes) * self._page_bytes
        self._file.seek(table_at)
        self._file.write(self._allocations[: self.samples].tobytes())
        header = np.zeros(1, beton.HEADER)
        header[0] = (beton.VERSION, len(beton.FIELD_NAMES), self._page_bytes, self.samples, table_at)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.write(beton.field_descriptors(self._label_limit).tobytes())
        self._file.write(self._metadata[: self.samples].tobytes())
