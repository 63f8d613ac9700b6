"""An explanation as a PNG: the image on the left, caption and weighted labels on the right."""

import io
import textwrap
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from preprocess.show.explanation import Explanation

_WIDTH, _MARGIN, _PICTURE = 1200, 40, 420
_INK, _MUTED, _ACCENT, _GROUND, _TRACK = "#1c1d1f", "#5d6167", "#1f5fa8", "#fdfdfc", "#e6e6e0"
_BAR_HEIGHT, _LINE = 6, 34
_MOST_ROWS = 24
# Fonts with more of the world's scripts than Pillow's own, where the machine has one.
_FONTS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf")
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_card(told: Explanation) -> bytes:
    """The PNG file's bytes, 1200 pixels wide."""
    column = _MARGIN + _PICTURE + _MARGIN
    lines = [(line, 24, _INK) for line in textwrap.wrap(told.caption, 52) or ["(no text)"]]
    lines += [(line, 15, _MUTED) for line in textwrap.wrap(_about(told), 84)]
    groups = [("Target of the loss: t", [(label.name, label.weight, False) for label in told.labels])]
    if told.guesses:
        groups.append((f"Likeliest by {told.checkpoint}", [(guess.label.name, guess.probability, guess.hit) for guess in told.guesses]))
    groups = [(title, rows[:_MOST_ROWS]) for title, rows in groups]
    text_height = sum(round(1.4 * size) for _, size, _ in lines)
    height = max(_PICTURE + 2 * _MARGIN, 3 * _MARGIN + text_height + _LINE * (1 + max(len(rows) for _, rows in groups)))
    image = Image.new("RGB", (_WIDTH, height), _GROUND)
    draw = ImageDraw.Draw(image)
    _paste(image, told.image)
    at = _MARGIN
    for line, size, colour in lines:
        draw.text((column, at), line, colour, font=_font(size))
        at += round(1.4 * size)
    width = (_WIDTH - column - _MARGIN * len(groups)) // len(groups)
    for place, (title, rows) in enumerate(groups):
        _bars(draw, column + place * (width + _MARGIN), at + _MARGIN // 2, width, title, rows)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _about(told: Explanation) -> str:
    sample = told.sample
    corpus = f"{told.tokenizer}, IDF {told.formula} over {told.captions:,} captions"
    return f"{sample.key}, shard {sample.shard.name}. {corpus}. Caption {told.caption_from}."


def _paste(image: Image.Image, data: bytes | None) -> None:
    frame = (_MARGIN, _MARGIN, _MARGIN + _PICTURE, _MARGIN + _PICTURE)
    if data is None:
        draw = ImageDraw.Draw(image)
        draw.rectangle(frame, outline=_TRACK, width=2)
        draw.text((_MARGIN + 20, _MARGIN + 20), "no image", _MUTED, font=_font(18))
        return
    with Image.open(io.BytesIO(data)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_PICTURE, _PICTURE))
    image.paste(small, (_MARGIN + (_PICTURE - small.width) // 2, _MARGIN))


def _bars(draw: ImageDraw.ImageDraw, left: int, top: int, width: int, title: str, rows: list[tuple[str, float, bool]]) -> None:
    draw.text((left, top), title, _MUTED, font=_font(15))
    largest = max((value for _, value, _ in rows), default=0.0) or 1.0
    for place, (name, value, hit) in enumerate(rows):
        y = top + _LINE * (place + 1)
        draw.text((left, y - 4), f"{name}  ✓" if hit else name, _INK, font=_font(16))
        draw.text((left + width, y - 4), f"{value:.1%}", _MUTED, font=_font(16), anchor="ra")
        draw.rectangle((left, y + 18, left + width, y + 18 + _BAR_HEIGHT), _TRACK)
        draw.rectangle((left, y + 18, left + round(width * value / largest), y + 18 + _BAR_HEIGHT), _ACCENT)


@cache
def _font(size: int) -> Font:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
