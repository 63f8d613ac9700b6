"""From what the user names (folder, glob, file, list, URL) to the ordered list of shards."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from labels.errors import UserError

_ALLOWED = "a folder with .tar files (also in its shards/ or deeper), a glob, or .tar files; local paths or fsspec URLs"
_MEND = "name the folder that img2dataset or DataComp's download script wrote"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")
_CHANGE_MARKS = ("mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag")


@dataclass(frozen=True)
class Shard:
    """One webdataset tar. `name` is unique in a build and orders it; `bytes` is the tar's size."""

    name: str
    path: str
    bytes: int
    modified: str

    @property
    def source(self) -> dict[str, str | int]:
        """What a marker remembers of the tar: if any of it differs, the tar is another one."""
        return {"path": self.path, "bytes": self.bytes, "modified": self.modified}

    def open(self) -> BinaryIO:
        """The tar's bytes, seekable, for reading."""
        filesystem, path = url_to_fs(self.path)
        return filesystem.open(path, "rb")


def find_shards(sources: list[str]) -> list[Shard]:
    """All .tar files that `sources` name, in the order of their label files' names.

    A shard's name is its path below the folder that all have in common, without `.tar`, with `/` as `--`.

    Raises:
        UserError: a source that does not exist, holds no tar, or a compressed tar; two shards of one name.
    """
    paths: dict[str, tuple[int, str]] = {}
    for source in sources:
        for path, size, modified in _expand(source):
            paths[path] = (size, modified)
    parents = [PurePosixPath(path).parent.parts for path in paths]
    common = 0
    while all(len(parent) > common and parent[common] == parents[0][common] for parent in parents):
        common += 1
    shards: dict[str, Shard] = {}
    for path, (size, modified) in paths.items():
        name = "--".join(PurePosixPath(path).parts[common:]).removesuffix(".tar")
        if name in shards:
            raise UserError(f"{shards[name].path} and {path} would both be shard {name}", mend="rename one of them")
        shards[name] = Shard(name, path, size, modified)
    # Not by the bare name: `a-b.parquet` comes before `a.parquet`, and rows are counted in file-name order.
    return sorted(shards.values(), key=lambda shard: f"{shard.name}.parquet")


def _expand(source: str) -> list[tuple[str, int, str]]:
    """Path, size in bytes and mark of change of every tar that one source names."""
    try:
        filesystem, path = url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise UserError(f"{source} cannot be opened: {error}", allowed=_ALLOWED) from None
    found = _files(filesystem, source, path)
    packed = sorted(name for name in found if name.endswith(_COMPRESSED))
    if packed:
        raise UserError(
            f"{source} holds compressed tars ({len(packed)}, the first: {packed[0]})",
            allowed="plain .tar",
            mend="unpack them (e.g. gunzip), or leave them out with a glob such as 'shards/*.tar'",
        )
    tars = sorted(name for name in found if name.endswith(".tar"))
    if not tars:
        raise UserError(f"{source} holds no .tar file ({len(found)} other files)", allowed=_ALLOWED, mend=_MEND)
    local = "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
    result = []
    for name in tars:
        info: dict[str, Any] = filesystem.info(name)
        modified = next((str(info[mark]) for mark in _CHANGE_MARKS if info.get(mark)), "")
        result.append((name if local else filesystem.unstrip_protocol(name), int(info["size"]), modified))
    return result


def _files(filesystem: AbstractFileSystem, source: str, path: str) -> list[str]:
    if filesystem.isdir(path):
        return [str(name) for name in filesystem.find(path)]
    if filesystem.exists(path):
        return [path]
    if any(character in path for character in "*?["):
        return [str(name) for name in filesystem.glob(path)]
    raise UserError(f"{source} does not exist", allowed=_ALLOWED, mend=_MEND)
