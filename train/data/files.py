"""The open files of a training set: checked descriptors, and a cache of betons from object stores.

    beton, image index, tar, label array -> OpenFiles: checked once a file, not once a sample -> descriptor
    s3://bucket/out/beton/00007.beton -> Staging -> Cache: CACHE/<SHA-256>.beton, size and SHA-256 checked -> descriptor

Files are read by position (pread), not mapped: a truncated mapped file kills the process with SIGBUS, a short read is
an error that names the file. It costs one copy of the JPEG's bytes.
"""

import fcntl
import hashlib
import os
import resource
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labels import beton
from labels.arrays import Column, open_rows, rows_file
from labels.manifest import IMAGE_SPAN, BetonPart, ShardPart, Source, open_image_index
from labels.storage import TEMPORARY_SUFFIX, UserError, atomic_write, is_remote, make_folder
from train.data.image_index import NO_FILE, Tables

_OTHER_OPEN_FILES = 512
_CHUNK_BYTES = 1 << 23
_PARALLEL_DOWNLOADS = 4
_WAIT_S = 0.05


class Threads(ThreadPoolExecutor):
    """ThreadPoolExecutor(number, name) whose block drops what has not begun and waits for what has, however it ends."""

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


class OpenFiles:
    """Descriptors that are closed with this object, at the latest with the process.

    Its methods raise UserError for a file that is missing or not the one of the manifest; `rebuild` is the fix.
    """

    def __init__(self) -> None:
        self._descriptors: set[int] = set()
        self.close = weakref.finalize(self, _close_all, self._descriptors)

    def open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.add(descriptor)
        return descriptor

    def close_file(self, descriptor: int) -> None:
        self._descriptors.discard(descriptor)
        os.close(descriptor)

    def beton(self, path: Path, part: BetonPart, label_limit: int, rebuild: str) -> int:
        """The descriptor of a beton whose size, version, fields and counts are as in the manifest."""
        if not path.is_file():
            raise UserError(f"{path} is missing", fix=rebuild)
        descriptor = self.open(path)
        size = os.fstat(descriptor).st_size
        head = np.frombuffer(
            os.pread(descriptor, beton.METADATA_OFFSET, 0).ljust(beton.METADATA_OFFSET, b"\0"), np.uint8
        )
        header = head[: beton.HEADER.itemsize].view(beton.HEADER)[0]
        fields = head[beton.HEADER.itemsize :].view(beton.FIELD)
        names = tuple(field["name"].tobytes().rstrip(b"\0").decode("utf8", "replace") for field in fields)
        types = tuple(fields["type_id"])
        samples, labels = header["num_samples"], beton.label_limit_of(fields)
        table_end = int(header["alloc_table_ptr"]) + 2 * part.samples * beton.ALLOCATION.itemsize
        allowed, problem = None, None
        if size != part.bytes:
            problem = f" has {size} bytes, in the manifest {part.bytes}: it was cut or replaced"
        elif header["version"] != beton.VERSION:
            problem, allowed = f" is of beton version {header['version']}", str(beton.VERSION)
        elif header["num_fields"] != len(fields) or names != beton.FIELD_NAMES or types != beton.FIELD_TYPES:
            problem, allowed = f" has the fields {', '.join(names)}", ", ".join(beton.FIELD_NAMES)
        elif samples != part.samples or labels != label_limit:
            expected = f"in the manifest {part.samples} of {label_limit}"
            problem = f" holds {samples} samples of {labels} labels; {expected}"
        elif table_end != size:
            problem = f": its allocation table ends at byte {table_end}, the file at {size}"
        if problem:
            raise UserError(f"{path}{problem}", allowed=allowed, fix=rebuild)
        return descriptor

    def image_index(self, path: Path, part: BetonPart, rebuild: str) -> tuple[int, int]:
        """Descriptor of an image index, and the offset of its first row."""
        spans = open_image_index(path)
        if len(spans) != part.samples:
            raise UserError(f"{path} holds {len(spans)} images, in the manifest {part.samples}", fix=rebuild)
        return self.open(path), path.stat().st_size - len(spans) * IMAGE_SPAN.itemsize

    def tar(self, name: str, source: Source | None, sources: Path) -> tuple[int, int]:
        """Descriptor and length in bytes of the tar of one shard; `sources` is the path of sources.json."""
        if source is None:
            raise UserError(f"{sources} does not say where the tar of shard {name} is", fix=f"add it to {sources}")
        path = Path(source.path)
        try:
            descriptor = self.open(path)
        except OSError as error:
            raise UserError(
                f"{path}, the tar of shard {name}, cannot be opened: {error.strerror}",
                fix=f"put it back, or say in {sources} where it is",
            ) from None
        size = os.fstat(descriptor).st_size
        if size != source.bytes:
            raise UserError(
                f"{path} has {size} bytes, and had {source.bytes} when its image index was made: cut or replaced",
                fix="put the old file back, or run the build-labels command again",
            )
        return descriptor, size

    def label_array(self, out: Path, part: ShardPart, label_limit: int, column: Column) -> tuple[int, int]:
        """Descriptor of the label array of one shard, and the offset of its first row."""
        path, rows = rows_file(out, part, column), open_rows(out, part, label_limit, column)
        if rows is None:
            raise UserError(
                f"{path} is missing or incomplete",
                allowed="an array of label rows, made from the label file of the same name",
                fix="start `train run` again, which makes it; all nodes write to this folder, or each node has its own",
            )
        return self.open(path), rows.offset


