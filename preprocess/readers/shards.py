"""From what the user names (folder, glob, file, list, URL) to the ordered list of shards: `find_shards`.

00000000.tar 00000000.parquet 00000000_stats.json    a shard, its side Parquet, and the mark that it is complete
part-0.parquet  pairs.csv  pairs.tsv                 a table is a shard itself, in a folder without tars
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import BinaryIO, Literal

from fsspec import AbstractFileSystem

from labels.listing import Files, expand_names, file_state, full_name, list_files, open_name, unfinished_name
from labels.storage import LONGEST_NAME, UserError, fit_name, plain_name, printable

ShardKind = Literal["tar", "parquet", "csv"]

_KINDS: dict[str, ShardKind] = {".tar": "tar", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_STATS = "_stats.json"
_ALLOWED = (
    "a folder with .tar files (also in its shards/ or deeper), or else with .parquet, .csv or .tsv files; a glob, or"
    " such files; several joined by `::`; braces such as {0000..0127}; local paths or fsspec URLs"
)
_FIX = "name the folder that img2dataset or DataComp's download script wrote"
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")
_COMPRESSED_TABLES = tuple(
    f".{kind}.{end}" for kind in ("csv", "tsv") for end in ["gz", "bz2", "xz", "zst", "lz4", "zip"]
)
_CHANGE_MARKS = ("mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag")
_NAMES_SHOWN = 10
# Longest name of a label file: `<shard>.parquet.<12 hex digits>.partial`.
_LONGEST_SHARD = LONGEST_NAME - len(".parquet..partial") - 12


@dataclass(frozen=True)
class Shard:
    """One webdataset tar, or one table."""

    name: str  # unique in a build, orders the shards
    path: str
    bytes: int
    modified: str
    kind: ShardKind = "tar"
    side: str | None = None  # path of the tar's side Parquet, if it has one
    side_bytes: int = 0
    side_modified: str = ""

    @property
    def source(self) -> dict[str, str | int]:
        """What a marker remembers of the shard: if any of it differs, the shard is another one."""
        file: dict[str, str | int] = {"path": printable(self.path), "bytes": self.bytes, "modified": self.modified}
        if self.side:
            side: dict[str, str | int] = {"side": printable(self.side), "side_bytes": self.side_bytes}
            file |= side | {"side_modified": self.side_modified}
        return file

    def open(self) -> BinaryIO:
        """The file's bytes, seekable, for reading."""
        filesystem, path = open_name(self.path)
        return filesystem.open(path, "rb")


@dataclass(frozen=True)
class ShardList:
    """`shards` in the order of their label files' names; `notes`: lines that the user should read."""

    shards: list[Shard]
    notes: list[str]


def find_shards(sources: list[str]) -> ShardList:
    """All shards that `sources` name, in the order of their label files' names.

    A shard's name is its path below the folder that all have in common, without its suffix, with `/` as `--`. In a
    folder where any shard has its `_stats.json`, one without it is still being downloaded: it is skipped, with a note.
    """
    files: dict[str, Shard] = {}
    waiting, ignored, own = set[str](), set[str](), set[str]()
    for source in sources:
        for name in expand_names(source):
            complete, incomplete, listed = _expand(name, source)
            files |= {shard.path: shard for shard in complete}
            waiting |= set(incomplete)
            ignored |= {path for path in listed.ignored if _kind(unfinished_name(path))}
            if any(shard.kind != "tar" for shard in complete):
                own |= set(listed.own)
    rerun = "run the same command again when the download has ended"
    note = (
        f"{len(waiting)} of {len(waiting) + len(files)} shards have no {_STATS} yet and are skipped: {_names(waiting)}"
    )
    if not files:
        raise UserError(note, fix=rerun)
    notes = [f"{note}; {rerun}"] if waiting else []
    if ignored:
        notes.append(_ignored_note(ignored))
    if own:
        notes.append(f"files of output folders are no input: {len(own)} are skipped, the first: {min(own)}")
    return ShardList(_named(list(files.values())), notes)


def _ignored_note(ignored: Iterable[str]) -> str:
    paths = sorted(ignored)
    problem = f"hidden, underscore and temporary names are ignored: {len(paths)} of such files"
    return f"{problem}, the first: {paths[0]}; to read it, name it or its folder"


def shard_name(path: str) -> str:
    """The name of the shard at a path below the common folder: `a/0.tar` -> `a--0`.

    Bytes that are not UTF-8 and characters that are patterns become %XX; a name that is too long ends in a fingerprint.
    """
    return valid_name("--".join(PurePosixPath(path).with_suffix("").parts))


def valid_name(name: str) -> str:
    """A shard's name that can name its label file."""
    return fit_name(plain_name(name), _LONGEST_SHARD)


