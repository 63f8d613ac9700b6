"""The report of an OUT as a page: spectrum, labels a caption, what was left out, a gallery, shards; see labels/html.py."""

from collections import Counter

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
from labels.manifest import ShardPart
from preprocess.show.explanation import Vocabulary
from preprocess.show.summary import Reason, Shown, Summary

_NAMED_TOKENS, _TABLED_TOKENS, _LABELS_SHOWN = 14, 20, 8
_CURVE_POINTS, _SHARD_BARS, _SHARDS_TABLED = 400, 120, 12


def report_page(summary: Summary) -> str:
    """The whole HTML file."""
    sections = [
        Section("spectrum", "IDF spectrum", _spectrum(summary)),
        Section("labels", "Labels a caption", _labels(summary)),
        Section("quarantine", "Left out", _quarantine(summary)),
        Section("gallery", "Images and their labels", _gallery(summary)),
        Section("shards", "Shards", _shards(summary)),
        Section("options", "How it was built", _options(summary)),
    ]
    return page(f"{summary.out.resolve().name}: what the build made of its data", _tiles(summary), sections)


def _tiles(summary: Summary) -> Html:
    manifest = summary.manifest
    left_out = sum(reason.samples for reason in summary.reasons)
    seen = int((summary.vocabulary.frequency > 0).sum())
    parts = [*manifest.betons, *manifest.places]
    gib = sum(part.bytes for part in parts) / 2**30
    files = _number(len(parts), "beton", "betons") if manifest.betons else _number(len(parts), "file of places", "files of places")
    mean = float((summary.labels_histogram * np.arange(len(summary.labels_histogram))).sum() / max(manifest.captions, 1))
    width, height = summary.median_size
    samples_note = f"{gib:.2f} GiB in {files}" if parts else "built without images"
    return tiles(
        [
            ("Captions labelled", f"{manifest.captions:,}", "from " + _number(len(manifest.shards), "shard", "shards")),
            ("Samples with image", f"{manifest.samples:,}" if parts else "none", samples_note),
            ("Left out", f"{left_out:,}", _share(left_out, _all_samples(summary)) + " of all samples"),
            ("Labels a caption", f"{mean:.1f}", "mean"),
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
        return paragraph("No token occurs.")
    ranks = np.unique(np.geomspace(1, len(order), _CURVE_POINTS).round().astype(np.int64))
    curve = Series(ranks.tolist(), vocabulary.idf[order[ranks - 1]].tolist())
    marks = [
        Mark(rank, float(vocabulary.idf[order[rank - 1]]), vocabulary.name(int(order[rank - 1]))) for rank in _named(vocabulary, order)
    ]
    chart = line_chart(
        "IDF of tokens over their rank",
        Axis("rank by document frequency", log=True),
        Axis("IDF (nats)", low=0.0, high=float(vocabulary.idf[order].max()) * 1.05),
        [curve],
        marks,
        note=f"Formula {manifest.idf_formula}, {manifest.captions:,} captions",
    )
    text = "A token that many captions have says little of an image and weighs little; a rare one weighs much."
    total = float((vocabulary.frequency * vocabulary.idf).sum()) or 1.0
    rows = []
    for token in order[:_TABLED_TOKENS].tolist():
        label = vocabulary.label(token, 0.0)
        share = _share(label.document_frequency * label.idf, total)
        in_captions = _share(label.document_frequency, manifest.captions)
        rows.append([tag("code", label.name), token, f"{label.document_frequency:,}", in_captions, f"{label.idf:.3f}", share])
    columns = ["Token", "#Id", "#Captions with it", "#Of all captions", "#IDF (nats)", "#Of all weight"]
    commonest = table(columns, rows, caption=f"The {len(rows)} commonest tokens; weight is document frequency times IDF")
    once = int((vocabulary.frequency == 1).sum())
    tail = f"{len(order):,} tokens occur, {once:,} of them in one caption alone. “…” marks where a word goes on."
    return join([paragraph(text), chart, paragraph(tail, muted=True), details("The commonest tokens", commonest)])


def _named(vocabulary: Vocabulary, order: np.ndarray) -> list[int]:
    """Ranks of whole words at even distances on the logarithmic axis."""
    words = [rank for rank, token in enumerate(order.tolist(), 1) if (name := vocabulary.name(token)).isalpha() and len(name) > 1]
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
        f"{int(histogram[0]):,} captions ({_share(int(histogram[0]), manifest.captions)}) have no label, which makes their loss zero; "
        f"{summary.full:,} ({_share(summary.full, manifest.captions)}) fill the limit of {context} tokens and may have lost their end."
    )
    return join([chart, paragraph(text)])


def _quarantine(summary: Summary) -> Html:
    if not summary.reasons:
        return paragraph("Nothing was left out.")
    total = _all_samples(summary)
    stages = {"labels": "no label row", "images": "label row, but no image"}
    rows = [
        [reason.reason, stages.get(reason.stage, reason.stage), f"{reason.samples:,}", _share(reason.samples, total)]
        for reason in summary.reasons
    ]
    overview = table(["Reason", "What it has", "#Samples", "#Of all"], rows, caption="Samples left out, by reason")
    return join([overview, tag("h3", "Examples"), *(_examples(reason) for reason in summary.reasons)])


def _examples(reason: Reason) -> Html:
    rows = [[shard, tag("code", key or "(none)"), tag("span", detail, class_="long")] for shard, key, detail in reason.examples]
    shown = f"{len(rows)} of {reason.samples:,}" if len(rows) < reason.samples else f"{len(rows)}"
    return details(f"{reason.reason}: {shown}", table(["Shard", "Key", "Detail"], rows, caption=f"Left out: {reason.reason}"))


def _gallery(summary: Summary) -> Html:
    if not summary.gallery:
        return paragraph("No samples are shown.")
    decoded = sum(shown.decoded for shown in summary.gallery)
    told = {
        0: "Captions are as they came.",
        len(summary.gallery): "Captions are put together from their tokens: the shards are no longer there.",
    }
    text = (
        f"{len(summary.gallery)} samples at even distances through all rows, each with the labels that weigh most: percent of the loss's "
        f"target. {told.get(decoded, f'{decoded} captions are put together from their tokens.')}"
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
    left_out = _left_out_by_shard(summary)
    rows, bad = (_binned(np.array(values)) for values in ([part.rows for part in manifest.shards], left_out))
    per_bar = -(-len(manifest.shards) // _SHARD_BARS)
    chart = bar_chart(
        "Samples of the shards, in order, those without a label row in red",
        Axis("shard" if per_bar == 1 else f"shard, {per_bar} a bar"),
        Axis("samples"),
        [float(place * per_bar) for place in range(len(rows) + 1)],
        (rows + bad).tolist(),
        bad.tolist(),
    )
    if summary.faults:
        listed = tag("ul", join(tag("li", tag("code", fault)) for fault in summary.faults[:_SHARDS_TABLED]))
        text = tag("strong", _number(len(summary.faults), "file is", "files are") + " missing or damaged.", class_="bad")
        health = join([paragraph(text, " Mend: run preprocess verify on this OUT, then its build-labels command again."), listed])
    else:
        files = len(manifest.shards) + len(manifest.betons) + len(manifest.places)
        health = paragraph(f"All {files:,} files of the manifest are there, of the length it says; preprocess verify reads them whole.")
    order = sorted(range(len(manifest.shards)), key=lambda place: (-_rate(manifest.shards[place], left_out[place]), place))
    worst = [_shard_row(manifest.shards[place], left_out[place]) for place in order[:_SHARDS_TABLED]]
    title = "All shards" if len(worst) == len(manifest.shards) else f"The {len(worst)} shards that lost most"
    numbers = table(["Shard", "#Rows", "#Left out", "#Share", "Reasons"], worst, caption=f"{title}, by share without a label row")
    return join([health, chart, details(title, numbers)])


def _left_out_by_shard(summary: Summary) -> list[int]:
    return [sum(part.quarantined.values()) for part in summary.manifest.shards]


def _rate(part: ShardPart, left_out: int) -> float:
    return left_out / max(part.rows + left_out, 1)


def _shard_row(part: ShardPart, left_out: int) -> list[str]:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in Counter(part.quarantined).most_common())
    return [part.name, f"{part.rows:,}", f"{left_out:,}", _share(left_out, part.rows + left_out), reasons]


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
        *([f"{section}.{key}", value] for section in ("labels", "images") for key, value in manifest.options.get(section, {}).items()),
        ["caption_key", ", ".join(manifest.options.get("caption_key", []))],
        ["subset", manifest.options.get("subset") or "all samples"],
    ]
    shown = [[name, tag("code", _told(value))] for name, value in rows]
    return details("Options and fingerprints", table(["Key", "Value"], shown, caption="What decides the bytes of this OUT"))


def _told(value: object) -> str:
    return short_number(float(value)) if isinstance(value, int) and not isinstance(value, bool) and value >= 1_000_000 else str(value)
