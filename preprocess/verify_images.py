"""The part of `preprocess verify` that reads betons, or the files of places and the lengths of the tars they point into."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels import beton
from labels.errors import UserError
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, ShardPart
from labels.places import open_places, read_sources
from labels.sparse import pad_rows
from labels.storage import local_copy, sha256_file
from preprocess.betons.plan import image_folder


def image_faults(layout: Layout, manifest: Manifest, whole: set[str]) -> list[str]:
    """Faults of everything that the second pass wrote; the marker of a faulty file's group is dropped.

    Args:
        layout, manifest: of OUT.
        whole: names of the shards whose label files are sound; only their label rows are compared.
    """
    faults = []
    shards = {shard.name: shard for shard in manifest.shards}
    for parts, copy in ((manifest.betons, True), (manifest.places, False)):
        for part in parts:
            of_part = [shards[name] for name in part.shards]
            found = _beton_faults(layout, part, manifest, of_part, whole) if copy else _place_faults(layout, part, manifest, of_part)
            if found:
                _drop_marker(layout, part.number, copy=copy)
            faults += found
    return faults + (_source_faults(layout, manifest) if manifest.places else [])


@contextmanager
def unchanged(path: Path, expected: str) -> Iterator[tuple[Path, list[str]]]:
    """The file to read, here (an object is downloaded for the block), and what is wrong with it as a whole."""
    if not path.is_file():
        yield path, [f"{path}: missing"]
        return
    with local_copy(path) as file:
        found = sha256_file(file)
        same = found == expected
        yield file, [] if same else [f"{path}: changed since the build (SHA-256 {found[:16]}..., in the manifest {expected[:16]}...)"]


def lists_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] and offsets [N + 1] of the label_ids column."""
    if not len(table):
        return np.empty(0, np.int32), np.zeros(1, np.int32)
    lists = table["label_ids"].chunk(0)
    return lists.values.to_numpy(), lists.offsets.to_numpy()


def _drop_marker(layout: Layout, number: int, *, copy: bool) -> None:
    """Drop the marker of the group that file `number` is of: the last that begins at or before it."""
    markers = {first: path for first, path in image_folder(layout, copy=copy).numbered() if path.suffix == ".json" and first <= number}
    if markers:
        markers[max(markers)].unlink(missing_ok=True)


def _beton_faults(layout: Layout, part: BetonPart, manifest: Manifest, shards: list[ShardPart], whole: set[str]) -> list[str]:
    path = layout.beton_file(part.number)
    with unchanged(path, part.sha256) as (file, changed):
        if changed:
            return changed
        data = np.memmap(file, np.uint8, mode="r")
        header = data[: beton.HEADER.itemsize].view(beton.HEADER)[0]
        if header["version"] != beton.VERSION or header["num_samples"] != part.samples:
            told = f"version {header['version']}, {header['num_samples']} samples"
            return [f"{path}: {told}; in the manifest {beton.VERSION}, {part.samples}"]
        end = beton.METADATA_OFFSET + part.samples * beton.METADATA.itemsize
        metadata = data[beton.METADATA_OFFSET : end].view(beton.METADATA)
        if found := _index_faults(path, metadata["index"], shards, manifest):
            return found
        return _label_faults(layout, path, data, metadata, [shard for shard in shards if shard.name in whole], manifest.label_limit)


def _index_faults(path: Path, index: np.ndarray, shards: list[ShardPart], manifest: Manifest) -> list[str]:
    """Every row at most once, and of one of the file's shards; rising, unless shards were shuffled."""
    ordered = np.sort(index) if manifest.options["images"]["shuffle_window"] > 1 else index
    ours = np.zeros(len(index), np.bool_)
    for shard in shards:
        ours |= (index >= shard.first_index) & (index < shard.first_index + shard.rows)
    if not ours.all() or (np.diff(ordered.astype(np.int64)) <= 0).any():
        return [f"{path}: its indices are not rising rows of shard {', '.join(shard.name for shard in shards)}"]
    return []


def _label_faults(
    layout: Layout, path: Path, data: np.ndarray, metadata: np.ndarray, shards: list[ShardPart], label_limit: int
) -> list[str]:
    for shard in shards:
        mine = metadata[(metadata["index"] >= shard.first_index) & (metadata["index"] < shard.first_index + shard.rows)]
        with local_copy(layout.label_file(shard.name)) as labels:
            expected = pad_rows(*lists_of(pq.read_table(labels).combine_chunks()), label_limit)
        at = mine["labels_ptr"].astype(np.int64)[:, None] + np.arange(4 * label_limit)
        if not np.array_equal(data[at].view("<i4"), expected[mine["index"] - shard.first_index]):
            return [f"{path}: its label rows are not those of the label file of {shard.name}"]
    return []


def _place_faults(layout: Layout, part: BetonPart, manifest: Manifest, shards: list[ShardPart]) -> list[str]:
    path = layout.place_file(part.number)
    with unchanged(path, part.sha256) as (file, changed):
        if changed:
            return changed
        try:
            places = open_places(file)
        except UserError as error:
            return [error.problem]
        if len(places) != part.samples:
            return [f"{path}: {len(places)} places, in the manifest {part.samples}"]
        tars = np.array([shard.source_bytes for shard in manifest.shards], np.int64)
        numbers = places["shard"].astype(np.int64)
        if (numbers >= len(tars)).any() or (
            places["offset"].astype(np.int64) + places["bytes"] > tars[np.minimum(numbers, len(tars) - 1)]
        ).any():
            return [f"{path}: a place lies outside of its tar"]
        return _index_faults(path, places["index"], shards, manifest)


def _source_faults(layout: Layout, manifest: Manifest) -> list[str]:
    """The tars that the places point into have to be there, with the length that they had."""
    try:
        sources = read_sources(layout)
    except UserError as error:
        return [error.problem]
    faults = []
    for shard in manifest.shards:
        source = sources.get(shard.name)
        if source is None:
            faults.append(f"{layout.place_sources}: the shard {shard.name} is missing")
        elif not Path(source.path).is_file():
            faults.append(
                f"{source.path}: missing, but images of {shard.name} lie in it; if it was moved, say where to in {layout.place_sources}"
            )
        elif (size := Path(source.path).stat().st_size) != shard.source_bytes:
            faults.append(f"{source.path}: {size} bytes, in the manifest {shard.source_bytes}: images of {shard.name} lie in it")
    return faults
