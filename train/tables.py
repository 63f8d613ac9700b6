"""Open all files of a set and tell compiled code where everything lies in them: cost by file, not by sample."""

from typing import NamedTuple

import numpy as np

from labels import beton
from labels.arrays import Column, shards_needed
from labels.layout import Layout
from labels.manifest import BetonPart
from labels.places import read_sources
from labels.storage import is_remote
from train.data.files import OpenFiles, allow_open_files
from train.data.image_index import NO_FILE, Tables
from train.data.mixture import Opened


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
    """Open everything but betons in object stores, which are NO_FILE until train/data/cache.py has them here.

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
    if one.manifest.places:
        file, table = files.places(path, part, one.rebuild)
        return _Part(file, part.bytes, table, 0, first_row, shards)
    allocations = part.bytes - 2 * part.samples * beton.ALLOCATION.itemsize
    file = NO_FILE if is_remote(path) else files.beton(path, part, one.manifest.label_limit, one.rebuild)
    return _Part(file, part.bytes, beton.METADATA_OFFSET, allocations, first_row, shards)


def _open_shards(one: Opened, needed: set[str], files: OpenFiles, label_limit: int, column: Column) -> list[_Shard]:
    """One entry for every shard of the manifest, so that their numbers hold; those without samples are not opened."""
    layout = Layout(one.source.out)
    tars = read_sources(layout) if one.manifest.places else {}
    found = []
    for part in one.labels.shards:
        row_file, rows_at = files.rows(one.labels_out, part, label_limit, column) if part.name in needed else (NO_FILE, 0)
        tar, length = NO_FILE, 0
        if tars and part.name in needed:
            tar, length = files.tar(part.name, tars.get(part.name), layout.place_sources)
        found.append(_Shard(part.first_index, part.rows, row_file, rows_at, tar, length))
    return found
