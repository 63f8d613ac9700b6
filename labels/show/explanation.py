"""Samples of a label dataset: found, read, and one of them explained from caption to target.

    key or uid -> `find_sample`: labels/*.parquet -> Sample -> `read_image`: beton, or image index and tar -> JPEG bytes
    Sample.label_ids -> `Vocabulary`: idf.parquet -> Label: name, document frequency, IDF, target weight
    output folder, key or uid -> `explain_row` -> Explanation -> `show`: terminal, `to_html`, `to_svg`, `to_png`

`preprocess explain` adds the caption as it was written, `train explain` a model's predictions, both visual gains. rich
renders all four formats from the description of `describe`; files have the thumbnail instead of block characters.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from rich.bar import Bar
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from labels import Combination, beton
from labels.idf import combined, read_gains, target_weights
from labels.image_metadata import decode_leniently
from labels.manifest import BetonPart, Manifest, ShardPart, Source, open_image_index, read_manifest, read_sources
from labels.show.html import Html, Section, join, page, paragraph, picture, tag
from labels.show.terminal import count, visible
from labels.storage import Layout, UserError, is_remote, library_path, local_copy, write_whole
from labels.tokenizers.tokenizer import name_of, text_of

DECODED = "decoded from the tokens"
_COLUMNS, _NARROW_COLUMNS = 96, 45  # of pages and pictures; of a page on a phone
_PICTURE_COLUMNS, _PICTURE_LINES = 48, 20
_THUMBNAIL_SIDE = 640
_BAR_COLUMNS = 20

_WHITE, _INK, _GREY, _BLUE = (253, 253, 252), (28, 29, 31), (93, 97, 103), (31, 95, 168)
_MUTED = "#8c8d8d"  # what rich makes of `dim`
_ANSI = [_INK, (179, 38, 30), (44, 122, 63), (138, 90, 0), _BLUE, (122, 62, 157), (0, 116, 124), _GREY]
_THEME = TerminalTheme(_WHITE, _INK, _ANSI)
# rich's colours -> those of page.css, which follow the reader's light or dark setting
_PAGE_COLOURS = {"#1f5fa8": "var(--accent)", _MUTED: "var(--muted)", "#8a5a00": "var(--ink)"}
_CELL_WIDTH, _LINE_HEIGHT, _MARGIN = 12, 26, 24  # of the PNG, in pixels
_FONTS = ("DejaVuSansMono.ttf", "NotoSansMono-Regular.ttf", "LiberationMono-Regular.ttf", "Menlo.ttc", "consola.ttf")
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # captions are no markup of rich
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """One label row."""

    shard: ShardPart
    row: int  # number within its shard; `index`: within the dataset
    key: str
    uid: str | None
    width: int | None
    height: int | None
    token_ids: list[int]
    label_ids: list[int]
    repeats: int = 0  # further rows of the same sample

    @property
    def index(self) -> int:
        return self.shard.first_index + self.row


def find_sample(out: Path, manifest: Manifest, name: str, shard: str | None = None) -> Sample:
    """The sample with the key or uid `name`, in any shard or in the given one.

    UserError: there is none (the message says if it was quarantined), or several shards have one.
    """
    parts = {part.name: part for part in manifest.shards if shard in (None, part.name)}
    if not parts:
        allowed = _first_names([part.name for part in manifest.shards])
        raise UserError(f"{out} has no shard {shard!r}", allowed=allowed, fix="correct --shard")
    layout = Layout(out)
    try:
        shards = _shards_with(layout, list(parts), name)
        if len(shards) == 1:
            with local_copy(layout.label_file(shards[0])) as file:
                table = pq.read_table(file, columns=["key", "uid"]).to_pylist()
            rows = [row for row, names in enumerate(table) if name in names.values()]
            return read_samples(layout, parts[shards[0]], rows[:1], repeats=len(rows) - 1)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{layout.labels} cannot be read: {error}", fix=f"run `preprocess verify {out}`") from None
    if not shards:
        example = f'preprocess sql {out} "SELECT key, uid FROM labels LIMIT 5"'
        raise UserError(_why_missing(layout, name, out), fix=f"list samples: {example}")
    fix = "add --shard NAME, or give a uid"
    raise UserError(f"{name!r} is in {count(len(shards), 'shard')}", allowed=_first_names(shards), fix=fix)


def _shards_with(layout: Layout, shards: list[str], name: str) -> list[str]:
    """The shards that have this key or uid, sorted; the label files are read in parallel."""
    files: list[Any] = [layout.label_file(shard) for shard in shards]
    if is_remote(layout.out):  # UPaths
        dataset = ds.dataset([file.path for file in files], format="parquet", filesystem=files[0].fs)
    else:
        dataset = ds.dataset([str(library_path(file)) for file in files], format="parquet")
    matches = (ds.field("key") == name) | (ds.field("uid") == name)
    hits = dataset.to_table(columns=["__filename"], filter=matches)
    return sorted({Path(file).stem for file in hits["__filename"].to_pylist()})


def read_samples(layout: Layout, shard: ShardPart, rows: Sequence[int], repeats: int = 0) -> list[Sample]:
    """The label rows of one shard with these numbers, ascending."""
    with local_copy(layout.label_file(shard.name)) as file:
        table = pq.read_table(file).take(list(rows)).to_pylist()
    return [Sample(shard, row, repeats=repeats, **values) for row, values in zip(rows, table, strict=True)]


def spread_samples(layout: Layout, manifest: Manifest, count: int) -> list[Sample]:
    """`count` samples (all, if there are fewer) at even distances through the dataset, read shard by shard."""
    count = min(count, manifest.captions)
    indices = (2 * np.arange(count, dtype=np.int64) + 1) * manifest.captions // (2 * max(count, 1))
    firsts = np.array([part.first_index for part in manifest.shards])
    shard_numbers = np.searchsorted(firsts, indices, side="right") - 1
    samples: list[Sample] = []
    for number in np.unique(shard_numbers):
        shard = manifest.shards[int(number)]
        samples += read_samples(layout, shard, (indices[shard_numbers == number] - shard.first_index).tolist())
    return samples


def read_image(layout: Layout, manifest: Manifest, sample: Sample) -> bytes | None:
    """The sample's JPEG bytes from its beton, or from its tar by the image index; None if neither has it."""
    for part in manifest.betons:
        if sample.shard.name in part.shards:
            with local_copy(layout.beton_file(part.number)) as file:
                data = _from_beton(file, part, sample.index)
            if data is not None:
                return data
    for part in manifest.image_index:
        if sample.shard.name in part.shards:
            with local_copy(layout.image_index_file(part.number)) as file:
                spans = open_image_index(file)
                spans = spans[spans["index"] == sample.index]
            if len(spans):
                return _from_tar(read_sources(layout)[sample.shard.name], spans[0])
    return None


