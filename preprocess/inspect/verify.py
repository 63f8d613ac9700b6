"""`preprocess verify`: read back everything that a build wrote: `verify_build` -> faults, one line each.

    label files     against the manifest, the schema and their counts -> document frequencies
    idf.parquet     against these; idf.duckdb against both
    betons          against the rows of their label files; image index: against the lengths of the tars
    quarantine.parquet, pairs, subset.npy   by their SHA-256

A faulty file's marker is removed, so that the build command makes the file again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels import beton
from labels.arrays import pad_rows
from labels.idf import idf_weights
from labels.manifest import (
    COUNTS,
    LABELS,
    BetonPart,
    Manifest,
    ShardPart,
    open_image_index,
    read_manifest,
    read_sources,
)
from labels.show.terminal import count
from labels.storage import Layout, UserError, local_copy, sha256_file
from preprocess.betons.plan import image_folder
from preprocess.inspect.sql import open_tables
from preprocess.stage import CorpusMarker, read_inputs, read_marker


def verify_build(out: Path) -> list[str]:
    """All faults, one line each with the file and what differs; empty if the label dataset is whole."""
    manifest, layout = read_manifest(out), Layout(out)
    frequency = np.zeros(manifest.tokenizer.vocabulary, np.int64)
    faults: list[str] = []
    inputs = read_inputs(layout)
    begun = {shard.name for shard in inputs.shards} if inputs else set()
    built = {shard.name for shard in manifest.shards}
    unfinished = f"of an append that has not finished; `preprocess append {out}` resumes it, --undo removes it"
    for path in sorted(layout.labels.glob("*.parquet")):
        if path.stem not in built:
            faults.append(f"{path}: {unfinished if path.stem in begun else 'not of this build; move it away'}")
    sound: set[str] = set()
    for shard in manifest.shards:
        if of_shard := _label_faults(layout, shard, manifest, frequency):
            layout.label_marker(shard.name).unlink(missing_ok=True)
            faults += of_shard
        else:
            sound.add(shard.name)
    if not faults:  # a damaged label file makes every count and label row differ: report the cause alone
        faults += _idf_faults(layout, manifest, frequency)
        if faults:
            (layout.markers / "idf.json").unlink(missing_ok=True)
    faults += _image_faults(layout, manifest, sound)
    faults += _option_faults(layout, manifest)
    if not layout.quarantine.is_file() or sha256_file(layout.quarantine) != manifest.quarantine_sha256:
        faults.append(f"{layout.quarantine}: missing or changed since the build")
    return faults


def repair_command(out: Path) -> str:
    """The command that makes faulty files again."""
    inputs = read_inputs(Layout(out))
    if inputs and len(inputs.batches) > 1:
        return f"run `preprocess append {out}`"
    return "run the build-labels command of this folder again"


def _option_faults(layout: Layout, manifest: Manifest) -> list[str]:
    """Faults of what the labels were made with: the word pairs, and the uids of the subset."""
    faults = []
    marker = read_marker(layout.markers / "pairs.json", CorpusMarker)
    if manifest.options["labels"]["ngrams"] > 1:
        with _unchanged(layout.pairs, marker.sha256 if marker else "") as (_, changed):
            if changed:
                (layout.markers / "pairs.json").unlink(missing_ok=True)
            faults += changed
    subset = manifest.options["subset"]
    if subset and not (layout.subset.is_file() and sha256_file(layout.subset).startswith(subset)):
        faults.append(f"{layout.subset}: missing or changed since the build")
    return faults


def _label_faults(layout: Layout, shard: ShardPart, manifest: Manifest, frequency: np.ndarray) -> list[str]:
    """Faults of one label file and its counts; if there are none, its counts are added to `frequency`, int64 [V]."""
    path = layout.label_file(shard.name)
    with _unchanged(path, shard.labels_sha256) as (file, changed):
        if changed:
            return changed
        table = pq.read_table(file).combine_chunks()
    if not table.schema.equals(LABELS):
        return [f"{path}: its schema is not that of format {manifest.format}"]
    if len(table) != shard.rows:
        return [f"{path}: {count(len(table), 'row')}, in the manifest {shard.rows}"]
    ids, offsets = _lists_of(table)
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(frequency):
        return [f"{path}: label ids from {ids.min()} to {ids.max()}, allowed: 0 to {len(frequency) - 1}"]
    rising = np.diff(ids.astype(np.int64)) > 0
    starts = offsets[1:-1]
    rising[starts[(starts > 0) & (starts < len(ids))] - 1] = True
    if not rising.all():
        return [f"{path}: a row's label ids are not sorted and unique"]
    if np.isin(ids, manifest.tokenizer.excluded).any():
        return [f"{path}: a special token is among the labels"]
    counted = np.bincount(ids, minlength=len(frequency))
    frequency += counted
    return _count_faults(layout.count_file(shard.name), counted)


def _count_faults(path: Path, counted: np.ndarray) -> list[str]:
    """Faults of one shard's count file, compared with `counted`, int64 [V]."""
    if not path.is_file():
        return [f"{path}: missing"]
    try:
        with local_copy(path) as file:
            table = pq.read_table(file)
        same = table.schema.equals(COUNTS)
    except (OSError, ValueError) as error:
        return [f"{path}: not readable: {str(error).splitlines()[0]}"]
    tokens = np.flatnonzero(counted)
    same = same and np.array_equal(table["token_id"].to_numpy(), tokens)
    if not same or not np.array_equal(table["document_frequency"].to_numpy(), counted[tokens]):
        return [f"{path}: its counts are not those of its label file"]
    return []


