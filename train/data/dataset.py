"""The training set: the samples of one or several output folders as one numbered sequence, checked and open.

    OUT/manifest.json -> OUT/beton/*.beton, or OUT/places/*.npy and the user's tars --+
    OTHER_OUT/rows/*.npy: labels made later, for the same rows -----------------------+-> BetonSet -> Tables

A sample's number counts through the sample files (betons, or image indexes). Tables, which compiled code reads, hold
descriptors and offsets: opening costs one header a file, nothing a sample. K label limit, V vocabulary.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labels import Combination, beton
from labels.arrays import Column, rows_file, shards_needed
from labels.idf import combined, read_gains
from labels.manifest import BetonPart, Manifest, read_sources
from labels.storage import Layout, UserError, fingerprint, is_remote, sha256_file
from train.data.files import Cache, OpenFiles, Staging, allow_open_files
from train.data.image_index import NO_FILE, TABLE_BYTES, SampleSpan, Tables, find_sample
from train.data.mixture import DataSource, Mixture, OpenedSource, check_agreement, idf_of, idf_table, open_source

Kept = Callable[[np.ndarray], np.ndarray]
"""Sample numbers of the order, int64 [N] -> those of the files."""


class BetonSet:
    """All samples of one or more output folders, with their own labels or those of others.

    Args:
        sources: an output folder, or a mixture of several.
        labels: where `sources` is one folder, another whose labels are taken, as arrays (train/data/open.py).
        idf: an idf.parquet, or an output folder that has one, instead of the sources' own.
        cache: where betons of object stores are kept; None refuses them.
        column: the label set of a caption, or its tokens in order, which are read from arrays (train/data/open.py).

    Raises UserError where something is missing, damaged, or does not belong together.
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
        mixture = sources if isinstance(sources, Mixture) else Mixture((DataSource(sources, labels),))
        self.opened = [open_source(source) for source in mixture.sources]
        check_agreement(self.opened)
        self.idf_path = idf_table(self.opened[0], idf)
        self.idf, self.idf_sha256 = idf_of(self.opened, idf)  # float32 [V]
        self.weights = self.idf  # float32 [V], of the labels in the loss
        self.vocabulary, self.label_limit = len(self.idf), self.opened[0].labels.label_limit
        self._owners = [source for source in self.opened for _ in source.parts]
        self.parts = [part for source in self.opened for part in source.parts]  # the sample files in their manifests
        self.paths = [source.path(part) for source, part in zip(self._owners, self.parts, strict=True)]
        self.quotas = mixture.quotas  # how many of every sum(quotas) samples come from each group
        self.sizes = self._all_sizes()  # samples of each group
        self._column: Column = column
        self.files = OpenFiles()
        self.tables = open_tables(self.opened, self.files, self.label_limit, column)
        self.staging = self._stage(cache)
        # Which samples there are, in the order of their numbers, and a name for them; None for all.
        self._kept: tuple[Kept, str] | None = None
        self._subset: np.ndarray | None = None  # as `restrict` was given it

    def _stage(self, cache: Cache | None) -> Staging | None:
        if not any(map(is_remote, self.paths)):
            return None
        if cache is None:
            raise UserError(f"{self.opened[0].source.out} is not on this machine", fix="copy it to a local folder")

        def open_copy(number: int, copy: Path) -> int:
            owner = self._owners[number]
            return self.files.beton(copy, self.parts[number], owner.manifest.label_limit, owner.rebuild)

        return Staging(self.parts, self.paths, self.tables, self.files, open_copy, cache)

    def weigh(self, path: Path, combination: Combination, floor: float) -> None:
        """Take the label weights of a visual.parquet; UserError where it is another vocabulary's."""
        gains = read_gains(path, self.labels.tokenizer, self.labels_out)
        self.weights = combined(self.idf, gains, combination, floor)
        self.idf_sha256 = fingerprint([self.idf_sha256, sha256_file(path)])

    def restrict(self, samples: np.ndarray, name: str) -> None:
        """Keep a subset, called `name`: ascending sample numbers, int64; repeated ones come several times an epoch."""
        borders = np.cumsum([0, *self._all_sizes()])
        self._keep(samples.__getitem__, name, np.diff(np.searchsorted(samples, borders)).tolist(), "train.data.subset")
        self._subset = samples

    def hold_out(self, every: int) -> "BetonSet":
        """Keep all samples but each `every`-th, and return a set of those; `every` is 2 or more.

        Which they are depends on their numbers alone, so that it takes no memory. A repeated sample of a subset is
        wholly on one side.
        """
        held, name = copy(self), f"each {every}th sample"
        if self._subset is not None:
            chosen = self._subset % every == every - 1
            held.restrict(self._subset[chosen], name)
            self.restrict(self._subset[~chosen], f"{self._name}, not {name}")
            return held
        borders = np.cumsum([0, *self.sizes])
        counts = np.diff(borders // every)
        held._keep(lambda numbers: numbers * every + every - 1, name, counts.tolist(), "train.validation.held_out")
        rest = (np.array(self.sizes) - counts).tolist()
        self._keep(lambda numbers: numbers + numbers // (every - 1), f"not {name}", rest, "train.validation.held_out")
        return held

    def hold_out_samples(self, samples: np.ndarray, name: str) -> "BetonSet":
        """Keep all samples but these, called `name`: ascending sample numbers, int64; return a set of these."""
        held, own = copy(self), self._subset
        own = np.arange(sum(part.samples for part in self.parts)) if own is None else own
        held.restrict(np.unique(samples), name)
        self.restrict(own[~np.isin(own, samples)], f"{self._name}, not {name}")
        return held

    def _all_sizes(self) -> list[int]:
        sizes = [0] * len(self.quotas)
        for opened in self.opened:
            sizes[opened.source.group] += sum(part.samples for part in opened.parts)
        return sizes

    def _keep(self, kept: "Kept", name: str, sizes: list[int], key: str) -> None:
        self._kept, self.sizes = (kept, name), sizes
        if not all(sizes):
            raise UserError(f"{key} leaves no sample of a --beton", fix=f"set another {key}, or omit that --beton")

    @property
    def _name(self) -> str:
        """The name of the samples that were kept."""
        return self._kept[1] if self._kept else "all"

    def file_samples(self, samples: np.ndarray) -> np.ndarray:
        """Sample numbers of the order -> sample numbers of the files; they differ where only a part was kept."""
        return samples if self._kept is None else self._kept[0](samples)

    # What all sources agree on, and messages about one source, come from the first.
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
        labels, betons = (
            [getattr(source, name).fingerprint for source in self.opened] for name in ("labels", "manifest")
        )
        parts = [[opened.source.numbers, opened.source.group] for opened in self.opened]
        subset = self._kept[1] if self._kept else None
        whole = parts == [[None, 0]] and subset is None
        return {
            "labels": labels[0] if len(labels) == 1 else fingerprint(labels),
            "idf": self.idf_sha256,
            "betons": betons[0] if whole else fingerprint([betons, parts, self.quotas, subset]),
        }

    def fetch(self, numbers: Sequence[int]) -> None:
        """Have sample files ready to be read; UserError where one was removed, cut, or cannot be fetched."""
        if self.staging:
            self.staging.fetch(numbers)
        for number in numbers:
            if self.staging and number in self.staging.remote:
                continue  # its copy may be closed again
            stat = os.fstat(self.tables.files[number])
            if stat.st_nlink == 0:
                problem = "was removed or replaced while it was in use"
            elif stat.st_size != self.parts[number].bytes:
                problem = f"has {stat.st_size} bytes, and had {self.parts[number].bytes} when it was opened"
            else:
                continue
            fix = "put it back; the same command resumes from the last checkpoint"
            raise UserError(f"{self.paths[number]} {problem}", fix=fix)

    def held(self, samples: np.ndarray) -> AbstractContextManager[None]:
        """Keep the files of these samples open until the block ends."""
        return self.staging.held(self.numbers(samples)) if self.staging else nullcontext()

    def number(self, sample: int) -> int:
        """The number of the sample file that holds a sample."""
        return int(np.searchsorted(self.tables.first_samples, sample, side="right")) - 1

    def numbers(self, samples: np.ndarray) -> list[int]:
        """The numbers of the sample files that hold these samples: each once, ascending."""
        return np.unique(np.searchsorted(self.tables.first_samples, samples, side="right") - 1).tolist()

    def owner(self, sample: int) -> OpenedSource:
        return self._owners[self.number(sample)]

    def span(self, sample: int) -> SampleSpan:
        return find_sample(self.tables, sample, self.label_limit, np.empty(TABLE_BYTES, np.uint8))

    def name(self, sample: int) -> str:
        """File and position of a sample, for messages."""
        number = self.number(sample)
        return f"{self.paths[number]}, sample {sample - self.tables.first_samples[number]}"

    def label_array(self, sample: int) -> Path | None:
        """The array that the labels of a sample are read from; None where the beton itself holds them."""
        number, owner = self.number(sample), self.owner(sample)
        begin, end = self.tables.shards[number]
        if begin == end:
            return None
        index = self.span(sample).row - self.tables.first_rows[number]
        shard = max(int(np.searchsorted(self.tables.first_indices[begin:end], index, side="right")) - 1, 0)
        return rows_file(owner.labels_out, owner.labels.shards[shard], self._column)

    def image_file(self, sample: int) -> Path:
        """The beton or the tar that holds the image of a sample."""
        owner, number = self.owner(sample), self.number(sample)
        begin, end = self.tables.shards[number]
        shards = np.flatnonzero(self.tables.tars[begin:end] == self.span(sample).file)
        if not owner.manifest.image_index or not len(shards):
            return self.paths[number]
        return Path(read_sources(Layout(owner.source.out))[owner.manifest.shards[shards[0]].name].path)

    def check_bytes(self, numbers: Sequence[int]) -> None:
        """Compare the SHA-256 of sample files with their manifests, by reading all; UserError where one differs."""
        for number in numbers:
            actual, expected, owner = sha256_file(self.paths[number]), self.parts[number].sha256, self._owners[number]
            if actual != expected:
                raise UserError(
                    f"{self.paths[number]} is damaged: SHA-256 {actual[:16]}..., in the manifest {expected[:16]}...",
                    fix=f"run `preprocess verify {owner.source.out}`, then {owner.rebuild}",
                )


class _Part(NamedTuple):
    """One sample file, in the order of Tables' fields."""

    file: int
    bytes: int
    table: int
    allocations: int
    first_row: int
    shards_begin: int
    shards_end: int


class _Shard(NamedTuple):
    """One shard whose labels or images are not in betons, in the order of Tables' fields."""

    first_index: int
    rows: int
    row_file: int
    rows_at: int
    tar: int
    tar_bytes: int


def open_tables(opened: list[OpenedSource], files: OpenFiles, label_limit: int, column: Column = "label_ids") -> Tables:
    """Open everything but betons in object stores, which are NO_FILE until Staging has fetched them."""
    needed = [{part.name for part in shards_needed(source.manifest, source.labels, column)} for source in opened]
    allow_open_files(sum(len(source.parts) for source in opened) + 2 * sum(map(len, needed)))
    parts: list[_Part] = []
    shards: list[_Shard] = []
    rows_before = 0
    for source, names in zip(opened, needed, strict=True):
        begin = len(shards)
        if names:
            shards += _open_shards(source, names, files, label_limit, column)
        parts += [_open_part(source, part, files, rows_before, (begin, len(shards))) for part in source.parts]
        rows_before += sum(part.rows for part in source.manifest.shards)
    counts = np.array([part.samples for source in opened for part in source.parts], np.int64)
    part_columns = np.array(parts, np.int64).T.copy()
    shard_columns = np.array(shards, np.int64).reshape(-1, len(_Shard._fields)).T.copy()
    first_samples = np.concatenate([[0], np.cumsum(counts)])
    return Tables._make([first_samples, *part_columns[:5], part_columns[5:].T.copy(), *shard_columns])


def _open_part(
    opened: OpenedSource, part: BetonPart, files: OpenFiles, first_row: int, shards: tuple[int, int]
) -> _Part:
    path = opened.path(part)
    if opened.manifest.image_index:
        file, table = files.image_index(path, part, opened.rebuild)
        return _Part(file, part.bytes, table, 0, first_row, *shards)
    allocations = part.bytes - 2 * part.samples * beton.ALLOCATION.itemsize
    file = NO_FILE if is_remote(path) else files.beton(path, part, opened.manifest.label_limit, opened.rebuild)
    return _Part(file, part.bytes, beton.METADATA_OFFSET, allocations, first_row, *shards)


def _open_shards(
    opened: OpenedSource, needed: set[str], files: OpenFiles, label_limit: int, column: Column
) -> list[_Shard]:
    """An entry for every shard of the manifest, so that numbers hold; those without samples are not opened."""
    layout = Layout(opened.source.out)
    tars = read_sources(layout) if opened.manifest.image_index else {}
    shards = []
    for part in opened.labels.shards:
        row_file, rows_at, tar, length = NO_FILE, 0, NO_FILE, 0
        if part.name in needed:
            row_file, rows_at = files.label_array(opened.labels_out, part, label_limit, column)
            if tars:
                tar, length = files.tar(part.name, tars.get(part.name), layout.image_sources)
        shards.append(_Shard(part.first_index, part.rows, row_file, rows_at, tar, length))
    return shards
