"""What a report tells of an OUT, in numbers: asked of its tables by DuckDB, with a few samples picked all over it."""

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np

from labels.files import is_remote
from labels.layout import Layout
from labels.manifest import Manifest, read_manifest
from preprocess.counts import quoted
from preprocess.plan import file_sizes
from preprocess.query import open_tables
from preprocess.show.captions import source_captions
from preprocess.show.explanation import Label, Vocabulary
from preprocess.show.samples import Sample, read_image, spread_samples
from preprocess.show.thumbnails import thumbnail

_EXAMPLES = 5
_THUMBNAIL_SIDE = 320


@dataclass(frozen=True)
class Reason:
    """Why samples were left out, at which stage, how many, and (shard, key, detail) of some."""

    stage: str
    reason: str
    samples: int
    examples: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Shown:
    """One sample of the gallery; `decoded`: the caption was put together from its tokens."""

    sample: Sample
    image: bytes | None
    caption: str
    decoded: bool
    labels: list[Label]


@dataclass(frozen=True)
class Summary:
    """A whole OUT. `labels_histogram`: int64 [K + 1], captions with 0, 1, ... K labels; `full`: captions at the context limit;
    `median_size`: of the widths and of the heights, in pixels; `faults`: files of
    the manifest that are missing or of another length."""

    out: Path
    manifest: Manifest
    vocabulary: Vocabulary
    labels_histogram: np.ndarray
    full: int
    median_size: tuple[int | None, int | None]
    reasons: list[Reason]
    gallery: list[Shown]
    faults: list[str]


def summarise(out: Path, pictures: int) -> Summary:
    """Read a finished OUT; `pictures` is the number of samples in the gallery.

    Raises:
        UserError: OUT is unfinished or cannot be read.
    """
    manifest = read_manifest(out)
    layout = Layout(out if is_remote(out) else out.resolve())
    vocabulary = Vocabulary(layout, manifest)
    with open_tables(out) as con:
        histogram, full = _label_numbers(con, manifest)
        size, reasons = (_median(con, "width"), _median(con, "height")), _reasons(con, layout)
    gallery = _gallery(layout, manifest, vocabulary, pictures)
    return Summary(out, manifest, vocabulary, histogram, full, size, reasons, gallery, _faults(layout, manifest))


def _label_numbers(con: duckdb.DuckDBPyConnection, manifest: Manifest) -> tuple[np.ndarray, int]:
    histogram = np.zeros(manifest.label_limit + 1, np.int64)
    limit, full = manifest.options["labels"]["context"], 0
    query = "SELECT len(label_ids), len(token_ids) >= $1, count(*) FROM labels GROUP BY ALL"
    for labels, at_limit, captions in con.execute(query, [limit]).fetchall():
        histogram[labels] += captions
        full += captions if at_limit else 0
    return histogram, full


def _median(con: duckdb.DuckDBPyConnection, column: str) -> int | None:
    """Of all label rows that have a value: from their counts, since there may be billions of them."""
    counts = f"SELECT {column} AS side, count(*) AS n FROM labels WHERE {column} IS NOT NULL GROUP BY 1"
    running = f"SELECT side, sum(n) OVER (ORDER BY side) AS upto, sum(n) OVER () AS total FROM ({counts})"
    row = con.execute(f"SELECT min(side) FROM ({running}) WHERE 2 * upto >= total").fetchone()
    return row[0] if row else None


def _reasons(con: duckdb.DuckDBPyConnection, layout: Layout) -> list[Reason]:
    """By stage and reason, the commonest first, with the first few of each."""
    query = f"""
        SELECT stage, reason, count(*) AS samples, arg_min({{'shard': shard, 'key': key, 'detail': detail}}, file_row_number, {_EXAMPLES})
        FROM read_parquet({quoted(layout.quarantine)}, file_row_number = true) GROUP BY stage, reason ORDER BY samples DESC, stage, reason
    """
    return [
        Reason(stage, reason, samples, [(some["shard"], some["key"], some["detail"]) for some in examples])
        for stage, reason, samples, examples in con.execute(query).fetchall()
    ]


def _gallery(layout: Layout, manifest: Manifest, vocabulary: Vocabulary, count: int) -> list[Shown]:
    samples = spread_samples(layout, manifest, count)
    keys: dict[str, set[str]] = {}
    for sample in samples:
        keys.setdefault(sample.shard.name, set()).add(sample.key)
    captions = {name: source_captions(layout, name, wanted) for name, wanted in keys.items()}
    shown = []
    for sample in samples:
        image = read_image(layout, manifest, sample)
        found = captions[sample.shard.name]
        caption = None if isinstance(found, str) else found.get(sample.key)
        shown.append(
            Shown(
                sample,
                thumbnail(image, _THUMBNAIL_SIDE) if image else None,
                vocabulary.text(sample.token_ids) if caption is None else caption,
                caption is None,
                vocabulary.labels(sample.label_ids),
            )
        )
    return shown


def _faults(layout: Layout, manifest: Manifest) -> list[str]:
    """By one listing of each folder; `preprocess verify` reads everything."""
    labels, betons, places = (file_sizes(folder) for folder in (layout.labels, layout.betons, layout.places))
    faults = [f"labels/{part.name}.parquet is missing" for part in manifest.shards if f"{part.name}.parquet" not in labels]
    for folder, suffix, found, parts in (("beton", "beton", betons, manifest.betons), ("places", "npy", places, manifest.places)):
        for part in parts:
            size = found.get(f"{part.number:05d}.{suffix}")
            if size != part.bytes:
                told = "is missing" if size is None else f"has {size:,} bytes, in the manifest {part.bytes:,}"
                faults.append(f"{folder}/{part.number:05d}.{suffix} {told}")
    return faults
