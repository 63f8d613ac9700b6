"""A file written front to back past the page cache, where its file system can: for bytes that this process will not
read again.

A page of the cache costs its allocation, a copy, and whatever it drives out, the tars that are still to be read among
it. Straight to the disk a gigabyte took a twentieth to a fifth of the processor time, and left nothing for fsync to
wait for (docs/experiments.md).
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

_ALIGNED = 4096
"""Bytes of which address, place and length have to be multiples: the largest block of usual disks."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # no such flag on macOS


def aligned_buffer(size: int) -> np.ndarray:
    """Zeros, uint8 [size], that begin where a memory page does."""
    return np.frombuffer(mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8, size)


class DirectFile:
    """Written again by `write`. What is not aligned, in practice the end, and file systems without such writes go
    through the cache.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct = _DIRECT != 0
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor, self._direct = os.open(path, flags, 0o666), False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, block: np.ndarray) -> None:
        """Append uint8 [n], all of it. It may not change meanwhile.

        Raises:
            OSError: the disk is full, or may not be written.
        """
        if block.ctypes.data % _ALIGNED or len(block) % _ALIGNED:
            self._through_cache()
        rest = block.data
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._through_cache()

    def _through_cache(self) -> None:
        if self._direct:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_DIRECT)
            self._direct = False