def _from_tar(source: Source, span: np.void) -> bytes | None:
    """The bytes of an IMAGE_SPAN; None if the tar is missing or has another length."""
    tar = Path(source.path)
    if not tar.is_file() or tar.stat().st_size != source.bytes:
        return None
    with tar.open("rb") as file:
        file.seek(int(span["offset"]))
        return file.read(int(span["bytes"]))


def _from_beton(file: Path, part: BetonPart, index: int) -> bytes | None:
    data = np.memmap(file, np.uint8, mode="r")
    header = data[: beton.HEADER.itemsize].view(beton.HEADER)[0]
    metadata = data[beton.METADATA_OFFSET :][: part.samples * beton.METADATA.itemsize].view(beton.METADATA)
    positions = np.flatnonzero(metadata["index"] == index)
    if not len(positions):
        return None
    # the allocation table has two rows for each sample: image, labels
    offset = int(header["alloc_table_ptr"]) + 2 * int(positions[0]) * beton.ALLOCATION.itemsize
    image = data[offset:][: beton.ALLOCATION.itemsize].view(beton.ALLOCATION)[0]
    return bytes(data[int(image["ptr"]) :][: int(image["size"])])


def thumbnail(data: bytes, side: int) -> bytes | None:
    """The image as a JPEG of at most `side` pixels a side; None if it cannot be decoded."""

    def decoded(image: Image.Image, _: int) -> Image.Image:
        image.draft("RGB", (side, side))
        return image.convert("RGB")

    try:
        small, _ = decode_leniently(data, decoded)
    except Exception:  # Pillow's plugins raise many types
        return None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def quarantined(layout: Layout, key: str, shard: str | None = None) -> list[tuple[str, str, str, str]]:
    """Shard, stage, reason and detail of the rejected samples with this key."""
    with local_copy(layout.quarantine) as file:
        rows = pq.read_table(file, filters=[("key", "==", key)]).to_pylist()
    return [(row["shard"], row["stage"], row["reason"], row["detail"]) for row in rows if shard in (None, row["shard"])]


