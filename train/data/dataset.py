"""Many files of samples as one set: betons, or image indexes of the user's tars, of one OUT or of several.

OUT/manifest.json -> OUT/beton/*.beton, or OUT/places/*.npy and the tars --+
OTHER_OUT/rows/*.npy (labels made later, for the same rows) ---------------+-> BetonSet -> tables that train/data/image_index.py reads
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labels import beton
from labels.arrays import Column, rows_file, shards_needed
from labels.manifest import BetonPart, Manifest, read_sources
from labels.storage import Layout, UserError, fingerprint, is_remote, sha256_file
from train.data.files import Cache, OpenFiles, Staging, allow_open_files
from train.data.image_index import NO_FILE, TABLE_BYTES, SampleSpan, Tables, find
from train.data.mixture import Mixture, Opened, Source, check_agreement, idf_of, open_out

# ---- tables: Open all files of a set and tell compiled code where everything lies in them: cost by file, not by
# sample.


class _Part(NamedTuple):
    """One file of samples, in the order of Tables' fields."""

    file: int
    bytes: int
    table: int
    allocations: int
    first_row: int
    shards: tuple[int, int]


class _Shard(NamedTuple):
    """One shard of an OUT whose labels or images do not lie in betons."""

    first_index: int
    rows: int
    row_file: int
    rows_at: int
    tar: int
    tar_bytes: int


def open_tables(opened: list[Opened], files: OpenFiles, label_limit: int, column: Column = "label_ids") -> Tables:
    """Open everything but betons in object stores, which are NO_FILE until train/data/files.py has them here.

    Args:
        opened: the OUTs.
        files: keeps the descriptors.
        label_limit: K.
        column: of the label files, what rows are of.

    Raises:
        UserError: a file is missing, damaged, or not the one of its manifest.
    """
    needed = [{part.name for part in shards_needed(one.manifest, one.labels, column)} for one in opened]
    allow_open_files(sum(len(one.parts) for one in opened) + 2 * sum(map(len, needed)))
    parts: list[_Part] = []
    shards: list[_Shard] = []
    rows_before = 0
    for one, names in zip(opened, needed, strict=True):
        begin = len(shards)
        if names:
            shards += _open_shards(one, names, files, label_limit, column)
        parts += [_open_part(one, part, files, rows_before, (begin, len(shards))) for part in one.parts]
        rows_before += sum(part.rows for part in one.manifest.shards)
    columns = np.array(parts, dtype=object).reshape(len(parts), -1)
    of_shards = np.array(shards, np.int64).reshape(-1, len(_Shard._fields)).T.copy()
    counts = np.array([part.samples for one in opened for part in one.parts], np.int64)
    return Tables(
        first_samples=np.concatenate([[0], np.cumsum(counts)]),
        files=columns[:, 0].astype(np.int64),
        bytes=columns[:, 1].astype(np.int64),
        tables=columns[:, 2].astype(np.int64),
        allocations=columns[:, 3].astype(np.int64),
        first_rows=columns[:, 4].astype(np.int64),
        shards=np.array([part.shards for part in parts], np.int64),
        first_indices=of_shards[0],
        row_counts=of_shards[1],
        row_files=of_shards[2],
        rows_at=of_shards[3],
        tars=of_shards[4],
        tar_bytes=of_shards[5],
    )


def _open_part(one: Opened, part: BetonPart, files: OpenFiles, first_row: int, shards: tuple[int, int]) -> _Part:
    path = one.path(part)
    if one.manifest.image_index:
        file, table = files.image_index(path, part, one.rebuild)
        return _Part(file, part.bytes, table, 0, first_row, shards)
    allocations = part.bytes - 2 * part.samples * beton.ALLOCATION.itemsize
    file = NO_FILE if is_remote(path) else files.beton(path, part, one.manifest.label_limit, one.rebuild)
    return _Part(file, part.bytes, beton.METADATA_OFFSET, allocations, first_row, shards)


