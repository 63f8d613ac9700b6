"""The files of a set, held open by descriptor: checked when they are opened, at a cost by file and not by sample."""

import os
import resource
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from labels import beton
from labels.arrays import Column, open_rows, rows_file
from labels.manifest import IMAGE_SPAN, BetonPart, ShardPart, Source, open_image_index
from labels.storage import UserError

_OTHER_OPEN_FILES = 512


class OpenFiles:
    """Descriptors that are closed when this object is: at the latest with the process."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self.close = weakref.finalize(self, _close_all, self._open)

    def open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.add(descriptor)
        return descriptor

    def shut(self, descriptor: int) -> None:
        """Close one of them early."""
        self._open.discard(descriptor)
        os.close(descriptor)

    def beton(self, path: Path, part: BetonPart, label_limit: int, rebuild: str) -> int:
        """Open a beton after checking size, version, fields and counts; its descriptor.

        Raises:
            UserError: it is not the file of the manifest; `rebuild` is the fix.
        """
        if not path.is_file():
            raise UserError(f"{path} is missing", fix=rebuild)
        descriptor = self.open(path)
        size = os.fstat(descriptor).st_size
        if size != part.bytes:
            raise UserError(
                f"{path} has {size} bytes, in the manifest {part.bytes}: it was cut or replaced", fix=rebuild
            )
        header, fields = _head(os.pread(descriptor, beton.METADATA_OFFSET, 0))
        if header["version"] != beton.VERSION:
            raise UserError(f"{path} is of beton version {header['version']}", allowed=str(beton.VERSION), fix=rebuild)
        names = tuple(field["name"].tobytes().rstrip(b"\0").decode("utf8", "replace") for field in fields)
        if (
            header["num_fields"] != len(fields)
            or names != beton.FIELD_NAMES
            or tuple(fields["type_id"]) != beton.FIELD_TYPES
        ):
            raise UserError(
                f"{path} has the fields {', '.join(names)}", allowed=", ".join(beton.FIELD_NAMES), fix=rebuild
            )
        if header["num_samples"] != part.samples or beton.label_limit_of(fields) != label_limit:
            raise UserError(
                f"{path} holds {header['num_samples']} samples of {beton.label_limit_of(fields)} labels; in the manifest "
                f"{part.samples} of {label_limit}",
                fix=rebuild,
            )
        table_end = int(header["alloc_table_ptr"]) + 2 * part.samples * beton.ALLOCATION.itemsize
        if table_end != size:
            raise UserError(f"{path}: its allocation table ends at byte {table_end}, the file at {size}", fix=rebuild)
        return descriptor

    def image_index(self, path: Path, part: BetonPart, rebuild: str) -> tuple[int, int]:
        """Open an image index file: descriptor, and offset of its first row.

        Raises:
            UserError: it is not the file of the manifest; `rebuild` is the fix.
        """
        spans = open_image_index(path)
        if len(spans) != part.samples:
            raise UserError(f"{path} holds {len(spans)} images, in the manifest {part.samples}", fix=rebuild)
        return self.open(path), path.stat().st_size - len(spans) * IMAGE_SPAN.itemsize

    def tar(self, name: str, source: Source | None, sources: Path) -> tuple[int, int]:
        """Open the tar of one shard: descriptor and length in bytes.

        Raises:
            UserError: it is not where `sources` (sources.json) says, or of another length.
        """
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
                f"{path} has {size} bytes, and had {source.bytes} when its image index was made: it was cut or replaced",
                fix="put the old file back, or run the build-labels command again",
            )
        return descriptor, size

    def rows(self, out: Path, part: ShardPart, label_limit: int, column: Column = "label_ids") -> tuple[int, int]:
        """Open the label array of one shard: descriptor, and offset of its first row.

        Raises:
            UserError: it is not there or not whole.
        """
        path, rows = rows_file(out, part, column), open_rows(out, part, label_limit, column)
        if rows is None:
            raise UserError(
                f"{path} is missing or not whole",
                allowed="an array of label rows, made from the label file of the same name",
                fix="start `train run` again, which makes it; the folder has to be one that all nodes write to or each node its own",
            )
        return self.open(path), rows.offset


def _close_all(descriptors: set[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _head(data: bytes) -> tuple[np.void, np.ndarray]:
    padded = np.frombuffer(data.ljust(beton.METADATA_OFFSET, b"\0"), np.uint8)
    return padded[: beton.HEADER.itemsize].view(beton.HEADER)[0], padded[beton.HEADER.itemsize :].view(beton.FIELD)


def allow_open_files(files: int) -> None:
    """Raise this process's own limit of open files, as far as the system lets it.

    Raises:
        UserError: it does not let it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + _OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"the betons and label arrays are {files} files to hold open, the system allows this process {hard}",
            allowed=f"a limit of {wanted} open files",
            fix=f"raise the hard limit of open files (`ulimit -Hn {wanted}` as root, or `nofile` in /etc/security/limits.conf)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# ---- threads: A pool of threads that ends with its `with` block: what has not begun is dropped, what has begun is
# waited for.


class Threads(ThreadPoolExecutor):
    """ThreadPoolExecutor(number, name) that leaves nothing behind, whatever ends the block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(wait=True, cancel_futures=True)
