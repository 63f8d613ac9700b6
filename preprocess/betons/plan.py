"""Which rows stand in which beton: a pure function of the shards' rows and the settings, known before any image is
read.

shards with rows -> windows of `shuffle_window` neighbours -> groups, the unit of work: one beton's worth of windows, or one larger window
                 -> the group's rows, each window's shuffled -> `files` even stretches, a beton each
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """A shard that has rows. `number`: its position among the manifest's shards; `bytes`: its part in the size of a
    beton.
    """

    shard: Shard
    part: ShardPart
    number: int
    bytes: int

    @property
    def wanted(self) -> list[Any]:
        """What a marker has to say of the shard."""
        return [self.part.name, self.part.first_index, self.part.labels_sha256, self.shard.source]


@dataclass(frozen=True)
class Group:
    """`first`: number of its first beton; `files`: how many betons it makes; `windows`: its shards, in order."""

    first: int
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
        """What a marker has to say for its betons to be this group's."""
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
        return [
            (int(path.stem), path) for path in paths if path.stem.isdecimal() and path.stem == f"{int(path.stem):05d}"
        ]


def image_folder(layout: Layout, *, copy: bool) -> ImageFolder:
    """`copy`: of betons, else of image index files."""
    if copy:
        return ImageFolder(layout.betons, ".beton", layout.markers / "beton")
    return ImageFolder(layout.image_index, ".npy", layout.markers / "places")


def plan_groups(batches: Sequence[Sequence[Member]], settings: Build) -> list[Group]:
    """All groups in order. No group spans two `batches`: what `preprocess append` adds leaves earlier betons as they
    are.
    """
    groups: list[Group] = []
    for batch in batches:
        for windows in _gathered(
            [list(batch[at : at + settings.shuffle_window]) for at in range(0, len(batch), settings.shuffle_window)],
            settings,
        ):
            rows, size = _totals(windows)
            files = max(-(-rows // settings.beton_samples), -(-size // _limit(settings)))
            groups.append(Group(groups[-1].first + groups[-1].files if groups else 0, min(files, rows), windows))
    return groups


def _gathered(windows: list[list[Member]], settings: Build) -> Iterator[list[list[Member]]]:
    """Neighbouring windows that fit one beton together; a larger window stands alone."""
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

    A row's place within its window is decided by the seed and its index among all rows alone.
    """
    stretches, first = [], 0
    for window in group.windows:
        index = np.concatenate([np.arange(member.part.rows) + member.part.first_index for member in window])
        order = (
            np.arange(len(index))
            if settings.shuffle_window == 1
            else np.argsort(_mixed(index, settings.shuffle_seed), kind="stable")
        )
        stretches.append(first + order)
        first += len(index)
    rows = np.concatenate(stretches)
    return [
        rows[len(rows) * file // group.files : len(rows) * (file + 1) // group.files] for file in range(group.files)
    ]


def _mixed(index: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 of the seed and each index: uint64 [N]; no library's generator, whose stream may change."""
    start = splitmix64(np.array([seed % (1 << 64)], np.uint64) + GOLDEN)
    return splitmix64(start + index.astype(np.uint64) * GOLDEN + GOLDEN)