def _names(paths: Iterable[str]) -> str:
    """The bare names of the first few shards."""
    names = sorted(PurePosixPath(path).stem for path in paths)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _named(files: list[Shard]) -> list[Shard]:
    parents = [PurePosixPath(shard.path).parent.parts for shard in files]
    common = 0
    while all(len(parent) > common and parent[common] == parents[0][common] for parent in parents):
        common += 1
    shards: dict[str, Shard] = {}
    for file in files:
        name = shard_name("/".join(PurePosixPath(file.path).parts[common:]))
        if name in shards:
            raise UserError(f"{shards[name].path} and {file.path} would both be shard {name}", fix="rename one of them")
        shards[name] = replace(file, name=name)
    # Not by the bare name: `a-b.parquet` comes before `a.parquet`, and rows are counted in file-name order.
    return sorted(shards.values(), key=lambda shard: f"{shard.name}.parquet")


def _kind(path: str) -> ShardKind | None:
    return _KINDS.get(PurePosixPath(path).suffix.lower())


def _expand(name: str, source: str) -> tuple[list[Shard], list[str], Files]:
    """The shards that one name stands for, still without names; the paths of those that are not complete; and all of
    its files. `source`: what the user wrote, for messages.
    """
    filesystem, path = open_name(name)
    listed = list_files(filesystem, path)
    part = name if name == source else f"{name} (of {source})"
    if listed is None:
        fix = _FIX if name == source else "correct the list: all that it names has to exist"
        raise UserError(f"{part} does not exist", allowed=_ALLOWED, fix=fix)
    folder, files = listed.folder, listed.files
    _refuse_compressed(part, folder, files)
    kinds: dict[str, ShardKind] = {file: kind for file in files if (kind := _kind(file))}
    stems = {_stem(file) for file, kind in kinds.items() if kind == "tar"}
    if folder and stems:  # other tables of such a folder are metadata
        kinds = {file: kind for file, kind in kinds.items() if kind == "tar"}
    kinds = {file: kind for file, kind in kinds.items() if kind == "tar" or _stem(file) not in stems}
    if not kinds:
        known = ".tar, .parquet, .csv or .tsv"
        more = f"; {_ignored_note(listed.ignored)}" if listed.ignored else ""
        problem = f"{part} holds no {known} file ({len(files)} other files{more})"
        raise UserError(problem, allowed=_ALLOWED, fix=_FIX)
    around = set(files) if folder else _siblings(filesystem, kinds)
    marks = {file.removesuffix(_STATS) for file in around if file.endswith(_STATS) and not file.endswith(f"/{_STATS}")}
    # A mark of no shard is another program's.
    marked = {_parent(mark) for mark in marks if around & {f"{mark}.tar", f"{mark}.parquet"}}
    complete, incomplete = [], []
    for file, kind in sorted(kinds.items()):
        if kind != "csv" and _parent(file) in marked and _stem(file) not in marks:
            incomplete.append(file)
            continue
        side = f"{_stem(file)}.parquet"
        side_state = _state(filesystem, name, side) if kind == "tar" and side in around else (None, 0, "")
        complete.append(Shard("", *_state(filesystem, name, file), kind, *side_state))
    return complete, incomplete, listed


def _refuse_compressed(source: str, folder: bool, files: list[str]) -> None:
    has_tars = folder and any(_kind(name) == "tar" for name in files)
    for kind, suffixes, allowed, glob in (
        ("tars", _COMPRESSED_TARS, "plain .tar", "shards/*.tar"),
        ("tables", () if has_tars else _COMPRESSED_TABLES, "plain .csv, .tsv or .parquet", "data/*.csv"),
    ):
        if packed := sorted(name for name in files if name.lower().endswith(suffixes)):
            problem = f"{source} holds compressed {kind} ({len(packed)}, the first: {packed[0]})"
            fix = f"unpack them (e.g. gunzip), or skip them with a glob such as '{glob}'"
            raise UserError(problem, allowed=allowed, fix=fix)


def _siblings(filesystem: AbstractFileSystem, names: Iterable[str]) -> set[str]:
    """All files in the folders of `names`."""
    listed: set[str] = set()
    for folder in {_parent(name) for name in names}:
        # A server that lists nothing, such as plain HTTP: each file is a shard without side Parquet.
        with suppress(OSError, NotImplementedError, ValueError):
            listed |= {str(name) for name in filesystem.ls(folder or filesystem.root_marker, detail=False)}
    return listed


def _state(filesystem: AbstractFileSystem, source: str, path: str) -> tuple[str, int, str]:
    """Full path, size in bytes and mark of change of a file."""
    info = file_state(filesystem, path)
    modified = next((str(info[mark]) for mark in _CHANGE_MARKS if info.get(mark)), "")
    return full_name(source, filesystem, path), int(info["size"]), modified


def _stem(path: str) -> str:
    return path[: path.rindex(".")]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