def _open_shards(one: Opened, needed: set[str], files: OpenFiles, label_limit: int, column: Column) -> list[_Shard]:
    """One entry for every shard of the manifest, so that their numbers hold; those without samples are not opened."""
    layout = Layout(one.source.out)
    tars = read_sources(layout) if one.manifest.image_index else {}
    found = []
    for part in one.labels.shards:
        row_file, rows_at = (
            files.label_array(one.labels_out, part, label_limit, column) if part.name in needed else (NO_FILE, 0)
        )
        tar, length = NO_FILE, 0
        if tars and part.name in needed:
            tar, length = files.tar(part.name, tars.get(part.name), layout.image_sources)
        found.append(_Shard(part.first_index, part.rows, row_file, rows_at, tar, length))
    return found


class BetonSet:
    """All samples of one or more OUTs, with their own labels or those of others.

    Args:
        sources: an OUT, or what train/data/mixture.py made of several.
        labels: where `sources` is one OUT, another whose labels are taken, their arrays made (train/data/open.py).
        idf: an idf.parquet, or an OUT that has one, to be taken instead of the OUTs' own.
        cache: where betons of object stores are kept; None refuses them.
        column: what rows are of: the label set of a caption, or its tokens in order, which are mapped from arrays
            (train/data/open.py).

    Attributes:
        opened: sources and manifests.
        parts, paths: the files of samples, as their manifests tell of them and where they are.
        sizes: samples of each group; `samples`: N, of all together.
        quotas: how many of every `sum(quotas)` samples come from each group.
        label_limit: K.
        vocabulary: V.
        idf: float32 [V]; `idf_sha256`: of its table.
        files: what is open.
        tables: for compiled code.

    Raises:
        UserError: something is missing, damaged, or does not belong together.
    """

    def __init__(
        self,
        sources: Path | Mixture,
        labels: Path | None = None,
        *,
        idf: Path | None = None,
        cache: Cache | None = None,
        column: Column = "label_ids",
    ) -> None:
        mixture = sources if isinstance(sources, Mixture) else Mixture((Source(sources, labels),))
        self.opened = [open_out(source) for source in mixture.sources]
        check_agreement(self.opened)
        self.idf, self.idf_sha256 = idf_of(self.opened, idf)
        self.vocabulary, self.label_limit = len(self.idf), self.opened[0].labels.label_limit
        self._owners = [one for one in self.opened for _ in one.parts]
        self.parts = [part for one in self.opened for part in one.parts]
        self.paths = [one.path(part) for one, part in zip(self._owners, self.parts, strict=True)]
        self.quotas = mixture.quotas
        self.sizes = [0] * len(self.quotas)
        for one in self.opened:
            self.sizes[one.source.group] += sum(part.samples for part in one.parts)
        self._column: Column = column
        self.files = OpenFiles()
        self.tables = open_tables(self.opened, self.files, self.label_limit, column)
        self.staging = self._stage(cache)
        self._part: tuple[np.ndarray, str] | None = None

    def _stage(self, cache: Cache | None) -> Staging | None:
        if not any(map(is_remote, self.paths)):
            return None
        if cache is None:
            raise UserError(f"{self.opened[0].source.out} is not on this machine", fix="copy it to a local folder")

        def open_copy(number: int, copy: Path) -> int:
            one = self._owners[number]
            return self.files.beton(copy, self.parts[number], one.manifest.label_limit, one.rebuild)

        return Staging(self.parts, self.paths, self.tables, self.files, open_copy, cache)

    def restrict(self, part: np.ndarray, name: str) -> None:
        """Keep a part of the samples.

        Args:
            part: int64, their numbers, ascending; one that is there twice comes twice an epoch.
            name: what tells this part from others.

        Raises:
            UserError: a group has no sample in it.
        """
        borders = np.cumsum([0, *self.sizes])
        self.sizes = np.diff(np.searchsorted(part, borders)).tolist()
        self._part = part, name
        if not all(self.sizes):
            raise UserError(
                "train.data.subset leaves no sample of a --beton", fix="name another subset, or leave that --beton out"
            )

    def chosen(self, numbers: np.ndarray) -> np.ndarray:
        """Sample numbers of the order -> sample numbers of the files: other ones where only a part was kept."""
        return numbers if self._part is None else self._part[0][numbers]

    # What all OUTs agree on, and messages of one OUT, come from the first.
    @property
    def out(self) -> Path:
        return self.opened[0].source.out

    @property
    def labels_out(self) -> Path:
        return self.opened[0].labels_out

    @property
    def manifest(self) -> Manifest:
        return self.opened[0].manifest

    @property
    def labels(self) -> Manifest:
        return self.opened[0].labels

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def identity(self) -> dict[str, str]:
        """What must stay the same from the first to the last step of a run."""
        labels, betons = ([getattr(one, name).fingerprint for one in self.opened] for name in ("labels", "manifest"))
        parts = [[one.source.numbers, one.source.group] for one in self.opened]
        subset = self._part[1] if self._part else None
        whole = parts == [[None, 0]] and subset is None
        return {
            "labels": labels[0] if len(labels) == 1 else fingerprint(labels),
            "idf": self.idf_sha256,
            "betons": betons[0] if whole else fingerprint([betons, parts, self.quotas, subset]),
        }

    def bring(self, numbers: Sequence[int]) -> None:
        """Have files of samples ready for reading.

        Raises:
            UserError: one is gone, cut, or cannot be fetched.
        """
        if self.staging:
            self.staging.fetch(numbers)
        self._check_presence(numbers)

    def held(self, samples: np.ndarray) -> AbstractContextManager[None]:
        """Keep the files of these samples open until the block ends."""
        return self.staging.held(self.numbers(samples)) if self.staging else nullcontext()

    def number(self, sample: int) -> int:
        """Which file of samples a sample is in."""
        return int(np.searchsorted(self.tables.first_samples, sample, side="right")) - 1

    def numbers(self, samples: np.ndarray) -> list[int]:
        """Which files of samples hold these samples: each once, ascending."""
        return np.unique(np.searchsorted(self.tables.first_samples, samples, side="right") - 1).tolist()

    def owner(self, sample: int) -> Opened:
        """The OUT that a sample is of."""
        return self._owners[self.number(sample)]

    def span(self, sample: int) -> SampleSpan:
        """Where a sample lies."""
        return find(self.tables, sample, self.label_limit, np.empty(TABLE_BYTES, np.uint8))

    def name(self, sample: int) -> str:
        """Where sample number `sample` lies, for messages."""
        number = self.number(sample)
        return f"{self.paths[number]}, sample {sample - self.tables.first_samples[number]}"

    def label_array(self, sample: int) -> Path | None:
        """The array that the labels of a sample are read from; None where the beton itself holds them."""
        begin, end = self.tables.shards[self.number(sample)]
        if begin == end:
            return None
        index = self.span(sample).row - self.tables.first_rows[self.number(sample)]
        shard = max(int(np.searchsorted(self.tables.first_indices[begin:end], index, side="right")) - 1, 0)
        return rows_file(self.owner(sample).labels_out, self.owner(sample).labels.shards[shard], self._column)

    def image_file(self, sample: int) -> Path:
        """The beton or the tar that holds the image of a sample."""
        opened, number = self.owner(sample), self.number(sample)
        begin, end = self.tables.shards[number]
        found = np.flatnonzero(self.tables.tars[begin:end] == self.span(sample).file)
        if not opened.manifest.image_index or not len(found):
            return self.paths[number]
        return Path(read_sources(Layout(opened.source.out))[opened.manifest.shards[found[0]].name].path)

    def _check_presence(self, numbers: Sequence[int]) -> None:
        """Refuse files of samples that were removed or cut since they were opened.

        Args:
            numbers: which of them.

        Raises:
            UserError: naming the first.
        """
        for number in numbers:
            if self.staging and number in self.staging.remote:
                continue  # its copy comes and goes
            found = os.fstat(self.tables.files[number])
            if found.st_nlink == 0:
                what = "was removed or replaced while it was in use"
            elif found.st_size != self.parts[number].bytes:
                what = f"has {found.st_size} bytes, and had {self.parts[number].bytes} when it was opened"
            else:
                continue
            raise UserError(
                f"{self.paths[number]} {what}", fix="put it back; the same command goes on from the last checkpoint"
            )

    def check_bytes(self, numbers: Sequence[int]) -> None:
        """Compare the SHA-256 of whole files of samples with their manifests: reads everything.

        Raises:
            UserError: naming the first that differs.
        """
        for number in numbers:
            found, wanted = sha256_file(self.paths[number]), self.parts[number].sha256
            if found != wanted:
                raise UserError(
                    f"{self.paths[number]} is damaged: SHA-256 {found[:16]}..., in the manifest {wanted[:16]}...",
                    fix=f"run `preprocess verify {self._owners[number].source.out}`, then {self._owners[number].rebuild}",
                )
