"""What all readers share: rows before tokenizing, faults of rejected samples, and files mapped into memory.

Bytes that are in no local file yet (converted images, remote tars, images of tables) go into a worker's ScratchFile, so
that every image of a shard is a span (begin, end) of a mapped file, wherever it came from.
"""

import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, cast

import numpy as np
import pyarrow as pa

from labels.manifest import LABELS

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
BATCH_ROWS = 32_768
MAX_SIDE = (1 << 31) - 1  # pixels that a row can hold
# What Python's str.strip removes; Arrow's own set lacks the separators 0x1C to 0x1F.
WHITE_SPACE = "".join(char for char in map(chr, range(0x3001)) if char.isspace())
_COPY_BYTES = 8 << 20

ROWS = pa.schema(
    [
        *(LABELS.field(name) for name in ("key", "uid", "width", "height")),
        pa.field("caption", pa.string(), nullable=False),
    ]
)
"""One row a sample: key string, uid string?, width and height int32? in pixels, caption string."""


@dataclass(frozen=True)
class Fault:
    """A sample, or the rest of a tar, that cannot be read. `key` is empty where no key is known."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class RowBatch:
    """Rows of schema ROWS in the shard's order, and the samples of the same part of the shard that have no row."""

    table: pa.Table
    faults: list[Fault]


class ScratchFile:
    """Append, then view as an array. The file has no name: it is gone when the process is.

    `folder`: a local folder with room; None takes the system's for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        file = tempfile.TemporaryFile(dir=folder, buffering=_COPY_BYTES)  # noqa: SIM115  (closed by __exit__)
        self.file = cast(BinaryIO, file)
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, data: bytes) -> tuple[int, int]:
        """Begin and end of `data` in the file."""
        self.file.write(data)
        begin, self.bytes = self.bytes, self.bytes + len(data)
        return begin, self.bytes

    def copy(self, source: BinaryIO) -> None:
        """Append all of another file."""
        shutil.copyfileobj(source, self.file, _COPY_BYTES)
        self.bytes = self.file.tell()

    def view(self) -> np.ndarray:
        """All bytes until now, uint8 [bytes], mapped; valid also after the file is closed."""
        self.file.flush()
        return _map(self.file.fileno(), self.bytes)


def map_file(path: Path) -> np.ndarray:
    """A local file as uint8 [bytes], mapped read-only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _map(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> np.ndarray:
    if size == 0:
        return np.empty(0, np.uint8)
    # All pages at once: page faults one by one would cost more than the rest.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ), np.uint8)