def _close_all(descriptors: set[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def allow_open_files(files: int) -> None:
    """Raise this process's soft limit of open files as needed; UserError where the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + _OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"the betons and label arrays are {files} files to hold open, the system allows this process {hard}",
            allowed=f"a limit of {wanted} open files",
            fix=f"raise the hard limit (`ulimit -Hn {wanted}` as root, or `nofile` in /etc/security/limits.conf)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True)
class Cache:
    """A folder of betons from object stores, shared by all processes, and how many bytes it may hold.

    A file's lock is held while it is fetched, opened or removed. An open file may be removed: it lasts until closed.
    """

    folder: Path
    bytes: int

    @contextmanager
    def open(self, source: Path, part: BetonPart) -> Iterator[Path]:
        """The local copy of a beton, fetched if it is missing; it stays until the block ends.

        Raises UserError where it cannot be fetched or is not the file of the manifest.
        """
        target = self.folder / f"{part.sha256}.beton"
        make_folder(self.folder)
        with _lock(target):
            if not target.is_file() or target.stat().st_size != part.bytes:
                while not self._reserve(target, part.bytes):
                    time.sleep(_WAIT_S)  # other processes' downloads can be removed once they have opened them
                with atomic_write(target, durable=False) as partial:
                    _download(source, part, partial)
            os.utime(target)  # the least recently used is removed first
            yield target

    def _reserve(self, target: Path, wanted: int) -> bool:
        """Remove the least recently used until `wanted` bytes fit; reserve them. False if locked files prevent it."""
        with _lock(self.folder / "room"):
            copies = self._copies()
            total = sum(stat.st_size for stat, _ in copies)
            for stat, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
                if total + wanted <= self.bytes:
                    break
                with _lock(self.folder / f"{path.name.partition('.')[0]}.beton", wait=False) as free:
                    if free:
                        with suppress(FileNotFoundError):  # its download ended: it has another name, and counts
                            path.unlink()
                            total -= stat.st_size
            if total + wanted > self.bytes:
                return False
            partial = target.with_name(target.name + TEMPORARY_SUFFIX)
            partial.touch()
            os.truncate(partial, wanted)  # so that others count its bytes
            return True

    def _copies(self) -> list[tuple[os.stat_result, Path]]:
        """All copies, complete and partial."""
        while True:
            # A download that ends meanwhile renames its file: list again, or it would not be counted.
            with suppress(FileNotFoundError):
                return [(path.stat(), path) for path in self.folder.glob("*.beton*") if path.suffix != ".lock"]


class Staging:
    """Fetches the remote betons of a set ahead of their turn and closes them again; used by many threads.

    `parts` and `paths` are the set's sample files; `open_copy(number, path)` checks and opens a copy, whose descriptor
    goes to `tables.files`. Raises UserError where two betons do not fit the cache.
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
        self._fetching = [threading.Lock() for _ in parts]
        self._lock = threading.Lock()  # guards the two below and tables.files
        self._held: Counter[int] = Counter()
        self._open: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @contextmanager
    def held(self, numbers: Sequence[int]) -> Iterator[None]:
        """Keep these betons open until the block ends."""
        with self._lock:
            self._held.update(numbers)
        try:
            self.fetch(numbers)
            yield
        finally:
            with self._lock:
                self._held.subtract(numbers)

    def fetch(self, numbers: Sequence[int]) -> None:
        """Have these betons open; without `held` they may be closed again for others."""
        missing = [number for number in numbers if number in self.remote and not self._is_open(number)]
        if missing:
            with Threads(min(_PARALLEL_DOWNLOADS, len(missing)), "fetch") as pool:
                list(pool.map(self._fetch_beton, missing))

    def _is_open(self, number: int) -> bool:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return True
            return False

    def _fetch_beton(self, number: int) -> None:
        with self._fetching[number]:
            if self._is_open(number):
                return
            part = self._parts[number]
            with self._cache.open(self._paths[number], part) as copy:
                file = self._open_copy(number, copy)
            with self._lock:
                self._close_old(part.bytes)
                self._tables.files[number] = file
                self._open[number] = None

    def _close_old(self, wanted: int) -> None:
        """Close the least recently used: a removed file occupies the disk until it is closed."""
        total = wanted + sum(self._parts[number].bytes for number in self._open)
        for number in list(self._open):
            if total <= self._cache.bytes:
                return
            if self._held[number] <= 0:
                self._files.close_file(int(self._tables.files[number]))
                self._tables.files[number] = NO_FILE
                del self._open[number]
                total -= self._parts[number].bytes


@contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `<path>.lock` among processes and threads; without `wait`, False where it is taken."""
    with open(f"{path}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _download(source: Path, part: BetonPart, target: Path) -> None:
    fix = f"run `preprocess verify` on the output folder of {source}; copy it again if that finds no fault"
    digest, size = hashlib.sha256(), 0
    try:
        with source.open("rb") as remote, open(target, "r+b") as local:
            while chunk := remote.read(_CHUNK_BYTES):
                digest.update(chunk)
                local.write(chunk)
                size += len(chunk)
    except FileNotFoundError:
        raise UserError(f"{source} is missing", fix=fix) from None
    sha256 = digest.hexdigest()
    if size != part.bytes or sha256 != part.sha256:
        expected = f"{part.bytes} bytes and {part.sha256[:16]}..."
        raise UserError(f"{source} has {size} bytes and SHA-256 {sha256[:16]}..., in the manifest {expected}", fix=fix)
