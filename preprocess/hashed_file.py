"""A file that is hashed while it is written, past the page cache and by a thread of its own: not read again, no waiting for the disk.

the caller's bytes -> SHA-256, a block that fills up -> the thread: the disk (preprocess/direct.py), while the next block fills up
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from preprocess.direct import DirectFile, aligned_buffer

_BLOCK_BYTES = 4 << 20


class HashedFile:
    """Written front to back by `write`; once it is closed, `sha256` is that of all of it. `size`: bytes written so far.

    Raises:
        OSError: of `write` and `close`: the disk is full, or may not be written.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.closed = False
        self._hash, self._file, self._thread = hashlib.sha256(), DirectFile(path), ThreadPoolExecutor(1, "disk")
        self._blocks = [aligned_buffer(_BLOCK_BYTES) for _ in range(2)]
        self._filled = 0
        self._waiting: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append all bytes of a buffer."""
        self._hash.update(data)
        rest = np.frombuffer(data, np.uint8)
        self.size += len(rest)
        while len(rest):
            some = rest[: _BLOCK_BYTES - self._filled]
            self._blocks[0][self._filled : self._filled + len(some)] = some
            self._filled, rest = self._filled + len(some), rest[len(some) :]
            if self._filled == _BLOCK_BYTES:
                self._send()

    def _send(self) -> None:
        """Give the block to the thread, which has to be done with the one before."""
        if self._waiting is not None:
            self._waiting.result()
        self._waiting = self._thread.submit(self._file.write, self._blocks[0][: self._filled])
        self._blocks.reverse()
        self._filled = 0

    def close(self) -> None:
        """Write what is left; nothing if that was done."""
        if self.closed:
            return
        self.closed = True
        try:
            self._send()
            assert self._waiting is not None
            self._waiting.result()
        finally:
            self._thread.shutdown()
            self._file.__exit__(None, None, None)
