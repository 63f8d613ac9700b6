"""From what the user names (folder, glob, file, list, URL) to the ordered list of shards: `find_shards`.

00000000.tar 00000000.parquet 00000000_stats.json    a shard, its side Parquet, and the mark that it is complete
part-0.parquet  pairs.csv  pairs.tsv                 a table is a shard itself, in a folder without tars
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from labels.storage import UserError

ShardKind = Literal["tar", "parquet", "csv"]

_KINDS: dict[str, ShardKind] = {".tar": "tar", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_STATS = "_stats.json"
_ALLOWED = (
    "a folder with .tar files (also in its shards/ or deeper), or else with .parquet, .csv or .tsv files; a glob, or"
    " such files; local paths or fsspec URLs"
)
_FIX = "name the folder that img2dataset or DataComp's download script wrote"
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")
_COMPRESSED_TABLES = tuple(
    f".{kind}.{end}" for kind in ("csv", "tsv") for end in ["gz", "bz2", "xz", "zst", "lz4", "zip"]
)
_CHANGE_MARKS = ("mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag")
_NAMES_SHOWN = 10


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
        file: dict[str, str | int] = {"path": self.path, "bytes": self.bytes, "modified": self.modified}
        if self.side:
            file |= {"side": self.side, "side_bytes": self.side_bytes, "side_modified": self.side_modified}
        return file

    def open(self) -> BinaryIO:
        """The file's bytes, seekable, for reading."""
        filesystem, path = url_to_fs(self.path)
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
    waiting: set[str] = set()
    for source in sources:
        complete, incomplete = _expand(source)
        files |= {shard.path: shard for shard in complete}
        waiting |= set(incomplete)
    rerun = "run the same command again when the download has ended"
    note = (
        f"{len(waiting)} of {len(waiting) + len(files)} shards have no {_STATS} yet and are skipped: {_names(waiting)}"
    )
    if not files:
        raise UserError(note, fix=rerun)
    return ShardList(_named(list(files.values())), [f"{note}; {rerun}"] if waiting else [])


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
        name = "--".join(PurePosixPath(file.path).with_suffix("").parts[common:])
        if name in shards:
            raise UserError(f"{shards[name].path} and {file.path} would both be shard {name}", fix="rename one of them")
        shards[name] = replace(file, name=name)
    # Not by the bare name: `a-b.parquet` comes before `a.parquet`, and rows are counted in file-name order.
    return sorted(shards.values(), key=lambda shard: f"{shard.name}.parquet")


def _expand(source: str) -> tuple[list[Shard], list[str]]:
    """The shards that one source names, still without names; and the paths of those that are not complete."""
    try:
        filesystem, path = url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise UserError(f"{source} cannot be opened: {error}", allowed=_ALLOWED) from None
    folder, files = _files(filesystem, source, path)
    _refuse_compressed(source, folder, files)
    kinds: dict[str, ShardKind] = {
        name: _KINDS[suffix] for name in files if (suffix := PurePosixPath(name).suffix) in _KINDS
    }
    stems = {_stem(name) for name, kind in kinds.items() if kind == "tar"}
    if folder and stems:  # other tables of such a folder are metadata
        kinds = {name: kind for name, kind in kinds.items() if kind == "tar"}
    kinds = {name: kind for name, kind in kinds.items() if kind == "tar" or _stem(name) not in stems}
    if not kinds:
        known = ".tar, .parquet, .csv or .tsv"
        raise UserError(f"{source} holds no {known} file ({len(files)} other files)", allowed=_ALLOWED, fix=_FIX)
    listed = set(files) if folder else _siblings(filesystem, kinds)
    marks = {name.removesuffix(_STATS) for name in listed if name.endswith(_STATS)}
    # A mark of no shard is another program's.
    marked = {_parent(mark) for mark in marks if listed & {f"{mark}.tar", f"{mark}.parquet"}}
    complete, incomplete = [], []
    for name, kind in sorted(kinds.items()):
        if kind != "csv" and _parent(name) in marked and _stem(name) not in marks:
            incomplete.append(name)
            continue
        side = f"{_stem(name)}.parquet"
        side_state = _state(filesystem, side) if kind == "tar" and side in listed else (None, 0, "")
        complete.append(Shard("", *_state(filesystem, name), kind, *side_state))
    return complete, incomplete


def _files(filesystem: AbstractFileSystem, source: str, path: str) -> tuple[bool, list[str]]:
    """Whether a source is a folder, and the paths of all files that it names."""
    if filesystem.isdir(path):
        return True, [str(name) for name in filesystem.find(path)]
    if filesystem.exists(path):
        return False, [path]
    if any(character in path for character in "*?["):
        return False, [str(name) for name in filesystem.glob(path)]
    raise UserError(f"{source} does not exist", allowed=_ALLOWED, fix=_FIX)


def _refuse_compressed(source: str, folder: bool, files: list[str]) -> None:
    has_tars = folder and any(name.endswith(".tar") for name in files)
    for kind, suffixes, allowed, glob in (
        ("tars", _COMPRESSED_TARS, "plain .tar", "shards/*.tar"),
        ("tables", () if has_tars else _COMPRESSED_TABLES, "plain .csv, .tsv or .parquet", "data/*.csv"),
    ):
        if packed := sorted(name for name in files if name.endswith(suffixes)):
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


def _state(filesystem: AbstractFileSystem, path: str) -> tuple[str, int, str]:
    """Full path, size in bytes and mark of change of a file."""
    info: dict[str, Any] = filesystem.info(path)
    modified = next((str(info[mark]) for mark in _CHANGE_MARKS if info.get(mark)), "")
    local = isinstance(filesystem, LocalFileSystem)
    return path if local else filesystem.unstrip_protocol(path), int(info["size"]), modified


def _stem(path: str) -> str:
    return path[: path.rindex(".")]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
