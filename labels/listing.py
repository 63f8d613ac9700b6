"""From what a user names as input to files: lists, braces, globs and folders, on local disks or in an object store.

    "a/{00..09}.tar::b/*.tar" -> expand_names -> single names -> open_name -> filesystem, path -> list_files -> Files

A name that exists is always that file or folder, whatever characters it has. `Files.ignored` has what a folder or a
glob holds under hidden, underscore and temporary names; whoever names such a file or folder itself gets it. fsspec is
imported where it is used: a training node without a subset does without.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from labels.storage import ARCHIVE_URLS, CACHE_URLS, UserError, is_url, user_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PATTERN = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?")
_MOST_NAMES = 10_000_000
_TEMPORARY = ("tmp", "temp", "part", "partial", "crdownload", "aria2")
# of the desktop and the file system, of Spark and Delta Lake, of programs that have not finished a file
_IGNORED = re.compile(
    r"(?:^|/)([._][^/]*|lost\+found|@eaDir|\$RECYCLE\.BIN|[^/]*\.(?:" + "|".join(_TEMPORARY) + r"))(?=/|$)"
)
_FINISHED = re.compile(rf"\.(?:{'|'.join(_TEMPORARY)})$")
# Parquet files of an output folder; its file that tells what it is
_OWN = re.compile(r"(?:^|(?P<out>.*)/)(?:(?:labels|counts)/[^/]+|idf|quarantine|pairs)\.parquet$")
_OWN_MARK = "done/options.json"


@dataclass(frozen=True)
class Files:
    """What one name stands for: paths of its file system, sorted."""

    folder: bool  # the name is that of a folder
    files: list[str]
    ignored: list[str]  # hidden, underscore and temporary names
    own: list[str]  # files of output folders of build-labels


# -- one text, several names


def expand_names(text: str) -> list[str]:
    """The names that one text stands for: the parts of a list joined by `::`, and their braces.

    Both as OpenCLIP's and webdataset's users write them: `a/{0000..0127}.tar::b/{x,y}.tar`. UserError: an empty part.
    """
    if "::" not in text and "{" not in text:
        return [text]
    return [name for part in _parts(text) for name in ([part] if _exists(part) else _braces(part))]


def _parts(text: str) -> list[str]:
    """The parts of a list; a chained URL of fsspec is one part, as is an existing name that holds `::`."""
    pieces, parts = text.split("::"), []
    while pieces:
        count = 1
        while count < len(pieces) and _is_chained(pieces[count - 1]):
            count += 1
        longer = (n for n in range(len(pieces), count, -1) if _names_files("::".join(pieces[:n])))
        count = next(longer, count)
        parts.append("::".join(pieces[:count]))
        pieces = pieces[count:]
    if not all(parts):
        raise UserError(f"{text!r} has an empty part", allowed="a path, or several joined by `::`", fix="omit the `::`")
    return parts


def _is_chained(piece: str) -> bool:
    """Whether the next part of a chained URL says where this one is: `simplecache`, or `zip://a.tar`."""
    scheme, colon, _ = piece.lower().partition("://")
    return scheme in CACHE_URLS if not colon else scheme in ARCHIVE_URLS


def _names_files(text: str) -> bool:
    return not is_url(text) and (_exists(text) or any(_exists(name) for name in _braces(text)))


def _exists(text: str) -> bool:
    """Whether a local file, folder or dangling link has this name, or files match it as a glob."""
    if is_url(text):
        return False
    try:
        path = str(user_path(text))
    except UserError:  # a list may be longer than a name
        return False
    return os.path.lexists(path) or (
        PATTERN.search(path) is not None and next(glob.iglob(path, recursive=True), None) is not None
    )


def _braces(text: str) -> Iterator[str]:
    """`{0000..0127}`, `{a..c}`, `{0..9..3}` and `{x,y}` expanded, nested ones from the inside; others stay."""
    expanded = [text]
    for match in _BRACES.finditer(text):
        values = _values(match.group(1))
        if values is None:
            continue
        if len(values) > _MOST_NAMES:
            raise UserError(f"{text} stands for {len(values):,} names", allowed=f"{_MOST_NAMES:,} at most")
        before, after = text[: match.start()], text[match.end() :]
        expanded = [name for value in values for name in _braces(f"{before}{value}{after}")]
        break
    return iter(expanded)


def _values(inside: str) -> Sequence[str] | None:
    if "," in inside:
        return inside.split(",")
    match = _RANGE.fullmatch(inside)
    if match is None or match.group(1).isalpha() != match.group(2).isalpha():
        return None
    first, last, by = match.groups()
    step = abs(int(by or 1)) or 1
    if first.isalpha():
        low, high = ord(first), ord(last)
        return [chr(code) for code in range(low, high + (1 if high >= low else -1), step if high >= low else -step)]
    low, high = int(first), int(last)
    numbers = range(low, high + (1 if high >= low else -1), step if high >= low else -step)
    padded = any(len(digits := end.lstrip("-")) > 1 and digits[0] == "0" for end in (first, last))
    return [f"{number:0{max(len(first), len(last))}d}" for number in numbers] if padded else list(map(str, numbers))


# -- one name, its files


def open_name(name: str) -> tuple[Any, str]:
    """The AbstractFileSystem of a path or URL, and the path there. UserError: fsspec does not know or have it."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if not is_url(name):  # fsspec would take `run:1` and `x::1.tar` apart
        return LocalFileSystem(), str(user_path(name).absolute())
    try:
        if "::" in name and not any(map(_is_chained, name.split("::")[:-1])):
            from fsspec import get_filesystem_class

            kind = get_filesystem_class(name.partition("://")[0].lower())
            return kind(**kind._get_kwargs_from_urls(name)), str(kind._strip_protocol(name))
        return _chained(name) if "::" in name else url_to_fs(name)
    except (ValueError, ImportError) as error:
        fix = "install the package that it names" if isinstance(error, ImportError) else None
        allowed = "a local path, or a URL that fsspec knows"
        raise UserError(f"{name} cannot be opened: {error}", allowed=allowed, fix=fix) from None


