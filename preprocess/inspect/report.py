"""`preprocess report`: numbers of a finished label dataset, by DuckDB, and one HTML page of them.

`summarise`: idf.duckdb, labels/, quarantine.parquet, some samples -> Summary
`report_page`: Summary -> tiles, IDF spectrum, labels per caption, rejected samples, gallery, shards, options
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np

from labels.manifest import Manifest, ShardPart, read_manifest
from labels.show.explanation import Label, Sample, Vocabulary, read_image, spread_samples, thumbnail
from labels.show.html import (
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
from labels.storage import Layout, is_remote, library_path, printable
from labels.subset import quoted
from preprocess.inspect.explain import source_captions
from preprocess.inspect.sql import open_tables
from preprocess.stage import file_sizes

_EXAMPLES = 5
_THUMBNAIL_SIDE = 320
_NAMED_TOKENS, _TABLED_TOKENS, _LABELS_SHOWN = 14, 20, 8
_CURVE_POINTS, _SHARD_BARS, _SHARDS_TABLED = 400, 120, 12


@dataclass(frozen=True)
class Reason:
    """Samples rejected at one stage for one reason."""

    stage: str
    reason: str
    samples: int
    examples: list[tuple[str, str, str]]  # shard, key, detail


@dataclass(frozen=True)
class Shown:
    """One sample of the gallery."""

    sample: Sample
    image: bytes | None
    caption: str
    decoded: bool  # the caption is decoded from the tokens
    labels: list[Label]


@dataclass(frozen=True)
class Summary:
    """Numbers of a label dataset."""

    out: Path
    manifest: Manifest
    vocabulary: Vocabulary
    labels_histogram: np.ndarray  # int64 [K + 1], captions with 0, 1, ... K labels
    full: int  # captions at the context limit
    median_size: tuple[int | None, int | None]  # width and height in pixels, each a median
    reasons: list[Reason]
    gallery: list[Shown]
    faults: list[str]  # files of the manifest that are missing or of another length


def summarise(out: Path, pictures: int) -> Summary:
    """Read a finished label dataset; `pictures`: samples in the gallery."""
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
    example = "{'shard': shard, 'key': key, 'detail': detail}"
    query = f"""
        SELECT stage, reason, count(*) AS samples, arg_min({example}, file_row_number, {_EXAMPLES})
        FROM read_parquet({quoted(library_path(layout.quarantine))}, file_row_number = true)
        GROUP BY stage, reason ORDER BY samples DESC, stage, reason
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
        small = thumbnail(image, _THUMBNAIL_SIDE) if image else None
        shard_captions = captions[sample.shard.name]
        caption = None if isinstance(shard_captions, str) else shard_captions.get(sample.key)
        text = vocabulary.text(sample.token_ids) if caption is None else caption
        shown.append(Shown(sample, small, text, caption is None, vocabulary.labels(sample.label_ids)))
    return shown


def _faults(layout: Layout, manifest: Manifest) -> list[str]:
    """From one listing of each folder; `preprocess verify` reads everything."""
    labels = file_sizes(layout.labels)
    faults = [
        f"labels/{part.name}.parquet is missing" for part in manifest.shards if f"{part.name}.parquet" not in labels
    ]
    for folder, suffix, parts in (
        (layout.betons, "beton", manifest.betons),
        (layout.image_index, "npy", manifest.image_index),
    ):
        sizes = file_sizes(folder)
        for part in parts:
            name = f"{part.number:05d}.{suffix}"
            if (size := sizes.get(name)) != part.bytes:
                fault = "is missing" if size is None else f"has {size:,} bytes, in the manifest {part.bytes:,}"
                faults.append(f"{folder.name}/{name} {fault}")
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
    return page(f"Data report: {printable(summary.out.resolve().name)}", _tiles(summary), sections)


def _tiles(summary: Summary) -> Html:
    manifest = summary.manifest
    rejected = sum(reason.samples for reason in summary.reasons)
    seen = int((summary.vocabulary.frequency > 0).sum())
    parts = [*manifest.betons, *manifest.image_index]
    gib = sum(part.bytes for part in parts) / 2**30
    nouns = ("beton", "betons") if manifest.betons else ("image index", "image indices")
    labels = summary.labels_histogram
    mean = float((labels * np.arange(len(labels))).sum() / max(manifest.captions, 1))
    width, height = summary.median_size
    samples_note = f"{gib:.2f} GiB in {_number(len(parts), *nouns)}" if parts else "built without images"
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


