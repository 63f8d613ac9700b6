"""Atomic writes, remote files, the paths of an output folder, and UserError, the error that users read.

atomic_write(path): `<name>.partial` next to it -> fsync -> rename; in an object store (a UPath) a local temporary
file -> one put. A full disk or missing rights become a UserError (`disk_errors`).
user_path("s3://bucket/out") -> UPath; Layout(out): every path below the output folder
"""

import codecs
import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast


class UserError(Exception):
    """A mistake in the input, the configuration or the machine: what is wrong with which value, what is allowed, and
    the command or change that fixes it.
    """

    def __init__(self, problem: str, *, allowed: str | None = None, fix: str | None = None) -> None:
        self.problem, self.allowed, self.fix = problem, allowed, fix
        more = [f"\n  {name}: {text}" for name, text in (("allowed", allowed), ("fix", fix)) if text]
        super().__init__(problem + "".join(more))

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts when the error crosses a process border."""
        return (_rebuild, (self.problem, self.allowed, self.fix))


def _rebuild(problem: str, allowed: str | None, fix: str | None) -> UserError:
    return UserError(problem, allowed=allowed, fix=fix)


TEMPORARY_SUFFIX = ".partial"
LONGEST_NAME = 255  # bytes, of the usual file systems
_AGAIN = "run the same command again: what is finished is kept"
_FIXES = {
    errno.ENOSPC: "free space there, then {again}",
    errno.EDQUOT: "free space there or have the quota raised, then {again}",
    errno.EFBIG: "raise the limit (`ulimit -f`) or take a file system that holds larger files, then {again}",
    errno.EACCES: "give this user the right to write there, then {again}",
    errno.EPERM: "give this user the right to write there (`lsattr` shows files that are locked), then {again}",
    errno.EROFS: "mount it writable, then {again}",
}
# Packages whose errors give the system's reason only in their text.
_REASON_IN_TEXT = ("duckdb", "_duckdb", "safetensors")
# NumPy's, and DuckDB's about its spill folder
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written|failed to offload data block")
_partial_tag: ContextVar[str] = ContextVar("partial_tag", default="")


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a local temporary path; on success it replaces `path` in one step, on an error it is removed.

    A process killed inside the block leaves only `<name>.partial`, which nothing reads and the next attempt overwrites.
    Without `durable` a power cut may leave a truncated file: only for caches that are checked when they are read.
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
        ending = f"{_partial_tag.get()}{TEMPORARY_SUFFIX}"
        partial = path.with_name(fit_name(plain_name(path.name), LONGEST_NAME - len(ending)) + ending)
        try:
            _check_replaceable(path)
            yield library_path(partial)
            if durable:
                with open(partial, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            with suppress(OSError):  # report the first error
                partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and path.name in str(error) and _disk_fault(error) is None:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise UserError(f"{path} cannot be written: {reason}", fix="give another path") from error
            raise
        if durable:
            fsync_directory(path.parent)


def _check_replaceable(path: Path) -> None:
    """Raises UserError if a folder, a device or a pipe has the name: a file would replace /dev/null."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"{path} is {kind}", allowed="a new file, or one to replace", fix="give another path")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """`atomic_write` for a folder: yield a new folder next to `path`, which replaces `path` on success."""
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
            fsync_directory(partial)
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        fsync_directory(path.parent)


def make_folder(path: Path) -> None:
    """Make the folder `path` and its missing parents. UserError: a file or a broken link has one of these names."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        why = f"the file system refuses it ({error.strerror})"
        for above in (path, *path.parents):
            if not above.is_dir() and (above.exists() or above.is_symlink()):
                why = f"{above} is {'a file' if above.exists() else 'a link that leads nowhere'}"
                break
        raise UserError(
            f"the folder {path} cannot be made: {why}", allowed="an existing or a new folder", fix="name another folder"
        ) from error


@contextmanager
def own_partials() -> Iterator[None]:
    """Temporary files get names of this process alone, so that two processes may write the same file at once.

    The files of a killed process are then not overwritten by the next attempt; `remove_partials` removes them.
    """
    token = _partial_tag.set("." + secrets.token_hex(6))
    try:
        yield
    finally:
        _partial_tag.reset(token)


