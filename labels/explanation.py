"""One sample from caption to target, as text, HTML, SVG and PNG.

    output folder, key or uid -> `explain_row` -> Explanation -> `show`: terminal, `to_html`, `to_svg`, `to_png`

`preprocess explain` adds the caption as it was written, `train explain` a model's predictions. rich renders all four
formats from the description of `describe`; files have the thumbnail instead of the terminal's block characters.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

from labels.html import Html, Section, join, page, paragraph, picture, tag
from labels.manifest import read_manifest
from labels.samples import Label, Sample, Vocabulary, find_sample, quarantined, read_image, thumbnail
from labels.storage import Layout, write_whole

DECODED = "decoded from the tokens"
_COLUMNS, _NARROW_COLUMNS = 96, 45  # of pages and pictures; of a page on a phone
_PICTURE_COLUMNS, _PICTURE_LINES = 48, 20
_THUMBNAIL_SIDE = 640
_BAR_COLUMNS = 20

# Control characters, and characters that break lines, reorder text or are not allowed in XML.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
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


def visible(text: str) -> str:
    """Text without control characters, which become symbols: an escape becomes ␛, a right-to-left override ⟨202E⟩."""

    def symbol(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨{code:04X}⟩"

    return _INVISIBLE.sub(symbol, text)


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
        corpus = f"{explanation.tokenizer}, IDF {explanation.formula} over {explanation.captions:,} captions"
        labels = explanation.labels
        rows = [(label.name, label, f"{label.idf:.3f}", f"{label.weight:.4f}", label.weight) for label in labels]
        parts.append(_table(f"labels: {corpus}; t_c is the target of the loss", ("IDF", "t_c"), rows))
    else:
        parts.append(_text("labels: none, the loss of this sample is 0"))
    if explanation.guesses:
        hits, rows = sum(guess.hit for guess in explanation.guesses), []
        for guess in explanation.guesses:
            mark, weight = ("* ", f"{guess.label.weight:.4f}") if guess.hit else ("  ", "-")
            rows.append((mark + guess.label.name, guess.label, f"{guess.probability:.4f}", weight, guess.probability))
        title = f"likeliest tokens by {explanation.checkpoint}; * marks the {hits} labels of this caption"
        parts += [Text(), _table(title, ("prob.", "t_c"), rows)]
    return Group(*parts, *(_text(f"note: {note}", "yellow") for note in explanation.notes))


def _text(text: str, style: str = "") -> Text:
    """Text that reaches the terminal as it is: no markup, no control characters."""
    return Text(visible(text), style, overflow="fold")


def _table(title: str, columns: tuple[str, str], rows: Sequence[tuple[str, Label, str, str, float]]) -> Group:
    """`rows`: name, label, a cell for each of `columns`, and the value of the bar."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("token", overflow="fold", min_width=12)
    for name in ("id", "captions", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", max_width=_BAR_COLUMNS)
    largest = max(value for *_, value in rows) or 1.0
    for name, label, *cells, value in rows:
        bar = Bar(largest, 0, value, color="blue")
        table.add_row(_text(name), str(label.token_id), f"{label.document_frequency:,}", *map(str, cells), bar)
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
    for kind, columns in (("wide", _COLUMNS), ("narrow", _NARROW_COLUMNS)):
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
