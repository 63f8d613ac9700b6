"""A file that is hashed while it is written, past the page cache and by a thread of its own: not read again, no waiting for the disk.

the caller's bytes -> SHA-256, a block that fills up -> the thread: the disk (preprocess/direct.py), while the next block fills up
"""

import hashlib
import io
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.direct import DirectFile, aligned_buffer

_BLOCK_BYTES = 4 << 20


class HashedFile(io.RawIOBase):
    """Written front to back, as pyarrow's writers do; `sha256` of all of it once it is closed.

    Raises:
        OSError: of `write` and `close`: the disk is full, or may not be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._hash, self._file, self._thread = hashlib.sha256(), DirectFile(path), ThreadPoolExecutor(1, "disk")
        self._blocks = [aligned_buffer(_BLOCK_BYTES) for _ in range(2)]
        self._filled = self._written = 0
        self._waiting: Future[None] | None = None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        """Take all bytes of a buffer."""
        with memoryview(data) as view, view.cast("B") as flat:
            self._hash.update(flat)
            rest = np.frombuffer(flat, np.uint8)
            while len(rest):
                some = rest[: _BLOCK_BYTES - self._filled]
                self._blocks[0][self._filled : self._filled + len(some)] = some
                self._filled, rest = self._filled + len(some), rest[len(some) :]
                if self._filled == _BLOCK_BYTES:
                    self._send()
            self._written += len(flat)
            return len(flat)

    def _send(self) -> None:
        """Give the block to the thread, which has to be done with the one before."""
        if self._waiting is not None:
            self._waiting.result()
        self._waiting = self._thread.submit(self._file.write, self._blocks[0][: self._filled])
        self._blocks.reverse()
        self._filled = 0

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._send()
            assert self._waiting is not None
            self._waiting.result()
        finally:
            self._thread.shutdown()
            self._file.__exit__(None, None, None)
            super().close()