def remove_partials(*folders: Path) -> None:
    """Remove the temporary files of killed processes; call it only under the lock of the output folder."""
    for folder in folders:
        if is_remote(folder) or not folder.is_dir():
            continue
        with disk_errors(folder):
            for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                if path.is_file():
                    path.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors such as "no space left", raised while `path` is written, into a UserError.

    An error that names a file in another folder, such as an unreadable input, passes unchanged.
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
    """The errno, if `error` is a fault of the disk that a user can fix."""
    if isinstance(error, OSError) and error.errno in _FIXES:
        return error.errno
    if isinstance(error, PermissionError):  # object stores raise it without errno
        return errno.EACCES
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _REASON_IN_TEXT:
        reasons = (number for number in _FIXES if os.strerror(number) in str(error))
        return next(reasons, errno.ENOSPC if _SHORT_WRITE.search(str(error)) else None)
    return None


def _below(named: str, folder: Path) -> bool:
    return is_remote(folder) or Path(os.path.realpath(named)).is_relative_to(os.path.realpath(folder))


def _space(path: Path) -> str:
    if is_remote(path):
        return ""
    try:
        return f" ({shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free)"
    except OSError:
        return ""


def is_remote(path: Path) -> bool:
    """Whether `path` is a UPath of an object store: it has the methods of Path, but is not one."""
    return not isinstance(path, Path)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """`path` itself (its `library_path`), or a download of a remote object, removed after the block."""
    if not is_remote(path):
        yield library_path(path)
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
    """Call `write(temporary path)` and replace `path` with the result in one step."""
    with atomic_write(path) as partial:
        write(partial)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, in one step: equal values give equal bytes.

    A name that is not UTF-8 is written in ASCII escapes, which json.loads reads back; pydantic refuses them.
    """
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if not is_utf8(text):
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf8"))


def read_text(path: Path) -> str:
    """A text file of the user's: UTF-8 with or without a byte order mark, or UTF-16 with one. Lines end with \n.

    UserError: it cannot be read, or is in another encoding; the line and the command that converts it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="fix the path") from None
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line, utf8 = content.count(b"\n", 0, error.start) + 1, path.with_name(f"{path.stem}.utf8{path.suffix}")
        raise UserError(
            f"{path} is no UTF-8 text: line {line} has the byte 0x{content[error.start]:02x}",
            allowed="UTF-8",
            fix=f"if it is Latin-1: iconv -f latin1 -t utf8 {shlex.quote(str(path))} > {shlex.quote(str(utf8))}",
        ) from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # an object's file reads in the same way


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: 16 hex digits, equal for equal values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