def _number(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"


def _all_samples(summary: Summary) -> int:
    return summary.manifest.captions + sum(reason.samples for reason in summary.reasons if reason.stage == "labels")


def _share(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    return "0%" if not share else f"{share:.1%}" if share >= 0.001 else "under 0.1%"


def _spectrum(summary: Summary) -> Html:
    vocabulary, manifest = summary.vocabulary, summary.manifest
    order = np.argsort(-vocabulary.frequency, kind="stable")[: int((vocabulary.frequency > 0).sum())]
    if not len(order):
        return paragraph("No caption has a token.")
    ranks = np.unique(np.geomspace(1, len(order), _CURVE_POINTS).round().astype(np.int64))
    curve = Series(ranks.tolist(), vocabulary.idf[order[ranks - 1]].tolist())
    marks = []
    for rank in _named(vocabulary, order):
        token = int(order[rank - 1])
        marks.append(Mark(rank, float(vocabulary.idf[token]), vocabulary.name(token)))
    x = Axis("rank by document frequency", log=True)
    y = Axis("IDF (nats)", low=0.0, high=float(vocabulary.idf[order].max()) * 1.05)
    note = f"Formula {manifest.idf_formula}, {manifest.captions:,} captions"
    chart = line_chart("IDF of tokens by rank", x, y, [curve], marks, note=note)
    text = "A token of many captions says little about an image and has a small weight; a rare token has a large one."
    total = float((vocabulary.frequency * vocabulary.idf).sum()) or 1.0
    rows = []
    for token in order[:_TABLED_TOKENS].tolist():
        label = vocabulary.label(token, 0.0)
        frequency = label.document_frequency
        shares = _share(frequency, manifest.captions), _share(frequency * label.idf, total)
        rows.append([tag("code", label.name), token, f"{frequency:,}", shares[0], f"{label.idf:.3f}", shares[1]])
    columns = ["Token", "#Id", "#Captions", "#Of all captions", "#IDF (nats)", "#Of all weight"]
    caption = f"The {len(rows)} most frequent tokens; weight is document frequency times IDF"
    frequent = table(columns, rows, caption=caption)
    once = int((vocabulary.frequency == 1).sum())
    tail = f"{len(order):,} tokens occur, {once:,} of them in a single caption. “…” marks a part of a word."
    return join([paragraph(text), chart, paragraph(tail, muted=True), details("The most frequent tokens", frequent)])


def _named(vocabulary: Vocabulary, order: np.ndarray) -> list[int]:
    """Ranks of whole words at even distances on the logarithmic axis."""
    names = map(vocabulary.name, order.tolist())
    words = [rank for rank, name in enumerate(names, 1) if name.isalpha() and len(name) > 1]
    if not words:
        return []
    logs, targets = np.log(words), np.linspace(0.0, np.log(len(order)), _NAMED_TOKENS)
    return sorted({words[int(np.argmin(np.abs(logs - target)))] for target in targets})


def _labels(summary: Summary) -> Html:
    histogram, manifest = summary.labels_histogram, summary.manifest
    last = int(np.flatnonzero(histogram).max(initial=0))
    counts = histogram[: last + 1]
    median = int(np.searchsorted(np.cumsum(counts), manifest.captions / 2))
    axes, edges = (Axis("distinct labels of a caption"), Axis("captions")), (np.arange(last + 2) - 0.5).tolist()
    note = f"Median {median}, most {last}; the limit is {manifest.label_limit}"
    chart = bar_chart("Captions by number of labels", *axes, edges, counts.tolist(), note=note)
    context, empty, full = manifest.options["labels"]["context"], int(histogram[0]), summary.full
    text = (
        f"{empty:,} captions ({_share(empty, manifest.captions)}) have no label: their loss is 0. "
        f"{full:,} ({_share(full, manifest.captions)}) fill the limit of {context} tokens and may be cut off."
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
    rows = []
    for shard, key, detail in reason.examples:
        rows.append([shard, tag("code", key or "(none)"), tag("span", detail, class_="long")])
    shown = f"{len(rows)} of {reason.samples:,}" if len(rows) < reason.samples else f"{len(rows)}"
    examples = table(["Shard", "Key", "Detail"], rows, caption=f"Rejected: {reason.reason}")
    return details(f"{reason.reason}: {shown}", examples)


def _gallery(summary: Summary) -> Html:
    if not summary.gallery:
        return paragraph("No samples are shown.")
    decoded = sum(shown.decoded for shown in summary.gallery)
    source = f"{decoded} captions are decoded from their tokens."
    if decoded == 0:
        source = "Captions are from the shards."
    elif decoded == len(summary.gallery):
        source = "Captions are decoded from their tokens: the shards are no longer there."
    text = (
        f"{len(summary.gallery)} samples at even distances through the dataset, with their largest labels in percent"
        f" of the loss's target. {source}"
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
    shards = summary.manifest.shards
    rejected = [sum(part.quarantined.values()) for part in shards]
    rows, bad = _binned(np.array([part.rows for part in shards])), _binned(np.array(rejected))
    per_bar = -(-len(shards) // _SHARD_BARS)
    x = Axis("shard" if per_bar == 1 else f"shard, {per_bar} per bar")
    edges = [float(bar * per_bar) for bar in range(len(rows) + 1)]
    title = "Samples of each shard, in order; red: without a label row"
    chart = bar_chart(title, x, Axis("samples"), edges, (rows + bad).tolist(), bad.tolist())
    shares = np.array([count / max(part.rows + count, 1) for part, count in zip(shards, rejected, strict=True)])
    order = np.argsort(-shares, kind="stable")[:_SHARDS_TABLED].tolist()
    worst = [_shard_row(shards[number], rejected[number]) for number in order]
    title = "All shards" if len(worst) == len(shards) else f"The {len(worst)} shards with most rejected samples"
    columns = ["Shard", "#Rows", "#Rejected", "#Share", "Reasons"]
    numbers = table(columns, worst, caption=f"{title}, by share without a label row")
    return join([_health(summary), chart, details(title, numbers)])


def _health(summary: Summary) -> Html:
    """Whether all files of the manifest are there."""
    manifest = summary.manifest
    if not summary.faults:
        files = len(manifest.shards) + len(manifest.betons) + len(manifest.image_index)
        text = f"All {files:,} files of the manifest exist and have its lengths; preprocess verify reads their"
        return paragraph(f"{text} content.")
    count = _number(len(summary.faults), "file is", "files are")
    problem = tag("strong", f"{count} missing or damaged.", class_="bad")
    fix = " Fix: run preprocess verify on this folder, then its build-labels command again."
    names = join(tag("li", tag("code", fault)) for fault in summary.faults[:_SHARDS_TABLED])
    return join([paragraph(problem, fix), tag("ul", names)])


def _shard_row(part: ShardPart, rejected: int) -> list[str]:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in Counter(part.quarantined).most_common())
    return [part.name, f"{part.rows:,}", f"{rejected:,}", _share(rejected, part.rows + rejected), reasons]


def _binned(values: np.ndarray) -> np.ndarray:
    """Sums of neighbours, so that there are at most _SHARD_BARS."""
    step = -(-len(values) // _SHARD_BARS)
    return np.add.reduceat(values, np.arange(0, len(values), step)) if len(values) else values


def _options(summary: Summary) -> Html:
    manifest = summary.manifest
    options = manifest.options
    sections = ("labels", "images")
    rows = [
        ["label rows", manifest.fingerprint],
        ["tokenizer", f"{manifest.tokenizer.name}, {manifest.tokenizer.fingerprint}"],
        ["IDF formula", manifest.idf_formula],
        ["label limit", manifest.label_limit],
        *([f"{section}.{key}", value] for section in sections for key, value in options.get(section, {}).items()),
        ["caption_key", ", ".join(options.get("caption_key", []))],
        ["subset", options.get("subset") or "all samples"],
    ]
    shown = [[name, tag("code", _option(value))] for name, value in rows]
    title = "Options that decide the bytes of this folder"
    return details("Options and fingerprints", table(["Key", "Value"], shown, caption=title))


def _option(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1_000_000:
        return short_number(float(value))
    return str(value)
