"""Bytes that have no place in a local file yet (converted images, remote tars, images in tables): one nameless file of
a worker.

So every image of a shard is a place in a mapped file, wherever it came from.
"""

import mmap
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import numpy as np

_COPY_BYTES = 8 << 20


class Spool:
    """Append, then look at it as an array. The file has no name: it is gone when the process is.

    Args:
        folder: a local folder with room; None takes the system's for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self.file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder, buffering=_COPY_BYTES))  # noqa: SIM115  (closed by __exit__)
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        """All bytes until now, uint8 [bytes], mapped; valid also after the spool is closed."""
        self.file.flush()
        return map_file(self.file.fileno(), self.bytes)


def map_file(descriptor: int, size: int) -> np.ndarray:
    """A local file as uint8 [size], mapped read-only and read ahead all at once: page faults one by one would cost more
    than the rest.
    """
    if size == 0:
        return np.empty(0, np.uint8)
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ), np.uint8)


def map_path(path: Path) -> np.ndarray:
    """The same of a file by its path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return map_file(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
