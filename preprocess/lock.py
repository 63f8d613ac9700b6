"""One writer at a time: an advisory lock on OUT that the kernel drops when its holder ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labels.errors import UserError


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` for the block.

    Raises:
        UserError: another process holds it; names its host and process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"another process is writing to {path.parent} ({holder})", mend="wait for it, or stop it, then run the command again"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