def _idf_faults(layout: Layout, manifest: Manifest, frequency: np.ndarray) -> list[str]:
    with _unchanged(layout.idf_parquet, manifest.idf_sha256) as (file, changed):
        if changed:
            return changed
        table = pq.read_table(file)
    faults = []
    if not np.array_equal(table["document_frequency"].to_numpy(), frequency):
        faults.append(f"{layout.idf_parquet}: its document frequencies are not those of the label files")
    expected = idf_weights(frequency, manifest.captions, manifest.idf_formula)  # type: ignore[arg-type]
    if not np.allclose(table["idf"].to_numpy(), expected, rtol=1e-12):
        faults.append(f"{layout.idf_parquet}: its idf column does not follow from its document frequencies")
    if not layout.idf_duckdb.is_file():
        return [*faults, f"{layout.idf_duckdb}: missing"]
    try:
        with open_tables(layout.out) as con:
            query = "SELECT token_id, token, document_frequency, idf FROM tokens ORDER BY token_id"
            tokens = con.sql(query).to_arrow_table()
            corpus = con.execute("SELECT captions, vocabulary, formula, tokenizer_fingerprint FROM corpus").fetchall()
            shards = con.execute("SELECT shard, rows, reasons FROM shards").fetchall()
            rows = con.execute("SELECT count(*) FROM labels").fetchone()
    except (duckdb.Error, UserError) as error:
        return [*faults, f"{layout.idf_duckdb}: not readable: {str(error).splitlines()[0]}"]
    tokenizer = manifest.tokenizer
    if (
        not tokens.equals(table.cast(tokens.schema))
        or corpus != [(manifest.captions, tokenizer.vocabulary, manifest.idf_formula, tokenizer.fingerprint)]
        or shards != [(shard.name, shard.rows, shard.quarantined) for shard in manifest.shards]
        or rows != (manifest.captions,)
    ):
        faults.append(f"{layout.idf_duckdb}: its tables are not those of idf.parquet and the label files")
    return faults


def _image_faults(layout: Layout, manifest: Manifest, sound: set[str]) -> list[str]:
    """Faults of everything that the second pass wrote; the label rows of `sound` shards alone are compared."""
    faults = []
    by_name = {shard.name: shard for shard in manifest.shards}
    for parts, copy in ((manifest.betons, True), (manifest.image_index, False)):
        for part in parts:
            shards = [by_name[name] for name in part.shards]
            if copy:
                of_part = _beton_faults(layout, part, manifest, shards, sound)
            else:
                of_part = _image_index_faults(layout, part, manifest, shards)
            if of_part:
                _drop_marker(layout, part.number, copy=copy)
            faults += of_part
    return faults + (_source_faults(layout, manifest) if manifest.image_index else [])


def _drop_marker(layout: Layout, number: int, *, copy: bool) -> None:
    """Drop the marker of the group that file `number` is of: the last that begins at or before it."""
    firsts = [
        (first, path)
        for first, path in image_folder(layout, copy=copy).numbered()
        if path.suffix == ".json" and first <= number
    ]
    if firsts:
        max(firsts)[1].unlink(missing_ok=True)