def _why_missing(layout: Layout, name: str, out: Path) -> str:
    rows = [row for row in quarantined(layout, name) if row[1] == "labels"]
    rejected = [f"{reason} ({detail}), in shard {shard}" for shard, _, reason, detail in rows]
    why = f": it was rejected, {'; '.join(rejected[:_NAMES_SHOWN])}" if rejected else " as key or uid"
    return f"{out} has no label row {name!r}{why}"


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


@dataclass(frozen=True)
class Label:
    """One label of a caption."""

    token_id: int
    name: str
    document_frequency: int  # captions
    idf: float  # w_c
    weight: float  # t_c, its share of the loss's target
    visual_gain: float | None = None  # nats, calibrated; None without a table of visual weights
    visual_weight: float | None = None  # t_c with visual weights; None likewise, and where it is no label


class Vocabulary:
    """The table of idf.parquet, by token id."""

    def __init__(self, layout: Layout, manifest: Manifest) -> None:
        with local_copy(layout.idf_parquet) as file:
            table = pq.read_table(file)
        self._tokens = table["token"]
        self.frequency: np.ndarray = table["document_frequency"].to_numpy()
        self.idf: np.ndarray = table["idf"].to_numpy()
        self._tokenizer = manifest.tokenizer.name

    def name(self, token_id: int) -> str:
        return name_of(self._tokens[token_id].as_py(), self._tokenizer)

    def text(self, token_ids: list[int]) -> str:
        return text_of([self._tokens[token_id].as_py() for token_id in token_ids], self._tokenizer)

    def labels(self, label_ids: list[int]) -> list[Label]:
        """The labels of one caption, largest weight first."""
        weights = target_weights(self.idf[label_ids]).tolist() if label_ids else []
        pairs = sorted(zip(weights, label_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        return [self.label(token_id, weight) for weight, token_id in pairs]

    def label(self, token_id: int, weight: float) -> Label:
        return Label(token_id, self.name(token_id), int(self.frequency[token_id]), float(self.idf[token_id]), weight)


@dataclass(frozen=True)
class Guess:
    """One token that a model predicts."""

    label: Label
    probability: float
    hit: bool  # whether it is a label of the caption


@dataclass(frozen=True)
class Explanation:
    sample: Sample
    image: bytes | None  # JPEG
    caption: str
    caption_from: str  # where the caption was read
    cleaned: str | None
    tokens: list[str]  # names in the caption's order
    labels: list[Label]  # largest weight first
    captions: int  # of the dataset
    formula: str  # of the IDF
    tokenizer: str
    notes: tuple[str, ...] = ()
    checkpoint: str = ""
    guesses: tuple[Guess, ...] = ()  # likeliest first


def explain_row(out: Path, name: str, shard: str | None = None) -> Explanation:
    """The explanation of the sample with the key or uid `name`, from the label dataset alone: the caption is decoded
    from the tokens. UserError: there is no such sample, or several without `shard`.
    """
    manifest, layout = read_manifest(out), Layout(out)
    sample = find_sample(out, manifest, name, shard)
    vocabulary = Vocabulary(layout, manifest)
    labels, image = vocabulary.labels(sample.label_ids), read_image(layout, manifest, sample)
    notes = []
    if sample.repeats:
        notes.append(f"the subset names this sample {sample.repeats + 1} times: it has {sample.repeats + 1} label rows")
    if image is None:
        rows = quarantined(layout, sample.key, sample.shard.name)
        rejected = [f"{reason}: {detail}" for _, stage, reason, detail in rows if stage == "images"]
        notes.append(f"no image: {rejected[0] if rejected else 'the output folder has none, or its tar has changed'}")
    if labels and not any(label.weight for label in labels):
        notes.append("no label has weight: the loss of this sample is 0")
    return Explanation(
        sample=sample,
        image=image,
        caption=vocabulary.text(sample.token_ids),
        caption_from=DECODED,
        cleaned=None,
        tokens=[vocabulary.name(token) for token in sample.token_ids],
        labels=labels,
        captions=manifest.captions,
        formula=manifest.idf_formula,
        tokenizer=manifest.tokenizer.name,
        notes=tuple(notes),
    )


def with_guesses(
    explanation: Explanation, out: Path, checkpoint: str, predicted: Sequence[tuple[int, float]]
) -> Explanation:
    """The explanation with a model's likeliest tokens, given as (token id, probability)."""
    vocabulary = Vocabulary(Layout(out), read_manifest(out))
    weights = {label.token_id: label.weight for label in explanation.labels}
    guesses = [
        Guess(vocabulary.label(token, weights.get(token, 0.0)), probability, token in weights)
        for token, probability in predicted
    ]
    return replace(explanation, checkpoint=checkpoint, guesses=tuple(guesses))


def with_visual(
    explanation: Explanation, out: Path, visual: Path, combination: Combination = "idf*gain", floor: float = 0.01
) -> Explanation:
    """The explanation with the gains of a visual.parquet, and targets with its weights; the rest as for `combined`."""
    gains, labels = read_gains(visual, read_manifest(out).tokenizer, out), explanation.labels
    ids, idf = [label.token_id for label in labels], np.array([label.idf for label in labels])
    shares = dict(zip(ids, target_weights(combined(idf, gains[np.array(ids, int)], combination, floor)), strict=True))
    seen = lambda label, token: replace(label, visual_gain=float(gains[token]), visual_weight=shares.get(token))  # noqa: E731
    guesses = tuple(replace(guess, label=seen(guess.label, guess.label.token_id)) for guess in explanation.guesses)
    note = f"visual gain in nats of {visual}; visual t_c: the target with visual weights ({combination})"
    return replace(explanation, labels=list(map(seen, labels, ids)), guesses=guesses, notes=(*explanation.notes, note))


def show(explanation: Explanation, *, html: Path | None, svg: Path | None, png: Path | None) -> None:
    """Print the explanation, and write the files that are not None."""
    console = Console(**_PLAIN)
    small = thumbnail(explanation.image, _THUMBNAIL_SIDE) if explanation.image and console.is_terminal else None
    console.print(describe(explanation, _blocks(small, min(_PICTURE_COLUMNS, console.width)) if small else ""))
    for file, render in ((html, to_html), (svg, to_svg), (png, to_png)):
        if file:
            content = render(explanation)
            data = content.encode("utf8") if isinstance(content, str) else content
            write_whole(file, lambda partial, data=data: partial.write_bytes(data))


def describe(explanation: Explanation, image: RenderableType = "") -> Group:
    """The text, with `image` above it."""
    sample = explanation.sample
    size = f", {sample.width} x {sample.height} pixels" if sample.width and sample.height else ""
    uid = f", uid {sample.uid}" if sample.uid else ""
    title = f"{sample.key}{uid}: shard {sample.shard.name}, row {sample.index:,} of {explanation.captions:,}{size}"
    parts: list[RenderableType] = [*([image] if image else []), _text(title, "bold")]
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_row(_text("caption", "dim"), _text(explanation.caption or "(empty)"))
    facts.add_row("", _text(f"({explanation.caption_from})", "dim"))
    if explanation.cleaned is not None:
        facts.add_row(_text("cleaned", "dim"), _text(explanation.cleaned or "(empty)"))
    facts.add_row(_text("tokens", "dim"), _text(" | ".join(explanation.tokens) or "none"))
    parts += [facts, Text()]
    if explanation.labels:
        corpus = f"{explanation.tokenizer}, IDF {explanation.formula} over {count(explanation.captions, 'caption')}"
        labels = explanation.labels
        rows = [(label.name, label, [f"{label.idf:.3f}", f"{label.weight:.4f}"], label.weight) for label in labels]
        parts.append(_table(f"labels: {corpus}; t_c is the target of the loss", ("IDF", "t_c"), rows))
    else:
        parts.append(_text("labels: none, the loss of this sample is 0"))
    if explanation.guesses:
        hits, rows = sum(guess.hit for guess in explanation.guesses), []
        for guess in explanation.guesses:
            mark, weight = ("* ", f"{guess.label.weight:.4f}") if guess.hit else ("  ", "-")
            rows.append((mark + guess.label.name, guess.label, [f"{guess.probability:.4f}", weight], guess.probability))
        title = f"likeliest tokens by {explanation.checkpoint}; * marks the {count(hits, 'label')} of this caption"
        parts += [Text(), _table(title, ("prob.", "t_c"), rows)]
    return Group(*parts, *(_text(f"note: {note}", "yellow") for note in explanation.notes))


def _text(text: str, style: str = "") -> Text:
    """Text that reaches the terminal as it is: no markup, no control characters."""
    return Text(visible(text), style, overflow="fold")


def _table(title: str, columns: tuple[str, str], rows: Sequence[tuple[str, Label, list[str], float]]) -> Group:
    """`rows`: name, label, a cell for each of `columns`, and the value of the bar; with visual gains, these too."""
    visual = [] if rows[0][1].visual_gain is None else ["gain", "visual t_c"]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("token", overflow="fold", min_width=12)
    for name in ("id", "captions", *columns, *visual):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", max_width=_BAR_COLUMNS)
    largest = max(value for *_, value in rows) or 1.0
    for name, label, cells, value in rows:
        if visual:
            share = label.visual_weight
            cells = [*cells, f"{label.visual_gain:.3f}", "-" if share is None else f"{share:.4f}"]
        bar = Bar(largest, 0, value, color="blue")
        table.add_row(_text(name), str(label.token_id), f"{label.document_frequency:,}", *cells, bar)
    return Group(_text(title, "dim"), table)


def _blocks(data: bytes, columns: int) -> RenderableType:
    """An image for the terminal: each character is two pixels, one above the other."""
    with Image.open(io.BytesIO(data)) as image:
        scale = min(columns / image.width, 2 * _PICTURE_LINES / image.height)
        width, height = max(round(image.width * scale), 1), max(round(image.height * scale / 2), 1)
        pixels = image.convert("RGB").resize((width, 2 * height), Image.Resampling.LANCZOS)
    segments = []
    for line in range(height):
        for column in range(width):
            above, below = (Color.from_rgb(*pixels.getpixel((column, 2 * line + half))) for half in (0, 1))  # type: ignore[misc]  # an RGB image
            segments.append(Segment("▀", Style(color=above, bgcolor=below)))
        segments.append(Segment.line())
    return Segments(segments)


def _recorded(explanation: Explanation, columns: int, image: RenderableType = "") -> Console:
    terminal: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "no_color": False}
    console = Console(record=True, file=io.StringIO(), width=columns, legacy_windows=False, **terminal, **_PLAIN)
    console.print(describe(explanation, image))
    return console


def to_html(explanation: Explanation) -> str:
    """A page that fetches nothing: the thumbnail, and the description at the widths of a screen and of a phone."""
    data = thumbnail(explanation.image, _THUMBNAIL_SIDE) if explanation.image else None
    alt = visible(explanation.caption) or "no caption"
    parts = [picture(data, alt=alt, large=True) if data else paragraph("No image.", muted=True)]
    narrow = _NARROW_COLUMNS + 17 * any(label.visual_gain is not None for label in explanation.labels)  # it scrolls
    for kind, columns in (("wide", _COLUMNS), ("narrow", narrow)):
        code = _recorded(explanation, columns).export_html(theme=_THEME, inline_styles=True, code_format="{code}")
        code = re.sub('style="[^"]*"', _with_page_colours, code)  # rich has escaped the quotation marks of texts
        parts.append(tag("pre", Html(code), class_=kind, tabindex="0"))
    key = visible(explanation.sample.key)
    return page(f"Sample {key}", "", [Section("sample", "From caption to target", join(parts))])


def _with_page_colours(style: re.Match[str]) -> str:
    return re.sub("#[0-9a-f]{6}", lambda colour: _PAGE_COLOURS.get(colour[0], colour[0]), style[0])


def to_svg(explanation: Explanation) -> str:
    """The description as rich draws a terminal, with the thumbnail; fetches nothing."""
    data, lines = _picture_for(explanation, 24)
    svg = _recorded(explanation, _COLUMNS, lines).export_svg(title=visible(explanation.sample.key), theme=_THEME)
    svg = re.sub(r"@font-face {.*?}\s*", "", svg, count=2, flags=re.DOTALL)  # rich's web fonts
    if data:
        with Image.open(io.BytesIO(data)) as image:
            size = f'width="{image.width}" height="{image.height}"'
        element = f'<image x="0" y="2" {size} href="data:image/jpeg;base64,{base64.b64encode(data).decode()}"/>'
        svg = svg.replace('-clip-terminal)">', f'-clip-terminal)">{element}', 1)
    return svg


def to_png(explanation: Explanation) -> bytes:
    """The description and the thumbnail, 1200 pixels wide."""
    data, lines = _picture_for(explanation, _LINE_HEIGHT)
    console = Console(file=io.StringIO(), width=_COLUMNS, force_terminal=True, **_PLAIN)
    text_lines = console.render_lines(describe(explanation, lines), pad=False)
    width, height = _COLUMNS * _CELL_WIDTH, len(text_lines) * _LINE_HEIGHT
    image = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), _WHITE)
    if data:
        with Image.open(io.BytesIO(data)) as small:
            image.paste(small, (_MARGIN, _MARGIN))
    draw, font = ImageDraw.Draw(image), _font()
    for row, line in enumerate(text_lines):
        x, y = _MARGIN, _MARGIN + row * _LINE_HEIGHT
        for text, style, _ in line:
            for word in re.findall(r"\s+|\S+", text):  # a word keeps its own spacing, each word starts in its column
                eighths = sum(_EIGHTHS.find(character) for character in word)
                if word[0] in _EIGHTHS[1:]:
                    draw.rectangle((x, y + 6, x + eighths * _CELL_WIDTH // 8, y + _LINE_HEIGHT - 8), _BLUE)
                elif not word.isspace():
                    weight = {"stroke_width": 0.4, "stroke_fill": _INK} if style and style.bold else {}
                    draw.text((x, y), word, _GREY if style and style.dim else _INK, font=font, **weight)
                x += cell_len(word) * _CELL_WIDTH
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _picture_for(explanation: Explanation, line_height: int) -> tuple[bytes | None, RenderableType]:
    """The thumbnail of a picture, and empty lines of its height plus one."""
    data = thumbnail(explanation.image, _PICTURE_LINES * line_height) if explanation.image else None
    if data is None:
        return None, ""
    with Image.open(io.BytesIO(data)) as image:
        return data, Text("\n" * -(-image.height // line_height))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, 20)
        except OSError:
            continue
    return ImageFont.load_default(18)
