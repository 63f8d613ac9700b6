"""Which rows go into which beton: a pure function of the shards' rows and the settings, known before any image is read.

    shards with rows -> windows of `shuffle_window` neighbours -> groups: the windows of one beton, or one larger window
    group            -> its rows, shuffled within each window  -> `files` even parts, a beton each

So groups can be written in parallel, on any machine, in any order; a group is the unit of work and of resume. With the
default of 10,000 samples a DataComp shard is one beton; rows with bad images make a beton smaller. Without a
`shuffle_window` each tar is read once, front to back: the loader mixes blocks of all betons. A window is for shards
sorted by topic; its tars are mapped together, which needs page cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from labels.manifest import ShardPart
from labels.native import GOLDEN, splitmix64
from labels.settings import Build
from labels.storage import Layout
from preprocess.readers.shards import Shard

_GIB = 1 << 30


@dataclass(frozen=True)
class Member:
    """A shard that has rows."""

    shard: Shard
    part: ShardPart
    number: int  # position among the manifest's shards
    bytes: int  # its part in the size of a beton

    @property
    def wanted(self) -> list[Any]:
        """The shard's entry in a marker."""
        return [self.part.name, self.part.first_index, self.part.labels_sha256, self.shard.source]


@dataclass(frozen=True)
class Group:
    """Neighbouring windows of shards, whose rows make `files` betons."""

    first: int  # number of its first beton
    files: int
    windows: list[list[Member]]

    @property
    def members(self) -> list[Member]:
        return [member for window in self.windows for member in window]

    @property
    def rows(self) -> int:
        return sum(member.part.rows for member in self.members)

    @property
    def wanted(self) -> dict[str, Any]:
        """The values of a marker whose betons are this group's."""
        return {"first": self.first, "count": self.files, "shards": [member.wanted for member in self.members]}


@dataclass(frozen=True)
class ImageFolder:
    """Where the image stage writes: betons, or with `--no-images` image index files."""

    files: Path
    suffix: str
    markers: Path

    def numbered(self) -> list[tuple[int, Path]]:
        """Number and path of its files and markers, whole or not; files with other names are not a build's."""
        paths = [*self.files.glob(f"*{self.suffix}"), *self.markers.glob("*.json")]
        numbered = [(int(path.stem), path) for path in paths if path.stem.isdecimal()]
        return [(number, path) for number, path in numbered if path.stem == f"{number:05d}"]


def image_folder(layout: Layout, *, copy: bool) -> ImageFolder:
    """The folder of the betons (`copy`), or of the image index files."""
    if copy:
        return ImageFolder(layout.betons, ".beton", layout.markers / "beton")
    return ImageFolder(layout.image_index, ".npy", layout.markers / "places")


def plan_groups(batches: Sequence[Sequence[Member]], settings: Build) -> list[Group]:
    """All groups in order. No group spans two `batches`: `preprocess append` leaves earlier betons unchanged."""
    groups: list[Group] = []
    first, step = 0, settings.shuffle_window
    for batch in batches:
        windows = [list(batch[start : start + step]) for start in range(0, len(batch), step)]
        for together in _gathered(windows, settings):
            rows, size = _totals(together)
            files = min(max(-(-rows // settings.beton_samples), -(-size // _limit(settings))), rows)
            groups.append(Group(first, files, together))
            first += files
    return groups


def _gathered(windows: list[list[Member]], settings: Build) -> Iterator[list[list[Member]]]:
    """Neighbouring windows that fit one beton together; a larger window is alone."""
    together: list[list[Member]] = []
    for window in windows:
        rows, size = _totals([*together, window])
        if together and (rows > settings.beton_samples or size > _limit(settings)):
            yield together
            together = []
        together.append(window)
    if together:
        yield together


def _totals(windows: list[list[Member]]) -> tuple[int, int]:
    members = [member for window in windows for member in window]
    return sum(member.part.rows for member in members), sum(member.bytes for member in members)


def _limit(settings: Build) -> int:
    return max(1, int(settings.beton_size * _GIB))


def row_order(group: Group, settings: Build) -> list[np.ndarray]:
    """Positions int64 of the rows of each of the group's betons, counted through its members' rows.

    A row's position within its window depends only on the seed and its index among all rows.
    """
    orders, first = [], 0
    for window in group.windows:
        index = np.concatenate([np.arange(member.part.rows) + member.part.first_index for member in window])
        order = np.arange(len(index))
        if settings.shuffle_window > 1:
            order = np.argsort(_mixed(index, settings.shuffle_seed), kind="stable")
        orders.append(first + order)
        first += len(index)
    rows = np.concatenate(orders)
    bounds = [len(rows) * file // group.files for file in range(group.files + 1)]
    return [rows[begin:end] for begin, end in pairwise(bounds)]


def _mixed(index: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 of the seed and each index: uint64 [N]; no library's generator, whose stream may change."""
    start = splitmix64(np.array([seed % (1 << 64)], np.uint64) + GOLDEN)
    return splitmix64(start + index.astype(np.uint64) * GOLDEN + GOLDEN)
