"""`preprocess report`: numbers of a finished output folder, by DuckDB, and one HTML page of them.

idf.duckdb, labels/, quarantine.parquet, some samples -> Summary -> IDF spectrum, labels per caption, rejected samples, gallery, shards
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np

from labels.html import (
    Axis,
    Html,
    Mark,
    Section,
    Series,
    bar_chart,
    details,
    join,
    line_chart,
    page,
    paragraph,
    picture,
    short_number,
    table,
    tag,
    tiles,
    weights,
)
from labels.manifest import Manifest, ShardPart, read_manifest
from labels.samples import Label, Sample, Vocabulary, read_image, spread_samples, thumbnail
from labels.storage import Layout, is_remote
from preprocess.counts import quoted
from preprocess.inspect.explain import source_captions
from preprocess.inspect.sql import open_tables
from preprocess.stage import file_sizes

_EXAMPLES = 5
_THUMBNAIL_SIDE = 320
_NAMED_TOKENS, _TABLED_TOKENS, _LABELS_SHOWN = 14, 20, 8
_CURVE_POINTS, _SHARD_BARS, _SHARDS_TABLED = 400, 120, 12


@dataclass(frozen=True)
class Reason:
    """Samples rejected at one stage for one reason: how many, and (shard, key, detail) of some."""

    stage: str
    reason: str
    samples: int
    examples: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Shown:
    """One sample of the gallery; `decoded`: its caption is decoded from the tokens."""

    sample: Sample
    image: bytes | None
    caption: str
    decoded: bool
    labels: list[Label]


@dataclass(frozen=True)
class Summary:
    """Numbers of an output folder.

    Attributes:
        labels_histogram: int64 [K + 1], captions with 0, 1, ... K labels.
        full: captions at the context limit.
        median_size: width and height in pixels, each a median.
        faults: files of the manifest that are missing or of another length.
    """

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
    """Read a finished output folder; `pictures`: samples in the gallery.

    Raises:
        UserError: the folder is unfinished or cannot be read.
    """
    manifest = read_manifest(out)
    layout = Layout(out if is_remote(out) else out.resolve())
    vocabulary = Vocabulary(layout, manifest)
    with open_tables(out) as con:
        histogram, full = _label_numbers(con, manifest)
        size, reasons = (_median(con, "width"), _median(con, "height")), _reasons(con, layout)
    gallery = _gallery_samples(layout, manifest, vocabulary, pictures)
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
    """The median over label rows with a value, by counts of each value: there may be billions of rows."""
    counts = f"SELECT {column} AS side, count(*) AS n FROM labels WHERE {column} IS NOT NULL GROUP BY 1"
    running = f"SELECT side, sum(n) OVER (ORDER BY side) AS upto, sum(n) OVER () AS total FROM ({counts})"
    row = con.execute(f"SELECT min(side) FROM ({running}) WHERE 2 * upto >= total").fetchone()
    return row[0] if row else None


def _reasons(con: duckdb.DuckDBPyConnection, layout: Layout) -> list[Reason]:
    """By stage and reason, most frequent first, with the first few samples of each."""
    query = f"""
        SELECT stage, reason, count(*) AS samples, arg_min({{'shard': shard, 'key': key, 'detail': detail}}, file_row_number, {_EXAMPLES})
        FROM read_parquet({quoted(layout.quarantine)}, file_row_number = true) GROUP BY stage, reason ORDER BY samples DESC, stage, reason
    """
    return [
        Reason(stage, reason, samples, [(example["shard"], example["key"], example["detail"]) for example in examples])
        for stage, reason, samples, examples in con.execute(query).fetchall()
    ]


def _gallery_samples(layout: Layout, manifest: Manifest, vocabulary: Vocabulary, count: int) -> list[Shown]:
    samples = spread_samples(layout, manifest, count)
    keys: dict[str, set[str]] = {}
    for sample in samples:
        keys.setdefault(sample.shard.name, set()).add(sample.key)
    captions = {name: source_captions(layout, name, wanted) for name, wanted in keys.items()}
    shown = []
    for sample in samples:
        image = read_image(layout, manifest, sample)
        shard_captions = captions[sample.shard.name]
        caption = None if isinstance(shard_captions, str) else shard_captions.get(sample.key)
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
    """From one listing of each folder; `preprocess verify` reads everything."""
    labels, betons, image_index = (file_sizes(folder) for folder in (layout.labels, layout.betons, layout.image_index))
    faults = [
        f"labels/{part.name}.parquet is missing" for part in manifest.shards if f"{part.name}.parquet" not in labels
    ]
    for folder, suffix, sizes, parts in (
        ("beton", "beton", betons, manifest.betons),
        ("places", "npy", image_index, manifest.image_index),
    ):
        for part in parts:
            size = sizes.get(f"{part.number:05d}.{suffix}")
            if size != part.bytes:
                fault = "is missing" if size is None else f"has {size:,} bytes, in the manifest {part.bytes:,}"
                faults.append(f"{folder}/{part.number:05d}.{suffix} {fault}")
    return faults


def report_page(summary: Summary) -> str:
    """The whole HTML file."""
    sections = [
        Section("spectrum", "IDF spectrum", _spectrum(summary)),
        Section("labels", "Labels per caption", _labels(summary)),
        Section("quarantine", "Rejected samples", _quarantine(summary)),
        Section("gallery", "Images and their labels", _gallery(summary)),
        Section("shards", "Shards", _shards(summary)),
        Section("options", "Options of the build", _options(summary)),
    ]
    return page(f"Data report: {summary.out.resolve().name}", _tiles(summary), sections)


def _tiles(summary: Summary) -> Html:
    manifest = summary.manifest
    rejected = sum(reason.samples for reason in summary.reasons)
    seen = int((summary.vocabulary.frequency > 0).sum())
    parts = [*manifest.betons, *manifest.image_index]
    gib = sum(part.bytes for part in parts) / 2**30
    files = (
        _number(len(parts), "beton", "betons")
        if manifest.betons
        else _number(len(parts), "image index", "image indices")
    )
    mean = float(
        (summary.labels_histogram * np.arange(len(summary.labels_histogram))).sum() / max(manifest.captions, 1)
    )
    width, height = summary.median_size
    samples_note = f"{gib:.2f} GiB in {files}" if parts else "built without images"
    return tiles(
        [
            ("Captions labelled", f"{manifest.captions:,}", "from " + _number(len(manifest.shards), "shard", "shards")),
            ("Samples with image", f"{manifest.samples:,}" if parts else "none", samples_note),
            ("Rejected", f"{rejected:,}", _share(rejected, _all_samples(summary)) + " of all samples"),
            ("Labels per caption", f"{mean:.1f}", "mean"),
            ("Tokens seen", f"{seen:,}", f"of {manifest.tokenizer.vocabulary:,}, {manifest.tokenizer.name}"),
            ("Image", f"{width} × {height}" if width and height else "unknown", "pixels, median of each side"),
        ]
    )


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _all_samples(summary: Summary) -> int:
    return summary.manifest.captions + sum(reason.samples for reason in summary.reasons if reason.stage == "labels")


def _share(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    if not share:
        return "0%"
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"


def _spectrum(summary: Summary) -> Html:
    vocabulary, manifest = summary.vocabulary, summary.manifest
    order = np.argsort(-vocabulary.frequency, kind="stable")[: int((vocabulary.frequency > 0).sum())]
    if not len(order):
        return paragraph("No caption has a token.")
    ranks = np.unique(np.geomspace(1, len(order), _CURVE_POINTS).round().astype(np.int64))
    curve = Series(ranks.tolist(), vocabulary.idf[order[ranks - 1]].tolist())
    marks = [
        Mark(rank, float(vocabulary.idf[order[rank - 1]]), vocabulary.name(int(order[rank - 1])))
        for rank in _named(vocabulary, order)
    ]
    chart = line_chart(
        "IDF of tokens by rank",
        Axis("rank by document frequency", log=True),
        Axis("IDF (nats)", low=0.0, high=float(vocabulary.idf[order].max()) * 1.05),
        [curve],
        marks,
        note=f"Formula {manifest.idf_formula}, {manifest.captions:,} captions",
    )
    text = "A token of many captions says little about an image and has a small weight; a rare token has a large one."
    total = float((vocabulary.frequency * vocabulary.idf).sum()) or 1.0
    rows = []
    for token in order[:_TABLED_TOKENS].tolist():
        label = vocabulary.label(token, 0.0)
        share = _share(label.document_frequency * label.idf, total)
        in_captions = _share(label.document_frequency, manifest.captions)
        rows.append(
            [tag("code", label.name), token, f"{label.document_frequency:,}", in_captions, f"{label.idf:.3f}", share]
        )
    columns = ["Token", "#Id", "#Captions", "#Of all captions", "#IDF (nats)", "#Of all weight"]
    commonest = table(
        columns, rows, caption=f"The {len(rows)} most frequent tokens; weight is document frequency times IDF"
    )
    once = int((vocabulary.frequency == 1).sum())
    tail = f"{len(order):,} tokens occur, {once:,} of them in a single caption. “…” marks a part of a word."
    return join([paragraph(text), chart, paragraph(tail, muted=True), details("The most frequent tokens", commonest)])


def _named(vocabulary: Vocabulary, order: np.ndarray) -> list[int]:
    """Ranks of whole words at even distances on the logarithmic axis."""
    words = [
        rank
        for rank, token in enumerate(order.tolist(), 1)
        if (name := vocabulary.name(token)).isalpha() and len(name) > 1
    ]
    if not words:
        return []
    logs = np.log(words)
    nearest = {words[int(np.argmin(np.abs(logs - at)))] for at in np.linspace(0.0, np.log(len(order)), _NAMED_TOKENS)}
    return sorted(nearest)


def _labels(summary: Summary) -> Html:
    histogram, manifest = summary.labels_histogram, summary.manifest
    last = int(np.flatnonzero(histogram).max(initial=0))
    counts = histogram[: last + 1]
    median = int(np.searchsorted(np.cumsum(counts), manifest.captions / 2))
    chart = bar_chart(
        "Captions by number of labels",
        Axis("distinct labels of a caption"),
        Axis("captions"),
        (np.arange(last + 2) - 0.5).tolist(),
        counts.tolist(),
        note=f"Median {median}, most {last}; the limit is {manifest.label_limit}",
    )
    context = manifest.options["labels"]["context"]
    text = (
        f"{int(histogram[0]):,} captions ({_share(int(histogram[0]), manifest.captions)}) have no label: their loss is 0. "
        f"{summary.full:,} ({_share(summary.full, manifest.captions)}) fill the limit of {context} tokens and may be cut off."
    )
    return join([chart, paragraph(text)])


def _quarantine(summary: Summary) -> Html:
    if not summary.reasons:
        return paragraph("No sample was rejected.")
    total = _all_samples(summary)
    stages = {"labels": "no label row", "images": "label row, but no image"}
    rows = [
        [reason.reason, stages.get(reason.stage, reason.stage), f"{reason.samples:,}", _share(reason.samples, total)]
        for reason in summary.reasons
    ]
    overview = table(["Reason", "Result", "#Samples", "#Of all"], rows, caption="Rejected samples, by reason")
    return join([overview, tag("h3", "Examples"), *(_examples(reason) for reason in summary.reasons)])


def _examples(reason: Reason) -> Html:
    rows = [
        [shard, tag("code", key or "(none)"), tag("span", detail, class_="long")]
        for shard, key, detail in reason.examples
    ]
    shown = f"{len(rows)} of {reason.samples:,}" if len(rows) < reason.samples else f"{len(rows)}"
    return details(
        f"{reason.reason}: {shown}", table(["Shard", "Key", "Detail"], rows, caption=f"Rejected: {reason.reason}")
    )


def _gallery(summary: Summary) -> Html:
    if not summary.gallery:
        return paragraph("No samples are shown.")
    decoded = sum(shown.decoded for shown in summary.gallery)
    sources = {
        0: "Captions are from the shards.",
        len(summary.gallery): "Captions are decoded from their tokens: the shards are no longer there.",
    }
    text = (
        f"{len(summary.gallery)} samples at even distances through the dataset, with their largest labels in percent of the loss's "
        f"target. {sources.get(decoded, f'{decoded} captions are decoded from their tokens.')}"
    )
    return join([paragraph(text), tag("div", join(_card(shown) for shown in summary.gallery), class_="gallery")])


def _card(shown: Shown) -> Html:
    caption = shown.caption or "(no text)"
    image = picture(shown.image, alt=caption) if shown.image else tag("div", "no image", class_="picture muted")
    bars = weights((label.name, label.weight, f"{label.weight:.1%}") for label in shown.labels[:_LABELS_SHOWN])
    more = len(shown.labels) - _LABELS_SHOWN
    parts = [image, tag("p", caption, class_="text"), bars]
    if more > 0:
        parts.append(paragraph(f"and {more} more labels", muted=True))
    parts.append(tag("figcaption", f"{shown.sample.key}, shard {shown.sample.shard.name}"))
    return tag("figure", join(parts))


def _shards(summary: Summary) -> Html:
    manifest = summary.manifest
    rejected = _rejected_by_shard(summary)
    rows, bad = (_binned(np.array(values)) for values in ([part.rows for part in manifest.shards], rejected))
    per_bar = -(-len(manifest.shards) // _SHARD_BARS)
    chart = bar_chart(
        "Samples of each shard, in order; red: without a label row",
        Axis("shard" if per_bar == 1 else f"shard, {per_bar} per bar"),
        Axis("samples"),
        [float(place * per_bar) for place in range(len(rows) + 1)],
        (rows + bad).tolist(),
        bad.tolist(),
    )
    if summary.faults:
        listed = tag("ul", join(tag("li", tag("code", fault)) for fault in summary.faults[:_SHARDS_TABLED]))
        text = tag(
            "strong", _number(len(summary.faults), "file is", "files are") + " missing or damaged.", class_="bad"
        )
        health = join(
            [
                paragraph(text, " Fix: run preprocess verify on this folder, then its build-labels command again."),
                listed,
            ]
        )
    else:
        files = len(manifest.shards) + len(manifest.betons) + len(manifest.image_index)
        health = paragraph(
            f"All {files:,} files of the manifest are there and have its lengths; preprocess verify reads their content."
        )
    order = sorted(
        range(len(manifest.shards)), key=lambda place: (-_rate(manifest.shards[place], rejected[place]), place)
    )
    worst = [_shard_row(manifest.shards[place], rejected[place]) for place in order[:_SHARDS_TABLED]]
    title = (
        "All shards" if len(worst) == len(manifest.shards) else f"The {len(worst)} shards with most rejected samples"
    )
    numbers = table(
        ["Shard", "#Rows", "#Rejected", "#Share", "Reasons"], worst, caption=f"{title}, by share without a label row"
    )
    return join([health, chart, details(title, numbers)])


def _rejected_by_shard(summary: Summary) -> list[int]:
    return [sum(part.quarantined.values()) for part in summary.manifest.shards]


def _rate(part: ShardPart, rejected: int) -> float:
    return rejected / max(part.rows + rejected, 1)


def _shard_row(part: ShardPart, rejected: int) -> list[str]:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in Counter(part.quarantined).most_common())
    return [part.name, f"{part.rows:,}", f"{rejected:,}", _share(rejected, part.rows + rejected), reasons]


def _binned(values: np.ndarray) -> np.ndarray:
    """Sums of neighbours, so that there are at most _SHARD_BARS."""
    step = -(-len(values) // _SHARD_BARS)
    return np.add.reduceat(values, np.arange(0, len(values), step)) if len(values) else values


def _options(summary: Summary) -> Html:
    manifest = summary.manifest
    rows = [
        ["label rows", manifest.fingerprint],
        ["tokenizer", f"{manifest.tokenizer.name}, {manifest.tokenizer.fingerprint}"],
        ["IDF formula", manifest.idf_formula],
        ["label limit", manifest.label_limit],
        *(
            [f"{section}.{key}", value]
            for section in ("labels", "images")
            for key, value in manifest.options.get(section, {}).items()
        ),
        ["caption_key", ", ".join(manifest.options.get("caption_key", []))],
        ["subset", manifest.options.get("subset") or "all samples"],
    ]
    shown = [[name, tag("code", _option(value))] for name, value in rows]
    return details(
        "Options and fingerprints",
        table(["Key", "Value"], shown, caption="Options that decide the bytes of this folder"),
    )


def _option(value: object) -> str:
    return (
        short_number(float(value))
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1_000_000
        else str(value)
    )