@lru_cache(maxsize=64)
def _chained(name: str) -> tuple[Any, str]:
    """Kept: the file system of an archive closes the archive, and so every file that was opened in it, when it ends."""
    from fsspec.core import url_to_fs

    return url_to_fs(name)


def full_name(name: str, filesystem: AbstractFileSystem, path: str) -> str:
    """What `open_name` takes back to `path`: a file that was found below `name`."""
    if not is_url(name):
        return path
    archive, chain, rest = name.partition("::")
    scheme = archive.partition("://")[0].lower()
    if chain and scheme in ARCHIVE_URLS:
        return f"{scheme}://{path.lstrip('/')}::{rest}"
    caches = "".join(f"{piece}::" for piece in name.split("::")[:-1] if piece.lower() in CACHE_URLS)
    url = str(filesystem.unstrip_protocol(path))
    return caches + url.rpartition("::")[2] if caches else url


def list_files(filesystem: AbstractFileSystem, path: str) -> Files | None:
    """The files of a folder (also deeper), of a glob, or a file itself; None: there is none of that name.

    A linked subfolder is followed, once. UserError: a local folder cannot be read.
    """
    local = _is_local(filesystem)
    if filesystem.isdir(path):
        found = _walk(path) if local else [str(name) for name in filesystem.find(path)]
        return _sorted_out(filesystem, path, found, folder=True)
    if filesystem.exists(path) or (local and os.path.lexists(path)):
        return Files(False, [path], [], [])
    if not PATTERN.search(path):
        return None
    if local:
        matches = glob.glob(path, recursive=True, include_hidden=True)
        found = [name for name in matches if not os.path.isdir(name)]
    else:
        found = [str(name) for name in filesystem.glob(path)]
    return _sorted_out(filesystem, path, found, folder=False)


def _sorted_out(filesystem: AbstractFileSystem, path: str, found: list[str], *, folder: bool) -> Files:
    base = path.rstrip("/") if folder else PATTERN.split(path)[0].rpartition("/")[0]
    spelt = [part for part in path[len(base) :].split("/") if part] if not folder else []
    files, ignored, own, outs = [], [], [], dict[str, bool]()
    for name in sorted(found):
        below = name[len(base) :].lstrip("/") if name.startswith(base) else name
        if any(not _is_spelt(part, spelt) for part in _IGNORED.findall(below)):
            ignored.append(name)
            continue
        match = _OWN.match(name) if name.endswith(".parquet") else None
        if match and (out := match["out"] or "") not in outs:
            outs[out] = filesystem.exists(f"{out}/{_OWN_MARK}")
        (own if match and outs[match["out"] or ""] else files).append(name)
    return Files(folder, files, ignored, own)


def _is_spelt(part: str, patterns: Sequence[str]) -> bool:
    """Whether a glob names this hidden or temporary part itself, as `._*.tar` and `_temporary/*` do."""
    return any(pattern[0] == part[0] not in "*?[" and fnmatchcase(part, pattern) for pattern in patterns)


def unfinished_name(path: str) -> str:
    """The name that a temporary file will have: `0.tar` of `0.tar.part`."""
    return _FINISHED.sub("", path)


def _is_local(filesystem: AbstractFileSystem) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _walk(folder: str) -> list[str]:
    """All files below a local folder. Linked folders come after all others, so that each is read by its own name."""
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting, linked = [folder], list[str]()
    while waiting or linked:
        current = waiting.pop() if waiting else linked.pop(0)
        try:
            state = os.stat(current)
            if (key := (state.st_dev, state.st_ino)) in seen:
                continue
            seen.add(key)
            with os.scandir(current) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name = f"{current.rstrip('/')}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(name)
                    elif entry.is_symlink() and os.path.isdir(name):
                        linked.append(name)
                    else:
                        files.append(name)
        except OSError as error:
            if _IGNORED.search(current[len(folder) :]):
                continue
            problem = f"the folder {current} cannot be read: {error.strerror}"
            raise UserError(problem, fix="give this user the right to read it, or name the other files") from None
    return files


def check_readable(path: str) -> str | None:
    """Why a local file cannot be read; None if it can."""
    try:
        state = os.stat(path)
    except OSError as error:
        return f"is a link that leads nowhere, to {os.readlink(path)}" if os.path.islink(path) else f"{error.strerror}"
    if not stat.S_ISREG(state.st_mode):
        return "is a folder" if stat.S_ISDIR(state.st_mode) else "is a pipe or a device, which cannot be read twice"
    return None if os.access(path, os.R_OK) else "may not be read by this user"


def file_state(filesystem: AbstractFileSystem, path: str) -> dict[str, Any]:
    """Size and times of a file, as fsspec gives them. UserError: it cannot be read."""
    if _is_local(filesystem) and (why := check_readable(path)):
        fix = "remove it, or make what it leads to available" if os.path.islink(path) else "name the other files"
        raise UserError(f"{path} {why}", allowed="files that can be read", fix=fix)
    return filesystem.info(path)