def _beton_faults(
    layout: Layout, part: BetonPart, manifest: Manifest, shards: list[ShardPart], sound: set[str]
) -> list[str]:
    path = layout.beton_file(part.number)
    with _unchanged(path, part.sha256) as (file, changed):
        if changed:
            return changed
        data = np.memmap(file, np.uint8, mode="r")
        header = data[: beton.HEADER.itemsize].view(beton.HEADER)[0]
        if header["version"] != beton.VERSION or header["num_samples"] != part.samples:
            actual = f"version {header['version']}, {header['num_samples']} samples"
            return [f"{path}: {actual}; in the manifest {beton.VERSION}, {part.samples}"]
        end = beton.METADATA_OFFSET + part.samples * beton.METADATA.itemsize
        metadata = data[beton.METADATA_OFFSET : end].view(beton.METADATA)
        if faults := _index_faults(path, metadata["index"], shards, manifest):
            return faults
        shards = [shard for shard in shards if shard.name in sound]
        return _label_row_faults(layout, path, data, metadata, shards, manifest.label_limit)


def _index_faults(path: Path, index: np.ndarray, shards: list[ShardPart], manifest: Manifest) -> list[str]:
    """Every row at most once, and of one of the file's shards; rising, unless shards were shuffled."""
    ordered = np.sort(index) if manifest.options["images"]["shuffle_window"] > 1 else index
    ours = np.zeros(len(index), np.bool_)
    for shard in shards:
        ours |= (index >= shard.first_index) & (index < shard.first_index + shard.rows)
    if not ours.all() or (np.diff(ordered.astype(np.int64)) <= 0).any():
        return [f"{path}: its indices are not rising rows of shard {', '.join(shard.name for shard in shards)}"]
    return []


def _label_row_faults(
    layout: Layout, path: Path, data: np.ndarray, metadata: np.ndarray, shards: list[ShardPart], label_limit: int
) -> list[str]:
    for shard in shards:
        mine = metadata[(metadata["index"] >= shard.first_index) & (metadata["index"] < shard.first_index + shard.rows)]
        with local_copy(layout.label_file(shard.name)) as labels:
            expected = pad_rows(*_lists_of(pq.read_table(labels).combine_chunks()), label_limit)
        offsets = mine["labels_ptr"].astype(np.int64)[:, None] + np.arange(4 * label_limit)
        if not np.array_equal(data[offsets].view("<i4"), expected[mine["index"] - shard.first_index]):
            return [f"{path}: its label rows are not those of the label file of {shard.name}"]
    return []


def _image_index_faults(layout: Layout, part: BetonPart, manifest: Manifest, shards: list[ShardPart]) -> list[str]:
    path = layout.image_index_file(part.number)
    with _unchanged(path, part.sha256) as (file, changed):
        if changed:
            return changed
        try:
            spans = open_image_index(file)
        except UserError as error:
            return [error.problem]
        if len(spans) != part.samples:
            return [f"{path}: {count(len(spans), 'image')}, in the manifest {part.samples}"]
        tars = np.array([shard.source_bytes for shard in manifest.shards], np.int64)
        numbers = spans["shard"].astype(np.int64)
        ends = spans["offset"].astype(np.int64) + spans["bytes"]
        if (numbers >= len(tars)).any() or (ends > tars[np.minimum(numbers, len(tars) - 1)]).any():
            return [f"{path}: an image span is outside of its tar"]
        return _index_faults(path, spans["index"], shards, manifest)


def _source_faults(layout: Layout, manifest: Manifest) -> list[str]:
    """The tars that the image index points into have to be there, with the length that they had."""
    try:
        sources = read_sources(layout)
    except UserError as error:
        return [error.problem]
    faults = []
    for shard in manifest.shards:
        source, images = sources.get(shard.name), f"images of {shard.name} are in it"
        if source is None:
            faults.append(f"{layout.image_sources}: the shard {shard.name} is missing")
        elif not (tar := Path(source.path)).is_file():
            faults.append(f"{tar}: missing, but {images}; if it was moved, write its path into {layout.image_sources}")
        elif (size := tar.stat().st_size) != shard.source_bytes:
            faults.append(f"{tar}: {size} bytes, in the manifest {shard.source_bytes}: {images}")
    return faults


@contextmanager
def _unchanged(path: Path, expected: str) -> Iterator[tuple[Path, list[str]]]:
    """The file to read (an object is downloaded for the block), and its fault by SHA-256, if any."""
    if not path.is_file():
        yield path, [f"{path}: missing"]
        return
    with local_copy(path) as file:
        digest = sha256_file(file)
        fault = f"{path}: changed since the build (SHA-256 {digest[:16]}..., in the manifest {expected[:16]}...)"
        yield file, [] if digest == expected else [fault]


def _lists_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] and offsets [N + 1] of the label_ids column."""
    if not len(table):
        return np.empty(0, np.int32), np.zeros(1, np.int32)
    lists = table["label_ids"].chunk(0)
    return lists.values.to_numpy(), lists.offsets.to_numpy()
