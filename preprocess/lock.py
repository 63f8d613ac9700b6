"""Who may write to OUT: one run alone, or the members i/n of an array job side by side.

`only_writer` holds OUT/.lock exclusively; `one_of_many` holds it shared, and OUT/.lock-<i>-of-<n> exclusively. The kernel
drops these locks when their holder ends, however it ends; a name that then still stands in the file is a dead one's.
Where the kernel has no locks, a lease stands for each of them (lease.py).
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from labels.errors import UserError
from labels.files import is_remote, make_folder, plain_disk_faults
from preprocess.lease import WAIT, Holder, busy, leased, note_dead

_MEMBER = re.compile(r"-[0-9]+-of-([0-9]+)")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # e.g. Lustre mounted without -o flock


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` alone for the block.

    Raises:
        UserError: another process holds it; names its host, process and age.
    """
    with ExitStack() as held:
        kernel = _hold(held, path, fcntl.LOCK_EX)
        if not kernel:
            held.enter_context(leased(path))
        for member in _members(path):
            holder = Holder.read(member)
            if not kernel and holder and holder.fresh:
                raise busy(path, holder)
            if holder:
                note_dead(member, holder)
            member.unlink(missing_ok=True)
        yield


@contextmanager
def one_of_many(path: Path, i: int, n: int) -> Iterator[None]:
    """Hold member `i` of `n` for the block, beside the other members.

    Args:
        path: the lock file that a run without `--shard` holds.
        i: this member's number.
        n: how many members write to the same OUT.

    Raises:
        UserError: a run without `--shard`, the same member, or a member of another n is writing; names it.
    """
    member = path.with_name(f"{path.name}-{i}-of-{n}")
    with ExitStack() as held:
        kernel = _hold(held, path, fcntl.LOCK_SH)
        if kernel:
            _hold(held, member, fcntl.LOCK_EX)
        else:
            held.enter_context(leased(member))
            # Looked at after our own is there: of two that come at the same moment, one at least sees the other.
            if (alone := Holder.read(path)) and alone.fresh:
                raise busy(path, alone)
        for other in _members(path):
            if _of(path, other) != n and (holder := Holder.read(other)) and (_is_held(other) if kernel else holder.fresh):
                raise UserError(
                    f"another process is writing to {path.parent} as {other.name.removeprefix(path.name + '-')} {holder}",
                    allowed=f"members of {n} beside this one ({i} of {n})",
                    mend=WAIT,
                )
        yield


def _hold(held: ExitStack, path: Path, mode: int) -> bool:
    """Put a kernel lock on `path` into `held`; False where there are none. The name of its holder stands in it meanwhile."""
    if is_remote(path):
        return False
    try:
        descriptor = _locked(path, mode)
    except BlockingIOError:
        raise busy(path, _named(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        with suppress(FileNotFoundError):
            if path.stat().st_size == 0:  # made by the try
                path.unlink()
        return False
    held.callback(os.close, descriptor)
    if dead := Holder.read(path):
        note_dead(path, dead)
    os.ftruncate(descriptor, 0)
    if mode == fcntl.LOCK_EX:
        with plain_disk_faults(path):
            os.pwrite(descriptor, Holder.me().raw, 0)
            os.fsync(descriptor)  # other machines read it too
        held.callback(_release, descriptor, path)
    return True


def _locked(path: Path, mode: int) -> int:
    """A descriptor of `path` that holds the lock."""
    while True:
        with plain_disk_faults(path):
            make_folder(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a member removed its file between the two calls


def _release(descriptor: int, path: Path) -> None:
    os.ftruncate(descriptor, 0)
    if _MEMBER.search(path.name):
        path.unlink(missing_ok=True)


def _members(path: Path) -> list[Path]:
    """The lock files of array members beside `path`."""
    return sorted(other for other in path.parent.glob(f"{path.name}-*-of-*") if _of(path, other))


def _of(path: Path, other: Path) -> int | None:
    found = _MEMBER.fullmatch(other.name.removeprefix(path.name))
    return int(found.group(1)) if found else None


def _is_held(path: Path) -> bool:
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def _named(path: Path) -> Holder | None:
    """Who holds `path`: it names the one that holds it alone, each array member stands in a file of its own."""
    return Holder.read(path) or next((holder for member in _members(path) if (holder := Holder.read(member))), None)
