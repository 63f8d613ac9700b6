"""Opens what `train run` trains on: the set, checked and ready, and its loader.

    --beton, --labels, --idf -> parse_sources -> make_rows: label arrays -> BetonSet -> restrict(subset_samples)
    BetonSet, settings -> make_loader -> Loader of one rank

Other labels for the same betons: rows are positions, so `--labels OTHER` maps arrays made from OTHER's label files,
OTHER_OUT/rows/*.npy; `keys_sha256` of every shard proves that the rows are the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from labels import beton
from labels.arrays import Column, check_same_rows, open_rows, shards_needed, write_rows
from labels.manifest import IMAGE_SPAN, read_manifest
from labels.settings import Data, Train
from labels.show.terminal import count
from labels.storage import Layout, UserError, fingerprint, is_remote, library_path, local_path, sha256_file
from labels.subset import (
    ROWS_AT_ONCE,
    UIDS,
    count_in,
    in_parts,
    is_sorted,
    map_uids,
    one_line,
    parse_uids,
    quoted,
    where,
)
from train.data.dataset import BetonSet
from train.data.files import Cache
from train.data.inputs import resamples
from train.data.loader import Loader
from train.data.mixture import OpenedSource, parse_sources
from train.distributed import World

if TYPE_CHECKING:
    import duckdb

_REPORT_EVERY_S = 5.0
_SUBSET_FORMS = (
    "an .npy of dtype u8,u8 as DataComp's, a .parquet with a column uid, or one SQL condition on key, uid, width, "
    "height, token_ids, label_ids and the columns of train.data.metadata"
)
_MOST_REPEATS = 2**16 - 1
_OPTION = "train.data.subset"


@dataclass(frozen=True)
class Chosen:
    """What the user named: values of `--beton`, folders of `--labels` for each of them or none, and `--idf`."""

    betons: Sequence[str]
    labels: Sequence[Path] = ()
    idf: Path | None = None


def open_data(
    chosen: Chosen, settings: Data, world: World, stopping: Callable[[], bool], column: Column = "label_ids"
) -> BetonSet | None:
    """Open the set on every rank; None if `stopping` became true while label arrays were made.

    Raises UserError for whatever does not fit.
    """
    mixture = parse_sources(chosen.betons, chosen.labels)
    for source in mixture.sources if column == "token_ids" else ():
        folder = source.labels or source.out
        if is_remote(folder):
            raise UserError(
                f"captions in their order are read from arrays next to the label files, and {folder} is remote",
                fix="copy it to a local folder without its beton/, and give that as --labels",
            )
    for source in mixture.sources:
        # Betons hold their own label sets; images that stay in their tars, and captions in their order, have arrays.
        in_arrays = column == "token_ids" or read_manifest(source.out).image_index
        labels = source.labels or (source.out if in_arrays else None)
        if labels and not make_rows_once(source.out, labels, world, stopping, column):
            return None
    cache = Cache(local_path(settings.cache), settings.cache_size)
    betons = BetonSet(mixture, idf=chosen.idf, cache=cache, column=column)
    _check_window(betons, settings)
    if settings.verify:
        betons.check_bytes(range(world.rank, len(betons.parts), world.size))
    if settings.subset:
        betons.restrict(*subset_samples(betons, settings.subset, settings.metadata))
    return betons


def make_loader(betons: BetonSet, settings: Train, first_step: int, last_step: int, world: World) -> Loader:
    """The loader of one rank for the steps [first_step, last_step)."""
    return Loader(
        betons,
        settings.data,
        image_size=settings.model.image_size,
        batch_size=settings.batch_size,
        seed=settings.runtime.seed,
        first_step=first_step,
        last_step=last_step,
        rank=world.rank,
        world=world.size,
        threads=loading_threads(settings.data),
        pinned=world.device.type == "cuda",
        device=resamples(settings.data, world.device),
    )


def loading_threads(settings: Data) -> int:
    """`train.data.threads`, or for 0 the number of cores this process may use."""
    return settings.threads or len(os.sched_getaffinity(0))


def data_facts(betons: BetonSet) -> dict[str, Any]:
    """What a run was trained on, for people and reports: written as data.json next to its configuration."""
    labels = betons.labels
    facts = {
        "beton": _absolute(betons.out),
        "labels": _absolute(betons.labels_out),
        "idf": _absolute(betons.idf_path),
        "fingerprints": betons.identity,
        "samples": betons.samples,
        "vocabulary": betons.vocabulary,
        "label_limit": betons.label_limit,
        "captions": sum(opened.labels.captions for opened in betons.opened),
        "tokenizer": labels.tokenizer.name,
        "tokenizer_fingerprint": labels.tokenizer.fingerprint,
        "idf_formula": labels.idf_formula,
        "label_options": labels.options.get("labels", {}),
    }
    if len(betons.opened) > 1:
        facts["sources"] = [
            {
                "beton": _absolute(opened.source.out),
                "labels": _absolute(opened.labels_out),
                "group": opened.source.group,
                "betons": len(opened.parts),
            }
            for opened in betons.opened
        ]
        facts |= {"samples_of_groups": betons.sizes, "shares": list(betons.quotas)}
    return facts


def _absolute(path: Path) -> str:
    """A run is evaluated from other folders than it was trained in."""
    return str(path if is_remote(path) else path.absolute())


def make_rows_once(
    out: Path, labels: Path, world: World, stopping: Callable[[], bool], column: Column = "label_ids"
) -> bool:
    """`make_rows` on the first rank while all others wait; False if any rank is `stopping`.

    The first rank of every other node has a second turn: it finds the arrays on a shared disk, or makes them on its own
    disk. The ranks meet after every shard, as a collective that waits for the whole work would run into its timeout.
    """
    first_of_node = os.environ.get("LOCAL_RANK", "").strip() == "0"
    for turn in (world.is_first, first_of_node and not world.is_first):
        making = make_rows(out, labels, column) if turn else iter(())
        while world.any(next(making, None) is not None)[0]:
            if world.any(stopping())[0]:
                return False
    return True


def make_rows(out: Path, labels: Path, column: Column = "label_ids") -> Iterator[str]:
    """Make the missing label arrays for the betons of `out` from the label files of `labels`; yields each shard's name.

    Raises UserError where the two have other rows, or a label file is damaged.
    """
    manifest, label_manifest = read_manifest(out), read_manifest(labels)
    check_same_rows(out, manifest, labels, label_manifest)
    limit, needed = label_manifest.label_limit, shards_needed(manifest, label_manifest, column)
    missing = [part for part in needed if open_rows(labels, part, limit, column) is None]
    reported = time.monotonic()
    for number, part in enumerate(missing, start=1):
        write_rows(labels, part, limit, column)
        if number == len(missing) or time.monotonic() - reported >= _REPORT_EVERY_S:
            reported = time.monotonic()
            print(f"label rows of {labels}: {number:,} of {count(len(missing), 'shard')} made", flush=True)
        yield part.name


def _check_window(betons: BetonSet, settings: Data) -> None:
    """Refuse a shuffle window whose betons do not fit the cache of remote ones: each would be fetched many times."""
    remote = betons.staging.remote if betons.staging else frozenset()
    total = sum(betons.parts[number].bytes for number in remote)
    if total <= settings.cache_size:
        return
    bytes_each = total // len(remote)
    samples_each = sum(betons.parts[number].samples for number in remote) / len(remote)
    window, block = settings.shuffle_window, settings.shuffle_block
    touched = min(len(remote), 2 * window * (2 + int(block / samples_each)))
    if touched * bytes_each > settings.cache_size:
        needed = f"two windows of {window} blocks of {block} samples touch {touched} remote betons of"
        smaller = max(1, settings.cache_size // (6 * bytes_each))
        options = f"--set train.data.shuffle_block={int(samples_each)} --set train.data.shuffle_window={smaller}"
        size = f"train.data.cache_size is {settings.cache_size / 2**20:,.0f} MiB"
        raise UserError(
            f"{needed} {bytes_each / 2**20:,.0f} MiB, {size}",
            allowed="windows whose betons fit the cache",
            fix=f"{options}, or a larger cache",
        )


def subset_samples(betons: BetonSet, subset: str, metadata: str | None, key: str = _OPTION) -> tuple[np.ndarray, str]:
    """The samples that `key` names: ascending numbers, int64, and a fingerprint of the subset.

    .npy of DataComp | .parquet with `uid` | SQL condition -> DuckDB over labels/*.parquet -> rows -> their samples.
    A repeated uid repeats its sample; a sample without a uid is in no file of uids. Raises UserError where the subset
    is none of the three, cannot be read, or selects nothing.
    """
    if betons.staging:
        raise UserError(f"{key} needs the betons on this machine", fix="copy the output folder to this machine")
    parts = []
    for opened in betons.opened:
        counts = _row_counts(opened, subset, metadata)
        for number, part in enumerate(betons.parts):
            first = int(betons.tables.first_samples[number])
            if part.samples and betons.owner(first) is opened:
                parts.append(np.repeat(np.arange(first, first + part.samples), counts[_row_indices(betons, number)]))
    samples = np.concatenate(parts)
    if not len(samples):
        raise UserError(f"the subset {subset!r} selects no sample", fix="name another one")
    is_file = subset.endswith((".npy", ".parquet"))
    return samples, fingerprint([sha256_file(local_path(subset)) if is_file else subset, metadata])


def _row_indices(betons: BetonSet, number: int) -> np.ndarray:
    """Positions of a sample file's label rows among the rows of its output folder: int64 [samples]."""
    samples, path = betons.parts[number].samples, betons.paths[number]
    if betons.tables.allocations[number]:
        return np.fromfile(path, beton.METADATA, samples, offset=beton.METADATA_OFFSET)["index"]
    return np.fromfile(path, IMAGE_SPAN, samples, offset=int(betons.tables.tables[number]))["index"].astype(np.int64)


def _row_counts(opened: OpenedSource, subset: str, metadata: str | None) -> np.ndarray:
    """How often each label row of an output folder is in the subset: uint16 [rows]."""
    import duckdb

    out = opened.source.out
    counts = np.zeros(sum(part.rows for part in opened.manifest.shards), np.uint16)
    shards = [part for part in opened.manifest.shards if part.rows]
    if is_remote(out) or not shards:
        return counts
    files = [str(library_path(Layout(out).label_file(part.name))) for part in shards]
    with duckdb.connect(config={"python_enable_replacements": False}) as con:
        con.register("firsts", pa.table({"name": files, "first_row": [part.first_index for part in shards]}))
        try:
            for rows, repeats in _repeats(con, files, subset, metadata):
                if (most := repeats.max(initial=0)) > _MOST_REPEATS:
                    raise UserError(f"the subset {subset} repeats a uid {most} times", allowed=f"{_MOST_REPEATS} times")
                counts[rows] = repeats
        except (duckdb.Error, OSError, ValueError) as error:
            problem = f"{_OPTION} {subset!r} cannot be used: {one_line(error)}"
            raise UserError(problem, allowed=_SUBSET_FORMS) from None
    return counts


def _repeats(
    con: duckdb.DuckDBPyConnection, files: list[str], subset: str, metadata: str | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Label rows, int64 [N], and how often each is in the subset, int64 [N], in batches."""
    names = ", ".join(map(quoted, files))
    rows = (
        "SELECT first_row + file_row_number AS row, labels.* EXCLUDE (filename, file_row_number) "
        f"FROM read_parquet([{names}], filename = true, file_row_number = true) labels JOIN firsts ON filename = name"
    )
    if subset.endswith(".npy"):
        with map_uids(subset, _OPTION) as array:
            ascending, uids = is_sorted(array), np.concatenate([np.empty(0, UIDS), *in_parts(array)])
        uids = uids if ascending else uids[np.lexsort((uids["f1"], uids["f0"]))]
        for batch in con.sql(f"SELECT row, uid FROM ({rows})").to_arrow_reader(ROWS_AT_ONCE):
            row_uids, positions = parse_uids(batch.column(1).cast(pa.string()))
            yield batch.column(0).to_numpy()[positions].astype(np.int64), count_in(row_uids, uids)
        return
    if subset.endswith(".parquet"):
        file = quoted(library_path(local_path(subset)))
        wanted = f"SELECT uid, count(*) AS repeats FROM read_parquet({file}) GROUP BY uid"
        table = con.sql(f"SELECT row, repeats FROM ({rows}) JOIN ({wanted}) USING (uid)")
    else:
        with_metadata = _with_metadata(con, rows, metadata)
        table = where(with_metadata, subset, _OPTION, _SUBSET_FORMS).project("row, 1 AS repeats")
    for batch in table.to_arrow_reader(ROWS_AT_ONCE):
        yield batch.column(0).to_numpy().astype(np.int64), batch.column(1).to_numpy()


def _with_metadata(con: duckdb.DuckDBPyConnection, rows: str, metadata: str | None) -> duckdb.DuckDBPyRelation:
    """The label rows, with those columns of `train.data.metadata` that they do not have."""
    if metadata is None:
        return con.sql(rows)
    path = local_path(metadata)
    pattern = quoted(library_path(path) / "*.parquet" if path.is_dir() else path)
    own = {"uid", "key", "width", "height", "token_ids", "label_ids", "row"}
    more = [f'"{name}"' for name in con.sql(f"FROM read_parquet({pattern})").columns if name not in own]
    scores = f"SELECT DISTINCT ON (uid) {', '.join(['uid', *more])} FROM read_parquet({pattern})"
    return con.sql(f"SELECT * FROM ({rows}) LEFT JOIN ({scores}) USING (uid)")
