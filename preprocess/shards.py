"""From what the user names (folder, glob, file, list, URL) to the ordered list of shards."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from fsspec.core import url_to_fs

from labels.errors import UserError

_ALLOWED = "a folder with .tar files (also in its shards/ or deeper), a glob, or .tar files; local paths or fsspec URLs"
_MEND = "name the folder that img2dataset or DataComp's download script wrote"


@dataclass(frozen=True)
class Shard:
    """One webdataset tar. `name` is unique in a build and orders it; `bytes` is the tar's size."""

    name: str
    path: str
    bytes: int
    modified: str

    def open(self) -> BinaryIO:
        """The tar's bytes, seekable, for reading."""
        filesystem, path = url_to_fs(self.path)
        return filesystem.open(path, "rb")


def find_shards(sources: list[str]) -> list[Shard]:
    """All .tar files that `sources` name, sorted by name.

    A shard's name is its path below the folder that all have in common, without `.tar`, with `/` as `--`.

    Raises:
        UserError: a source that does not exist, holds no tar, or a compressed tar.
    """
    paths: dict[str, tuple[int, str]] = {}
    for source in sources:
        for path, size, modified in _expand(source):
            paths[path] = (size, modified)
    parents = [PurePosixPath(path).parent.parts for path in paths]
    common = 0
    while all(len(parent) > common and parent[common] == parents[0][common] for parent in parents):
        common += 1
    shards = []
    for path, (size, modified) in paths.items():
        relative = PurePosixPath(path).parts[common:]
        shards.append(Shard("--".join(relative).removesuffix(".tar"), path, size, modified))
    return sorted(shards, key=lambda shard: shard.name)


def _expand(source: str) -> list[tuple[str, int, str]]:
    filesystem, path = url_to_fs(source)
    if filesystem.isdir(path):
        found = filesystem.find(path)
    elif any(character in path for character in "*?["):
        found = filesystem.glob(path)
    elif filesystem.exists(path):
        found = [path]
    else:
        raise UserError(f"{source} does not exist", allowed=_ALLOWED, mend=_MEND)
    tars = sorted(name for name in found if name.endswith(".tar"))
    if not tars:
        packed = [name for name in found if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2"))]
        if packed:
            raise UserError(f"{source} holds compressed tars ({packed[0]})", allowed="plain .tar", mend="unpack them, e.g. gunzip")
        raise UserError(f"{source} holds no .tar file ({len(found)} other files)", allowed=_ALLOWED, mend=_MEND)
    local = "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
    result = []
    for name in tars:
        info = filesystem.info(name)
        modified = str(info.get("mtime") or info.get("LastModified") or info.get("ETag") or "")
        result.append((name if local else filesystem.unstrip_protocol(name), int(info["size"]), modified))
    return result
