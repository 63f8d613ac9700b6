"""Where everything lies below OUT, the folder or object-store prefix that stage 1 writes and stage 2 reads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from labels.errors import UserError

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
        raise UserError(f"{text} cannot be opened: {error}", allowed="a local folder, or a URL that fsspec knows") from None
    return cast(Path, path)


def local_out(text: str | Path) -> Path:
    """OUT for what needs it on this machine's disks: training maps betons into memory.

    Raises:
        UserError: it is a URL; the mend is the command that copies it here.
    """
    found = _URL.match(str(text)) or _COLLAPSED.match(str(text))
    protocol = found.group(1).lower() if found else "file"
    if found is None or protocol in ("file", "local") or (isinstance(text, Path) and text.exists()):
        return out_path(str(text))
    url = f"{protocol}://{str(text)[found.end() :].strip('/')}"
    here = url.rpartition("/")[2]
    copy = f"aws s3 sync {url} {here}" if protocol == "s3" else f"copy {url} to a local folder {here}"
    raise UserError(f"{url} is not on this machine", allowed="a local folder", mend=f"{copy}; then give {here}")


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
    def places(self) -> Path:
        return self.out / "places"

    @property
    def place_sources(self) -> Path:
        """Where the tars lie that `places` point into; see labels/places.py."""
        return self.places / "sources.json"

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

    def place_file(self, number: int) -> Path:
        return self.places / f"{number:05d}.npy"

    def beton_marker(self, number: int) -> Path:
        return self.markers / "beton" / f"{number:05d}.json"

    def place_marker(self, number: int) -> Path:
        return self.markers / "places" / f"{number:05d}.json"
