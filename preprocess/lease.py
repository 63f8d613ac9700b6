"""A lock where the kernel keeps none (object stores, file systems without flock): a file that its holder keeps fresh.

The holder writes who it is and rewrites it every REFRESH_S seconds; a lease that was not rewritten for STALE_S seconds
belongs to a dead process and is taken over, with a note on standard error.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from labels.errors import UserError
from labels.files import is_remote, plain_disk_faults

REFRESH_S = 20.0
STALE_S = 120.0
# A signal of our own: a command begun in the background of a script is deaf to an interrupt.
_LOST_SIGNAL = signal.SIGUSR1
WAIT = "wait for it, or stop it, then run the command again"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `started`, `refreshed`: seconds since 1970; `token`: no other holder's."""

    host: str
    process: int
    started: float
    refreshed: float
    token: str

    @classmethod
    def me(cls) -> Self:
        return cls(socket.gethostname(), os.getpid(), time.time(), time.time(), uuid.uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Who stands in a lock file; None if it is not there or empty; an unknown one, long gone, if it is damaged."""
        try:
            # One request: an opened object that its holder rewrites before it is read would be an error.
            raw: bytes = path.fs.cat_file(path.path) if is_remote(path) else path.read_bytes()  # type: ignore[attr-defined]  # a UPath
        except FileNotFoundError:
            return None
        try:
            return cls(**json.loads(raw)) if raw.strip() else None
        except (ValueError, TypeError):
            return cls("unknown", 0, 0.0, 0.0, raw.decode(errors="replace"))

    @property
    def raw(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @property
    def fresh(self) -> bool:
        """Whether a lease of this holder still counts."""
        return time.time() - self.refreshed <= STALE_S

    def __str__(self) -> str:
        return f"(host {self.host}, process {self.process}), for {_told(time.time() - self.started)}"


def busy(path: Path, holder: Holder | None) -> UserError:
    """The error of a second writer. `path`: the lock file."""
    return UserError(f"another process is writing to {path.parent} {holder or '(not known which)'}", mend=WAIT)


def note_dead(path: Path, holder: Holder) -> None:
    """Tell on standard error that the lock at `path` was left by a dead process."""
    print(f"note: {path} was left by a process that ended without releasing it {holder}; taken over", file=sys.stderr, flush=True)


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Hold the lease at `path` for the block; if another process takes it over meanwhile, the block is interrupted.

    Raises:
        UserError: another process holds it; or this one lost it, because it could not be kept fresh.
    """
    mine = Holder.me()
    _acquire(path, mine)
    ended, lost = threading.Event(), threading.Event()

    def interrupt(_number: int, _frame: object) -> None:
        if not ended.is_set():
            raise _Lost

    in_main = threading.current_thread() is threading.main_thread()  # elsewhere no signal can be listened to
    before = signal.signal(_LOST_SIGNAL, interrupt) if in_main else None
    thread = threading.Thread(target=_keep_fresh, args=(path, mine, ended, lost), daemon=True)
    thread.start()
    try:
        yield
    except _Lost:
        raise UserError(
            f"the lock {path} was taken over by another process {Holder.read(path) or ''}: it was not kept fresh for {STALE_S:.0f} s",
            mend="see that only one command writes there, then run it again: what is finished is kept",
        ) from None
    finally:
        ended.set()
        thread.join()
        if in_main:
            signal.signal(_LOST_SIGNAL, before)
        if not lost.is_set():
            path.unlink(missing_ok=True)


class _Lost(BaseException):
    """Raised in the main thread when the lease is another's."""


def _acquire(path: Path, mine: Holder) -> None:
    empty = 0
    while not _create(path, mine.raw):
        there = Holder.read(path)
        if there is None:
            empty += 1
            if empty > 20:  # not just released or not yet written at this very moment: nobody's
                path.unlink(missing_ok=True)
            time.sleep(0.05)
            continue
        if there.fresh:
            raise busy(path, there)
        time.sleep(1.25 * REFRESH_S)  # the clocks of two machines may differ: a live holder rewrites it meanwhile
        if Holder.read(path) == there:
            note_dead(path, there)
            path.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> bool:
    """Write `path` if nothing is there; whether it was written."""
    try:
        with plain_disk_faults(path):
            if is_remote(path):
                path.fs.pipe_file(path.path, content, mode="create")  # type: ignore[attr-defined]  # a UPath
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    file.write(content)
    except FileExistsError:
        return False
    return True


def _keep_fresh(path: Path, mine: Holder, ended: threading.Event, lost: threading.Event) -> None:
    while not ended.wait(REFRESH_S):
        try:
            there = Holder.read(path)
            if there is None or there.token != mine.token:
                lost.set()
                if signal.getsignal(_LOST_SIGNAL) not in (signal.SIG_DFL, signal.SIG_IGN, None):
                    signal.pthread_kill(threading.main_thread().ident or 0, _LOST_SIGNAL)
                return
            path.write_bytes(replace(mine, refreshed=time.time()).raw)
        except OSError:
            continue  # a store that does not answer now may do so in REFRESH_S; if it does not, the lease is lost


def _told(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
