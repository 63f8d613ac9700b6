"""`preprocess verify`: read back everything a build wrote and compare it with the manifest and with itself.

A faulty file is removed from the finished ones by dropping its marker, so that the build command makes it anew.
"""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq

from labels.errors import UserError
from labels.idf import idf_weights
from labels.layout import Layout
from labels.manifest import Manifest, ShardPart, read_manifest
from labels.schema import COUNTS, LABELS
from labels.storage import local_copy, sha256_file
from preprocess.inspect.sql import open_tables
from preprocess.stage import CorpusMarker, read_inputs, read_marker
from preprocess.verify_images import image_faults, lists_of, unchanged


def verify_build(out: Path) -> list[str]:
    """All faults found, one line each, empty if OUT is whole: naming the file and what differs."""
    manifest, layout = read_manifest(out), Layout(out)
    frequency = np.zeros(manifest.tokenizer.vocabulary, np.int64)
    faults: list[str] = []
    by_name = {shard.name: shard for shard in manifest.shards}
    inputs = read_inputs(layout)
    begun = {shard.name for shard in inputs.shards} if inputs else set()
    for path in sorted(layout.labels.glob("*.parquet")):
        if path.stem not in by_name and path.stem in begun:
            faults.append(f"{path}: of an append that has not finished; `preprocess append {out}` goes on, with --undo gives it up")
        elif path.stem not in by_name:
            faults.append(f"{path}: not of this build; move it away")
    whole: set[str] = set()
    for shard in manifest.shards:
        found = _label_faults(layout, shard, manifest, frequency)
        if found:
            layout.label_marker(shard.name).unlink(missing_ok=True)
        else:
            whole.add(shard.name)
        faults += found
    if not faults:  # a damaged label file makes every count and label row differ: name the cause alone
        found = _idf_faults(layout, manifest, frequency)
        if found:
            (layout.markers / "idf.json").unlink(missing_ok=True)
        faults += found
    faults += image_faults(layout, manifest, whole)
    faults += _chosen_faults(layout, manifest)
    if not layout.quarantine.is_file() or sha256_file(layout.quarantine) != manifest.quarantine_sha256:
        faults.append(f"{layout.quarantine}: missing or changed since the build")
    return faults


def mending_command(out: Path) -> str:
    """What makes anew that which `verify_build` has found faulty."""
    inputs = read_inputs(Layout(out))
    if inputs and len(inputs.batches) > 1:
        return f"run `preprocess append {out}`"
    return "run the build-labels command of this OUT again"


def _chosen_faults(layout: Layout, manifest: Manifest) -> list[str]:
    """Faults of what the labels were made with: the word pairs, and the uids of the subset."""
    faults = []
    marker = read_marker(layout.markers / "pairs.json", CorpusMarker)
    if manifest.options["labels"]["ngrams"] > 1:
        with unchanged(layout.pairs, marker.sha256 if marker else "") as (_, changed):
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
    with unchanged(path, shard.labels_sha256) as (file, changed):
        if changed:
            return changed
        table = pq.read_table(file).combine_chunks()
    if not table.schema.equals(LABELS):
        return [f"{path}: its schema is not that of format {manifest.format}"]
    if len(table) != shard.rows:
        return [f"{path}: {len(table)} rows, in the manifest {shard.rows}"]
    ids, offsets = lists_of(table)
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(frequency):
        return [f"{path}: label ids from {ids.min()} to {ids.max()}, allowed: 0 to {len(frequency) - 1}"]
    rising = np.diff(ids.astype(np.int64)) > 0
    starts = offsets[1:-1]
    rising[starts[(starts > 0) & (starts < len(ids))] - 1] = True
    if not rising.all():
        return [f"{path}: a row's label ids are not sorted and unique"]
    if np.isin(ids, manifest.tokenizer.excluded).any():
        return [f"{path}: a special token stands among the labels"]
    counted = np.bincount(ids, minlength=len(frequency))
    frequency += counted
    return _count_faults(layout.count_file(shard.name), counted)


def _count_faults(path: Path, counted: np.ndarray) -> list[str]:
    """Faults of one shard's count file, whose rows have to be those of `counted`, int64 [V], that are not 0."""
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
    with unchanged(layout.idf_parquet, manifest.idf_sha256) as (file, changed):
        if changed:
            return changed
        table = pq.read_table(file)
    faults = []
    if not np.array_equal(table["document_frequency"].to_numpy(), frequency):
        faults.append(f"{layout.idf_parquet}: its document frequencies are not those of the label files")
    if not np.allclose(table["idf"].to_numpy(), idf_weights(frequency, manifest.captions, manifest.idf_formula), rtol=1e-12):  # type: ignore[arg-type]
        faults.append(f"{layout.idf_parquet}: its idf column does not follow from its document frequencies")
    if not layout.idf_duckdb.is_file():
        return [*faults, f"{layout.idf_duckdb}: missing"]
    try:
        with open_tables(layout.out) as con:
            same = con.sql("SELECT token_id, token, document_frequency, idf FROM tokens ORDER BY token_id").to_arrow_table()
            corpus = con.execute("SELECT captions, vocabulary, formula, tokenizer_fingerprint FROM corpus").fetchall()
            shards = con.execute("SELECT shard, rows, reasons FROM shards").fetchall()
            rows = con.execute("SELECT count(*) FROM labels").fetchone()
    except (duckdb.Error, UserError) as error:
        return [*faults, f"{layout.idf_duckdb}: not readable: {str(error).splitlines()[0]}"]
    tokenizer = manifest.tokenizer
    if (
        not same.equals(table.cast(same.schema))
        or corpus != [(manifest.captions, tokenizer.vocabulary, manifest.idf_formula, tokenizer.fingerprint)]
        or shards != [(shard.name, shard.rows, shard.quarantined) for shard in manifest.shards]
        or rows != (manifest.captions,)
    ):
        faults.append(f"{layout.idf_duckdb}: its tables are not those of idf.parquet and the label files")
    return faults
