"""Betons of object stores, brought to this machine ahead of their turn: a bounded cache, shared by all processes,
checked.

s3://bucket/out/beton/00007.beton -> size, SHA-256 -> CACHE/<SHA-256>.beton -> a descriptor in the set's tables

A file has a lock beside it, held while it is fetched, opened or removed. What is open may be removed: it lasts until it
    is closed.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from labels.manifest import BetonPart
from labels.storage import TEMPORARY_SUFFIX, UserError, atomic_write, is_remote, make_folder
from train.data.files import OpenFiles, Threads
from train.data.image_index import NO_FILE, Tables

_CHUNK_BYTES = 1 << 23
_AT_ONCE = 4
_WAIT_S = 0.05


@dataclass(frozen=True)
class Cache:
    """A folder, and how many bytes of betons it may hold."""

    folder: Path
    bytes: int

    @contextmanager
    def open(self, source: Path, part: BetonPart) -> Iterator[Path]:
        """The local copy of a beton, fetched if it is not there; it stays until the block ends.

        Raises:
            UserError: it cannot be fetched, or is not the file of the manifest.
        """
        target = self.folder / f"{part.sha256}.beton"
        make_folder(self.folder)
        with _lock(target):
            if not target.is_file() or target.stat().st_size != part.bytes:
                while not self._reserve(target, part.bytes):
                    time.sleep(_WAIT_S)  # what others fetch just now can go when they have opened it
                with atomic_write(target, durable=False) as partial:
                    _fetch(source, part, partial)
            os.utime(target)  # the least recently used goes first
            yield target

    def _reserve(self, target: Path, wanted: int) -> bool:
        """Remove what was used least recently until `wanted` bytes fit, and take that room; False while locked files
        are in the way.
        """
        with _lock(self.folder / "room"):
            files = self._held()
            total = sum(found.st_size for found, _ in files)
            for found, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
                if total + wanted <= self.bytes:
                    break
                with _lock(self.folder / f"{path.name.partition('.')[0]}.beton", wait=False) as free:
                    if free:
                        with suppress(
                            FileNotFoundError
                        ):  # fetched to its end meanwhile: it is there under another name, and counts
                            path.unlink()
                            total -= found.st_size
            if total + wanted > self.bytes:
                return False
            partial = target.with_name(target.name + TEMPORARY_SUFFIX)
            partial.touch()
            os.truncate(partial, wanted)  # so that others count its room
            return True

    def _held(self) -> list[tuple[os.stat_result, Path]]:
        """All copies, whole and half fetched."""
        while True:
            try:
                return [(path.stat(), path) for path in self.folder.glob("*.beton*") if path.suffix != ".lock"]
            except FileNotFoundError:
                # fetched to its end meanwhile, so that it bears another name: looked at again, or it would not be
                # counted
                continue


class Staging:
    """Brings the betons of a set here and closes them again; used by many threads.

    Args:
        parts, paths: the set's files of samples; those that are not remote are left alone.
        tables: of the set; the descriptors in it come and go.
        files: what is open.
        open_copy: opens the copy of a file, by its number, after checking it.
        cache: where to.

    Raises:
        UserError: two betons do not fit the cache.
    """

    def __init__(
        self,
        parts: Sequence[BetonPart],
        paths: Sequence[Path],
        tables: Tables,
        files: OpenFiles,
        open_copy: Callable[[int, Path], int],
        cache: Cache,
    ) -> None:
        self._parts, self._paths, self._tables, self._files = parts, paths, tables, files
        self._open_copy, self._cache = open_copy, cache
        self.remote = frozenset(number for number, path in enumerate(paths) if is_remote(path))
        largest = max(parts[number].bytes for number in self.remote)
        if 2 * largest > cache.bytes:
            raise UserError(
                f"train.data.cache_size is {cache.bytes:,} bytes, the largest beton {largest:,}",
                allowed=f"{2 * largest:,} or more",
            )
        self._lock = threading.Lock()  # of all that follows
        self._bringing = [threading.Lock() for _ in parts]
        self._held: Counter[int] = Counter()
        self._open: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @contextmanager
    def held(self, numbers: Sequence[int]) -> Iterator[None]:
        """Betons that are here until the block ends."""
        with self._lock:
            self._held.update(numbers)
        try:
            self.bring(numbers)
            yield
        finally:
            with self._lock:
                self._held.subtract(numbers)

    def bring(self, numbers: Sequence[int]) -> None:
        """Have betons here; they may go again when others need the room."""
        missing = [number for number in numbers if number in self.remote and not self._touch(number)]
        if missing:
            with Threads(min(_AT_ONCE, len(missing)), "fetch") as pool:
                list(pool.map(self._bring, missing))

    def _touch(self, number: int) -> bool:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return True
            return False

    def _bring(self, number: int) -> None:
        with self._bringing[number]:
            if self._touch(number):
                return
            part = self._parts[number]
            with self._cache.open(self._paths[number], part) as copy:
                file = self._open_copy(number, copy)
            with self._lock:
                self._close_old(part.bytes)
                self._tables.files[number] = file
                self._open[number] = None

    def _close_old(self, wanted: int) -> None:
        """Close what was used least recently, as a removed file keeps its room on the disk until then."""
        total = wanted + sum(self._parts[number].bytes for number in self._open)
        for number in list(self._open):
            if total <= self._cache.bytes:
                return
            if self._held[number] <= 0:
                self._files.shut(int(self._tables.files[number]))
                self._tables.files[number] = NO_FILE
                del self._open[number]
                total -= self._parts[number].bytes


@contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `<path>.lock` among processes and threads; False where it is taken and we do not wait."""
    with open(f"{path}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _fetch(source: Path, part: BetonPart, target: Path) -> None:
    fix = f"run `preprocess verify` on the OUT of {source}; copy it again if it is whole"
    digest, size = hashlib.sha256(), 0
    try:
        with source.open("rb") as remote, open(target, "r+b") as local:
            while chunk := remote.read(_CHUNK_BYTES):
                digest.update(chunk)
                local.write(chunk)
                size += len(chunk)
    except FileNotFoundError:
        raise UserError(f"{source} is missing", fix=fix) from None
    if size != part.bytes or digest.hexdigest() != part.sha256:
        raise UserError(
            f"{source} has {size} bytes and SHA-256 {digest.hexdigest()[:16]}..., in the manifest {part.bytes} bytes and "
            f"{part.sha256[:16]}...",
            fix=fix,
        )
