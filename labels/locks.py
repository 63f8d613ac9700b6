"""Who may write to a folder: one build or training run alone, or the members i/n of an array job at the same time.

    only_writer    holds .lock exclusively                               a build without --shard; a training run
    one_of_many    holds .lock shared, .lock-<i>-of-<n> exclusively      member i of n; members of another n are refused

A lock is flock's, which the kernel releases when its holder ends in any way. On object stores and file systems without
flock it is a lease: a file that its holder rewrites every REFRESH_S seconds, abandoned if it is older than STALE_S
seconds. A lock file names its holder. The library filelock has neither shared locks nor leases on object stores.
"""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from labels.show.terminal import visible
from labels.storage import UserError, disk_errors, is_remote, make_folder

REFRESH_S = 20.0
STALE_S = 120.0
# Not SIGINT: a command that a script starts in the background ignores it.
_LOST_SIGNAL = signal.SIGUSR1
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # e.g. Lustre mounted without -o flock
_WAIT = "wait for it, or stop it, then run the command again"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as its file names it."""

    host: str
    process: int
    started: float  # seconds since 1970
    refreshed: float  # seconds since 1970
    token: str  # unique

    @classmethod
    def me(cls) -> Self:
        return cls(socket.gethostname(), os.getpid(), time.time(), time.time(), uuid.uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The holder that a lock file names; None if it is absent or empty; host `unknown` if it is damaged."""
        try:
            # One request: open, then read fails if the holder rewrites the object in between.
            store = path.fs if is_remote(path) else None  # type: ignore[attr-defined]
            raw: bytes = store.cat_file(path.path) if store else path.read_bytes()  # type: ignore[attr-defined]
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
        """Whether a lease of this holder is valid."""
        return time.time() - self.refreshed <= STALE_S

    def __str__(self) -> str:
        age = max(time.time() - self.started, 0)
        unit, length = next(((u, s) for u, s in (("days", 86400), ("h", 3600), ("min", 60)) if age >= 2 * s), ("s", 1))
        return f"(host {self.host}, process {self.process}), for {age / length:.0f} {unit}"


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` alone for the block. UserError: another process holds it, or a member's lock."""
    with _locked(path, fcntl.LOCK_EX):
        for member in _members(path):
            if _is_held(member):
                raise _busy(member)
            _note_abandoned(member)
            member.unlink(missing_ok=True)
        yield


@contextmanager
def one_of_many(path: Path, i: int, n: int) -> Iterator[None]:
    """Hold the lock of member `i` of `n` for the block, while other members may write; `path` is the lock of a build
    without `--shard`. UserError: such a build, the same member, or a member of another n is writing.
    """
    with _locked(path, fcntl.LOCK_SH), _locked(path.with_name(f"{path.name}-{i}-of-{n}"), fcntl.LOCK_EX):
        # Checked after our own lock exists: of two leases that start at once, at least one sees the other.
        if _is_held(path):
            raise _busy(path)
        for member, count in _members(path).items():
            if count != n and _is_held(member):
                name = member.name.removeprefix(f"{path.name}-")
                raise UserError(
                    f"another process is writing to {path.parent} as {name} {Holder.read(member)}",
                    allowed=f"members of {n} next to this one ({i} of {n})",
                    fix=_WAIT,
                )
        yield


def _members(path: Path) -> dict[Path, int]:
    """The lock files of array members in the folder of `path`, each with its n."""
    files = sorted(path.parent.glob(f"{path.name}-*-of-*"))
    matches = [(file, re.fullmatch(r"-[0-9]+-of-([0-9]+)", file.name.removeprefix(path.name))) for file in files]
    return {file: int(match[1]) for file, match in matches if match}


def _busy(path: Path) -> UserError:
    holders = filter(
        None, map(Holder.read, [path, *_members(path)])
    )  # a shared lock names no holder: the members' files do
    holder = next(holders, "(host and process unknown)")
    return UserError(f"another process is writing to {path.parent} {holder}", fix=_WAIT)


def _note_abandoned(path: Path) -> None:
    if holder := Holder.read(path):
        note = visible(f"note: {path} was left by a process that ended without releasing it {holder}; taken over")
        print(note, file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path, mode: int) -> Iterator[None]:
    """Hold the lock file at `path`; without flock: a lease if `mode` is exclusive, nothing if it is shared."""
    descriptor = None if is_remote(path) else _flock(path, mode)
    if descriptor is None:
        with leased(path) if mode == fcntl.LOCK_EX else nullcontext():
            yield
        return
    try:
        _note_abandoned(path)
        os.ftruncate(descriptor, 0)
        if mode == fcntl.LOCK_EX:
            with disk_errors(path):
                os.pwrite(descriptor, Holder.me().raw, 0)
                os.fsync(descriptor)  # other machines read it too
        yield
    finally:
        if mode == fcntl.LOCK_EX:
            os.ftruncate(descriptor, 0)
        if "-of-" in path.name:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _flock(path: Path, mode: int) -> int | None:
    """A descriptor of `path` that holds the kernel's lock; None if the file system has no flock."""
    while True:
        with disk_errors(path):
            make_folder(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # a member removed its file between open and flock
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise _busy(path) from None
            if error.errno not in _NO_FLOCK:
                raise
            if not Holder.read(path):
                path.unlink(missing_ok=True)  # this attempt created it
            return None


def _is_held(path: Path) -> bool:
    """Whether a process holds the file exclusively; tested with a shared lock: several processes can test at once."""
    if not is_remote(path):
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except (BlockingIOError, FileNotFoundError) as error:
            return isinstance(error, BlockingIOError)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
    holder = Holder.read(path)
    return holder is not None and holder.fresh


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Hold the lease at `path` for the block; if another process takes it over, the block is interrupted.

    UserError: another process holds it, or took it over because this one could not refresh it.
    """
    mine = Holder.me()
    _create_lease(path, mine)
    ended, lost = threading.Event(), threading.Event()

    def interrupt(_number: int, _frame: object) -> None:
        if not ended.is_set():
            raise _Lost

    # Other threads cannot handle signals; a handler that is there already, the trainer's, saves and stops the run.
    in_main = threading.current_thread() is threading.main_thread() and not callable(signal.getsignal(_LOST_SIGNAL))
    previous = signal.signal(_LOST_SIGNAL, interrupt) if in_main else None
    thread = threading.Thread(target=_refresh, args=(path, mine, ended, lost), daemon=True)
    thread.start()
    try:
        yield
    except _Lost:
        holder = Holder.read(path) or ""
        raise UserError(
            f"the lock {path} was taken over by another process {holder}: it was not refreshed for {STALE_S:.0f} s",
            fix="make sure that only one command writes there, then run it again: finished parts are kept",
        ) from None
    finally:
        ended.set()
        thread.join()
        if in_main:
            signal.signal(_LOST_SIGNAL, previous)
        if not lost.is_set():
            path.unlink(missing_ok=True)


class _Lost(BaseException):
    """Raised in the main thread when another process has taken the lease."""


def _create_lease(path: Path, mine: Holder) -> None:
    empty = 0
    while not _create(path, mine.raw):
        holder = Holder.read(path)
        if holder is None:
            empty += 1
            if empty > 20:  # neither just released nor about to be written: abandoned
                path.unlink(missing_ok=True)
            time.sleep(0.05)
        elif holder.fresh:
            raise _busy(path)
        else:
            time.sleep(1.25 * REFRESH_S)  # clocks of machines differ: a live holder rewrites it meanwhile
            if Holder.read(path) == holder:
                _note_abandoned(path)
                path.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> bool:
    """Write `path` unless it exists; True if it was written."""
    try:
        with disk_errors(path):
            if is_remote(path):
                path.fs.pipe_file(path.path, content, mode="create")  # type: ignore[attr-defined]  # a UPath
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    file.write(content)
    except FileExistsError:
        return False
    return True


def _refresh(path: Path, mine: Holder, ended: threading.Event, lost: threading.Event) -> None:
    while not ended.wait(REFRESH_S):
        with suppress(OSError):  # try again after REFRESH_S; if the store never answers, the lease is lost
            holder = Holder.read(path)
            if holder is None or holder.token != mine.token:
                lost.set()
                if signal.getsignal(_LOST_SIGNAL) not in (signal.SIG_DFL, signal.SIG_IGN, None):
                    signal.pthread_kill(threading.main_thread().ident or 0, _LOST_SIGNAL)
                return
            path.write_bytes(replace(mine, refreshed=time.time()).raw)