ARCHIVE_URLS = ("zip", "tar", "libarchive", "reference", "dir")  # of fsspec: what is in one of them has a chained URL
CACHE_URLS = ("simplecache", "filecache", "blockcache", "cached")
_URL = re.compile(rf"(?:(?:{'|'.join(CACHE_URLS)})::)*([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_LOCAL_URL = re.compile(r"(?:file|local)://", re.IGNORECASE)
_NO_CACHE = ("s3", "s3a", "gs", "gcs")  # file systems that cache listings, which other processes change


def is_url(text: str) -> bool:
    """Whether a user's text is a URL of another file system: `s3://bucket/out`, `simplecache::s3://bucket/0.tar`.

    `run:1`, `data:v1`, `x::1.tar` and `file:///data` are not.
    """
    return bool(_URL.match(text)) and not _LOCAL_URL.match(text)


def user_path(text: str | Path) -> Path:
    """The file or folder that a user names: a Path, or a UPath for a URL such as s3://bucket/out.

    Whatever opens a path of the command line, of pipeline.yaml or of a file that users write takes it from here. `~` is
    the home folder. A relative name that Arrow, DuckDB or fsspec would take for a URL (`run:1`, `o::4`) becomes
    absolute. Bytes that are not UTF-8 are surrogate escapes, as in all of Python: see `library_path` and `printable`.
    """
    text = str(text)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is no path", allowed="a path or a URL", fix="name a file or a folder")
    if is_url(text):
        return _remote_path(text)
    path = Path(os.path.expanduser(_LOCAL_URL.sub("", text, count=1) or "/"))
    if long := next((part for part in path.parts if len(os.fsencode(part)) > LONGEST_NAME), None):
        problem = f"a name of {len(os.fsencode(long))} bytes is too long for a file: {long[:40]}..."
        raise UserError(problem, allowed=f"{LONGEST_NAME} bytes at most", fix="name another file or folder")
    odd = path.parts and (":" in path.parts[0] or path.parts[0].startswith("~"))
    return path.absolute() if odd else path


def _remote_path(text: str) -> Path:
    from upath import UPath  # LAZY: stage 2 and local builds do without fsspec

    protocol = _URL.match(text).group(1).lower()  # type: ignore[union-attr]  # a URL
    try:
        options: dict[str, Any] = {"use_listings_cache": False} if protocol in _NO_CACHE else {}
        path = UPath(text.rstrip("/"), **options)
        path.fs  # noqa: B018  (makes the file system now)
    except (ValueError, ImportError) as error:
        allowed = "a local folder, or a URL that fsspec knows"
        raise UserError(f"{text} cannot be opened: {error}", allowed=allowed) from None
    return cast(Path, path)


def local_path(text: str | Path) -> Path:
    """As `user_path`, for what reads and writes local files only. UserError: it is a URL; the fix is to copy it."""
    if not is_url(str(text)):
        return user_path(text)
    url = str(text).rstrip("/")
    name = url.rpartition("/")[2]
    copy = f"aws s3 sync {url} {name}" if url.startswith("s3://") else f"copy {url} to a local folder {name}"
    raise UserError(f"{url} is not on this machine", allowed="a local folder or file", fix=f"{copy}; then give {name}")


def printable(text: str) -> str:
    """The same text; bytes that are not UTF-8 as `\\xe9`, for what is stored as UTF-8 and never opened again."""
    try:
        return text.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte, of escapes in JSON
        return text.encode("utf8", "backslashreplace").decode()


def is_utf8(text: str) -> bool:
    """Whether the text has no surrogates, which stand for bytes of a file name that are not UTF-8."""
    try:
        text.encode("utf8")
    except UnicodeEncodeError:
        return False
    return True


_open_names: dict[str, int] = {}  # path -> a descriptor of it in this process
# What Arrow and DuckDB do not take as a character of a name: a pattern, a folder; a byte that is not UTF-8.
_NOT_PLAIN = re.compile(r"[*?\[\\\udc80-\udcff]")


def library_path(path: Path) -> Path:
    """A path for Arrow and DuckDB: `path`, or where a part of it holds a byte that is not UTF-8, `*`, `?`, `[` or a
    backslash, a path of /proc/self/fd, good in this process, that leads to the same file. That part has to exist.
    """
    if is_remote(path) or not _NOT_PLAIN.search(str(path)):
        return path
    last = next(above for above in (path, *path.parents) if _NOT_PLAIN.search(above.name))  # the deepest such part
    name, state = str(last.absolute()), last.stat()
    descriptor = _open_names.get(name)
    if descriptor is None or not os.path.samestat(os.fstat(descriptor), state):
        descriptor = _open_names[name] = os.open(last, os.O_RDONLY)
    return Path(f"/proc/self/fd/{descriptor}", path.relative_to(last))


def plain_name(name: str) -> str:
    """A file name that Arrow and DuckDB take: what `library_path` avoids becomes %XX."""
    return _NOT_PLAIN.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", name)


def fit_name(name: str, limit: int) -> str:
    """A file name of at most `limit` bytes: a longer one keeps its beginning, and ends in `~` and a fingerprint."""
    if len(name.encode("utf8", "surrogateescape")) <= limit:
        return name
    ending = f"~{fingerprint(name)}"
    return name.encode("utf8", "surrogateescape")[: limit - len(ending)].decode("utf8", "ignore") + ending


class Layout:
    """Paths below one output folder; `shard`: a shard's name; `number`: of a beton or of an image index file."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.labels, self.counts, self.betons = out / "labels", out / "counts", out / "beton"
        self.idf_parquet, self.idf_duckdb = out / "idf.parquet", out / "idf.duckdb"
        self.quarantine, self.pairs, self.subset = out / "quarantine.parquet", out / "pairs.parquet", out / "subset.npy"
        self.manifest, self.config, self.lock = out / "manifest.json", out / "config.yaml", out / ".lock"
        self.image_index = out / "places"  # offset tables of images that stay in their tars; an older name on disk
        self.image_sources = self.image_index / "sources.json"  # paths of these tars
        self.markers = out / "done"  # completion markers, one JSON per unit of work: a rerun skips what they cover
        self.record = self.markers / "inputs.json"  # the shards that the dataset was made from

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
