"""Files that are either whole or not there: a path and what writes it in, a finished file or a plain reason out.

On a disk: written under a temporary name beside it, fsynced, renamed. In an object store (a UPath): written to a local
temporary file and uploaded in one put, as objects appear whole. A full disk or lost rights become a UserError.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

# ---- errors: The one error a user is meant to read: what is wrong, what is allowed, and how to fix it.


class UserError(Exception):
    """A mistake in the input, the configuration or the machine, told so that it can be fixed.

    Args:
        problem: names the thing and the value that is wrong.
        allowed: what would have been right, if that can be said in a line.
        fix: the command or the change that puts it right.
    """

    def __init__(self, problem: str, *, allowed: str | None = None, fix: str | None = None) -> None:
        self.problem, self.allowed, self.fix = problem, allowed, fix
        lines = [problem]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts when the error crosses a process border."""
        return (_rebuild, (self.problem, self.allowed, self.fix))


def _rebuild(problem: str, allowed: str | None, fix: str | None) -> UserError:
    return UserError(problem, allowed=allowed, fix=fix)


TEMPORARY_SUFFIX = ".partial"
_AGAIN = "run the same command again: what is finished is kept"
_FIXES = {
    errno.ENOSPC: "free space there, then {again}",
    errno.EDQUOT: "free space there or have the quota raised, then {again}",
    errno.EFBIG: "raise the limit (`ulimit -f`) or take a file system that holds larger files, then {again}",
    errno.EACCES: "give this user the right to write there, then {again}",
    errno.EPERM: "give this user the right to write there (`lsattr` shows files that are locked), then {again}",
    errno.EROFS: "mount it writable, then {again}",
}
_TOLD_IN_WORDS = ("duckdb", "_duckdb")  # modules whose errors tell the system's reason in their text alone
_SHORT = re.compile(
    r"\d+ requested and \d+ written|failed to offload data block"
)  # NumPy's, and DuckDB's of its spill folder
_partial_tag: ContextVar[str] = ContextVar("partial_tag", default="")


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a local temporary path; on success the file there takes the place of `path` in one step, else it is
    removed.

    A process killed inside the block leaves only `<name>.partial`, which nothing reads and the next try overwrites.
    Without `durable` a power cut soon afterwards may leave a file that is cut: for what is soon made again, and checked.

    Raises:
        UserError: the disk is full or may not be written, for errors of Python, pyarrow and DuckDB inside the block.
    """
    with disk_errors(path):
        if is_remote(path):
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder) / path.name
                with disk_errors(partial):
                    yield partial
                path.fs.put_file(str(partial), path.path)  # type: ignore[attr-defined]  # a UPath
            return
        make_folder(path.parent)
        partial = path.with_name(f"{path.name}{_partial_tag.get()}{TEMPORARY_SUFFIX}")
        try:
            yield partial
            if durable:
                with open(partial, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                partial.unlink(missing_ok=True)
            raise
        if durable:
            fsync_directory(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; on success it takes the place of `path`, which is removed if it was there, else
    it is removed.

    A process killed inside the block leaves only `<name>.partial`, which nothing reads and the next try removes.

    Raises:
        UserError: the disk is full or may not be written.
    """
    partial, old = (path.with_name(f"{path.name}{ending}{TEMPORARY_SUFFIX}") for ending in ("", ".old"))
    with disk_errors(path):
        if old.exists() and not path.exists():  # killed between the two renames
            os.replace(old, path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        make_folder(path.parent)
        partial.mkdir()
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as opened:
                        os.fsync(opened.fileno())
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        fsync_directory(path.parent)


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it, where they are not there.

    Raises:
        UserError: a file or a link that leads nowhere stands in their place, or no folder can be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        taken = next(
            (above for above in (path, *path.parents) if not above.is_dir() and (above.exists() or above.is_symlink())),
            None,
        )
        why = f"the file system makes none there ({error.strerror})"
        if taken is not None:
            why = f"{taken} is {'a link that leads nowhere' if taken.is_symlink() and not taken.exists() else 'a file'}"
        raise UserError(
            f"no folder {path} can be made: {why}", allowed="a folder, there or not yet", fix="name another one"
        ) from error


@contextmanager
def own_partials() -> Iterator[None]:
    """Give temporary files names that no other process has, where two may write the same file at the same time.

    What a killed process leaves is then not overwritten by the next try, but removed by `remove_partials`.
    """
    token = _partial_tag.set("." + secrets.token_hex(6))
    try:
        yield
    finally:
        _partial_tag.reset(token)


def remove_partials(*folders: Path) -> None:
    """Remove the temporary files that killed processes left in `folders`; only under the lock of their OUT."""
    for folder in folders:
        if is_remote(folder) or not folder.is_dir():
            continue
        with disk_errors(folder):
            for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                if path.is_file():
                    path.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and its like, raised while `path` is written, into a UserError that names path, reason and
    fix.

    An error that names a file elsewhere (an input that may not be read) passes as it is.
    """
    try:
        yield
    except Exception as error:
        number = _disk_fault(error)
        named = getattr(error, "filename", None)
        if number is None or (isinstance(named, str) and not _below(named, path.parent)):
            raise
        fix = _FIXES[number].format(again=_AGAIN)
        raise UserError(f"{path} cannot be written: {os.strerror(number)}{_space(path)}", fix=fix) from error


def _disk_fault(error: Exception) -> int | None:
    """The number of the system's reason, if `error` is a disk's fault that a user can fix."""
    if isinstance(error, OSError) and error.errno in _FIXES:
        return error.errno
    if isinstance(error, PermissionError):  # as object stores tell it
        return errno.EACCES
    if isinstance(error, OSError) or type(error).__module__ in _TOLD_IN_WORDS:
        told = (number for number in _FIXES if os.strerror(number) in str(error))
        return next(told, errno.ENOSPC if _SHORT.search(str(error)) else None)
    return None


def _below(named: str, folder: Path) -> bool:
    return is_remote(folder) or Path(os.path.abspath(named)).is_relative_to(os.path.abspath(folder))


def _space(path: Path) -> str:
    if is_remote(path):
        return ""
    try:
        return f" ({shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free)"
    except OSError:
        return ""


def is_remote(path: Path) -> bool:
    """Whether `path` is a UPath of an object store: it has a path's methods, but no place on this machine's disks."""
    return not isinstance(path, Path)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """`path` itself, or for an object a download of it that lasts as long as the block."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with disk_errors(copy):
            path.fs.get_file(path.path, str(copy))  # type: ignore[attr-defined]  # a UPath
        yield copy


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` and put the result in place of `path` in one step."""
    with atomic_write(path) as partial:
        write(partial)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, in one step: equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf8"))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # an object's file reads in the same way


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: 16 hex digits, equal for equal values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- layout: Where everything lies below OUT, the folder or object-store prefix that stage 1 writes and stage 2 reads.


_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # what a Path makes of a URL
_NO_CACHE = ("s3", "s3a", "gs", "gcs")  # file systems that remember listings: other processes write there too


def out_path(text: str) -> Path:
    """OUT as the user names it: a path, or for a URL such as s3://bucket/out a UPath, which has a Path's methods.

    Raises:
        UserError: no file system is known for the URL, or its package is not installed.
    """
    found = _URL.match(text)
    if found is None:
        return Path(text)
    protocol = found.group(1).lower()
    if protocol in ("file", "local"):
        return Path(text[found.end() :])
    from upath import UPath  # LAZY: stage 2 and local builds do without fsspec

    try:
        options: dict[str, Any] = {"use_listings_cache": False} if protocol in _NO_CACHE else {}
        path = UPath(text.rstrip("/"), **options)
        path.fs  # noqa: B018  (makes the file system now)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{text} cannot be opened: {error}", allowed="a local folder, or a URL that fsspec knows"
        ) from None
    return cast(Path, path)


def local_out(text: str | Path) -> Path:
    """OUT for what needs it on this machine's disks: training maps betons into memory.

    Raises:
        UserError: it is a URL; the fix is the command that copies it here.
    """
    found = _URL.match(str(text)) or _COLLAPSED.match(str(text))
    protocol = found.group(1).lower() if found else "file"
    if found is None or protocol in ("file", "local") or (isinstance(text, Path) and text.exists()):
        return out_path(str(text))
    url = f"{protocol}://{str(text)[found.end() :].strip('/')}"
    here = url.rpartition("/")[2]
    copy = f"aws s3 sync {url} {here}" if protocol == "s3" else f"copy {url} to a local folder {here}"
    raise UserError(f"{url} is not on this machine", allowed="a local folder", fix=f"{copy}; then give {here}")


@dataclass(frozen=True)
class Layout:
    """Paths below one OUT; `shard` is a shard's name, `number` a beton's ordinal."""

    out: Path

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"

    @property
    def idf_parquet(self) -> Path:
        return self.out / "idf.parquet"

    @property
    def idf_duckdb(self) -> Path:
        return self.out / "idf.duckdb"

    @property
    def quarantine(self) -> Path:
        return self.out / "quarantine.parquet"

    @property
    def config(self) -> Path:
        return self.out / "config.yaml"

    @property
    def lock(self) -> Path:
        return self.out / ".lock"

    @property
    def labels(self) -> Path:
        return self.out / "labels"

    @property
    def counts(self) -> Path:
        return self.out / "counts"

    @property
    def subset(self) -> Path:
        return self.out / "subset.npy"

    @property
    def pairs(self) -> Path:
        return self.out / "pairs.parquet"

    @property
    def betons(self) -> Path:
        return self.out / "beton"

    @property
    def image_index(self) -> Path:
        """Offset tables of images that stay in their tars; the folder keeps an older name."""
        return self.out / "places"

    @property
    def image_sources(self) -> Path:
        """Paths of the tars that the image index points into; see labels/manifest.py."""
        return self.image_index / "sources.json"

    @property
    def markers(self) -> Path:
        """Completion markers, one JSON a finished unit of work: what makes a rerun skip it."""
        return self.out / "done"

    @property
    def record(self) -> Path:
        """The shards that OUT was made from; see preprocess/stage.py."""
        return self.markers / "inputs.json"

    def label_file(self, shard: str) -> Path:
        return self.labels / f"{shard}.parquet"

    def count_file(self, shard: str) -> Path:
        return self.counts / f"{shard}.parquet"

    def label_marker(self, shard: str) -> Path:
        return self.markers / "labels" / f"{shard}.json"

    def beton_file(self, number: int) -> Path:
        return self.betons / f"{number:05d}.beton"

    def image_index_file(self, number: int) -> Path:
        return self.image_index / f"{number:05d}.npy"

    def beton_marker(self, number: int) -> Path:
        return self.markers / "beton" / f"{number:05d}.json"

    def image_index_marker(self, number: int) -> Path:
        return self.markers / "places" / f"{number:05d}.json"
