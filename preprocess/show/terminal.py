"""An explanation on the terminal: a small picture in blocks where colours can be shown, and the labels as a table with bars."""

import io

from PIL import Image
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from preprocess.show.explanation import Explanation, Label

_PICTURE_COLUMNS, _PICTURE_LINES = 48, 20
_BAR = 20
_WEIGHTLESS = "-"


def print_explanation(told: Explanation, console: Console) -> None:
    """Everything, from the caption to the target; without the picture where the output is no terminal."""
    sample = told.sample
    size = f", {sample.width} x {sample.height} pixels" if sample.width and sample.height else ""
    uid = f", uid {sample.uid}" if sample.uid else ""
    console.print(Text(f"{sample.key}{uid}: shard {sample.shard.name}, row {sample.index:,} of {told.captions:,}{size}", "bold"))
    if told.image and console.is_terminal:
        console.print(_picture(told.image, min(_PICTURE_COLUMNS, console.width)))
    lines = [("caption", told.caption), ("", f"({told.caption_from})")]
    lines += [("cleaned", told.cleaned)] if told.cleaned is not None else []
    lines.append(("tokens", " | ".join(told.tokens) or "none"))
    facts = Table.grid(padding=(0, 2))
    for name, value in lines:
        facts.add_row(Text(name, "dim"), Text(value, "" if name else "dim"))
    console.print(facts)
    console.print(_labels(told))
    if told.guesses:
        console.print(_guesses(told))
    for note in told.notes:
        console.print(Text(f"note: {note}", "yellow"))


def _labels(told: Explanation) -> RenderableType:
    title = f"labels: {told.tokenizer}, IDF {told.formula} over {told.captions:,} captions; t_c is the loss's target"
    table = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False)
    for name in ("token", "id", "captions with it", "IDF", "t_c", ""):
        table.add_column(
            name, justify="left" if name in ("token", "") else "right", overflow="fold", min_width=8 if name == "token" else None
        )
    largest = max((label.weight for label in told.labels), default=0.0)
    for label in told.labels:
        table.add_row(*_cells(label), f"{label.idf:.3f}", f"{label.weight:.4f}", Text(_bar(label.weight, largest), "blue"))
    return table if told.labels else Text("labels: none, this sample's loss is 0")


def _guesses(told: Explanation) -> RenderableType:
    title = f"the likeliest tokens by {told.checkpoint}; * is a label of this caption"
    table = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False)
    for name in ("token", "id", "captions with it", "probability", "t_c", ""):
        table.add_column(
            name, justify="left" if name in ("token", "") else "right", overflow="fold", min_width=8 if name == "token" else None
        )
    largest = told.guesses[0].probability
    for guess in told.guesses:
        weight = f"{guess.label.weight:.4f}" if guess.hit else _WEIGHTLESS
        cells = _cells(guess.label, "* " if guess.hit else "  ")
        table.add_row(*cells, f"{guess.probability:.4f}", weight, Text(_bar(guess.probability, largest), "blue"))
    return Group(Text(""), table)


def _cells(label: Label, mark: str = "") -> tuple[Text, str, str]:
    return Text(mark + label.name), str(label.token_id), f"{label.document_frequency:,}"


def _bar(value: float, largest: float) -> str:
    return "█" * round(_BAR * value / largest) if largest else ""


def _picture(data: bytes, columns: int) -> RenderableType:
    """Half blocks: each character is two pixels, one above the other."""
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
