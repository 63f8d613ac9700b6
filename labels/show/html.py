"""Self-contained HTML pages with charts, for the reports of both stages.

    `tag`, `table`, `tiles`, `line_chart`, `bar_chart` -> Html (escaped markup) -> Section -> `page`: one HTML file

A page fetches nothing and runs no script (its Content-Security-Policy enforces it), is light or dark as the reader's
system, readable from 320 pixels of width on, and usable by keyboard alone. Charts are inline SVG, drawn twice: for a
wide page and for a phone; page.css shows one of the two, so that text keeps its size.
"""

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any, Literal

from labels import __version__

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

WIDE, NARROW = 720, 340  # widths of a chart's two drawings, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 44
_HUES = 8  # colours in page.css
_CHARACTER = 6.6  # approximate width of a digit, in pixels


class Html(str):
    """Markup; every function of this module escapes a plain `str`."""


def html(value: Any) -> Html:
    """Markup unchanged, everything else escaped."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[Any]) -> Html:
    return Html("\n".join(html(part) for part in parts))


def tag(name: str, content: Any = "", **attributes: Any) -> Html:
    """One element; `class_` becomes `class`, `data_x` becomes `data-x`."""
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    written = "".join(f' {names[key]}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{html(content)}</{name}>")


@dataclass(frozen=True)
class Section:
    name: str  # of its anchor
    title: str
    content: Html


def page(title: str, lead: Any, sections: Sequence[Section]) -> str:
    """The HTML file: heading, `lead` (text or markup), links to two or more sections, and the sections."""
    style = resources.files("labels.show").joinpath("page.css").read_text("utf8")
    links = join(tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections)
    contents = ((section.name, join([tag("h2", section.title), section.content])) for section in sections)
    body = join(tag("section", content, id=name) for name, content in contents)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n'
        '<body>\n<a class="skip" href="#content">To the content</a>\n'
        f"<header>\n<h1>{escape(title)}</h1>\n{html(lead)}\n"
        + (f'<nav aria-label="Sections">\n<ul>\n{links}\n</ul>\n</nav>\n' if len(sections) > 1 else "")
        + f'</header>\n<main id="content">\n{body}\n</main>\n'
        f'<footer><p class="muted">superclass-lean {__version__}</p></footer>\n</body>\n</html>\n'
    )


def paragraph(*content: Any, muted: bool = False) -> Html:
    return tag("p", join(content), **({"class_": "muted"} if muted else {}))


def tiles(facts: Iterable[tuple[str, Any, Any]]) -> Html:
    """The main numbers in boxes: name, value, and a note or an empty string."""
    cells = []
    for name, value, note in facts:
        content = join([value, tag("small", note)] if note else [value])
        cells.append(tag("div", join([tag("dt", name), tag("dd", content)])))
    return tag("dl", join(cells), class_="tiles")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "", label: str = "") -> Html:
    """A table that scrolls sideways on a narrow screen; `rows`: cells, text or markup.

    A leading `#` in `columns` marks a column of numbers, aligned right; `label`: for screen readers, else the caption.
    """
    numeric = [column.startswith("#") for column in columns]

    def cells(kind: str, values: Sequence[Any], **attributes: str) -> Html:
        return join(
            tag(kind, value, **attributes, **({"class_": "number"} if right else {}))
            for value, right in zip(values, numeric, strict=True)
        )

    head = tag("thead", tag("tr", cells("th", [column.removeprefix("#") for column in columns], scope="col")))
    body = tag("tbody", join(tag("tr", cells("td", row)) for row in rows))
    whole = tag("table", join([*([tag("caption", caption)] if caption else []), head, body]))
    label = label or caption or ", ".join(columns).replace("#", "")
    # tabindex: a region that scrolls must be reachable by keyboard
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=label)


def key_name(name: str) -> Html:
    """A dotted key as code that may wrap after a dot or an underscore."""
    return tag("code", Html(escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")))


def details(summary: Any, content: Any) -> Html:
    return tag("details", join([tag("summary", summary), content]))


def picture(data: bytes, *, alt: str, kind: str = "jpeg", large: bool = False) -> Html:
    """An image file as a data URI."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    image = Html(f'<img src="{source}" alt="{escape(alt)}">')
    return tag("div", image, class_="picture large" if large else "picture")


def weights(rows: Iterable[tuple[Any, float, str]]) -> Html:
    """A list of bars, the largest at full width: name, value, and the value as text."""
    rows = list(rows)
    full = max((value for _, value, _ in rows), default=1.0) or 1.0
    lines = []
    for name, value, text in rows:
        bar = tag("span", "", style=f"width:{100 * value / full:.1f}%")
        parts = [tag("span", name), tag("span", text, class_="value"), tag("span", bar, class_="track")]
        lines.append(tag("li", join(parts)))
    return tag("ul", join(lines), class_="weights")


@dataclass(frozen=True)
class Axis:
    label: str  # quantity and unit
    log: bool = False  # base 10
    low: float | None = None  # of the range shown; None: of the data
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One curve."""

    xs: Sequence[float]
    ys: Sequence[float]
    kind: Literal["", "faint", "dots"] = ""  # faint: raw values behind their mean; dots: points without a line
    name: str = ""  # in the legend
    hue: int = 0  # number of its colour in page.css


@dataclass(frozen=True)
class Mark:
    """A named point."""

    x: float
    y: float
    name: str


@dataclass(frozen=True)
class _Scale:
    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        """The position in pixels."""
        low, high, value = (math.log10(v) if self.axis.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def line_chart(
    title: str, x: Axis, y: Axis, series: Sequence[Series], marks: Sequence[Mark] = (), note: str = ""
) -> Html:
    """Curves over an axis; named ones get a legend. `note`: in the caption, after the title.

    The narrow drawing shows every second one of the `marks`, named points.
    """

    def draw(width: int, height: int) -> Html:
        xs, ys = ([value for line in series for value in getattr(line, name)] for name in ("xs", "ys"))
        across, up = _scales(width, height, x, y, xs, ys)
        parts = [_frame(across, up, width, height)]
        for line in series:
            if line.kind == "dots":
                pairs = zip(line.xs, line.ys, strict=True)
                parts += [Html(f'<circle class="dot" cx="{across(a):.1f}" cy="{up(b):.1f}" r="2"/>') for a, b in pairs]
                continue
            points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(line.xs, line.ys, strict=True))
            parts.append(Html(f'<polyline class="{_style(line)}" points="{points}"/>'))
        shown = marks if width == WIDE else marks[::2]
        parts += [_mark(mark, across, up, above=number % 2 == 0) for number, mark in enumerate(shown)]
        return join(parts)

    return _figure(title, note, draw, _legend(series))


def bar_chart(
    title: str,
    x: Axis,
    y: Axis,
    edges: Sequence[float],
    heights: Sequence[float],
    bad: Sequence[float] | None = None,
    note: str = "",
) -> Html:
    """N bars between N + 1 edges; `bad`: the upper part of each height that is drawn in red."""

    def draw(width: int, height: int) -> Html:
        across, up = _scales(width, height, x, y, edges, [0.0, *heights])
        gap = 1.0 if (across.end - across.start) / len(heights) > 3 else 0.0
        parts = [_frame(across, up, width, height)]
        for bar, value in enumerate(heights):
            left, right = across(edges[bar]), across(edges[bar + 1])
            wrong = bad[bar] if bad else 0.0
            for part_low, part_high, kind in ((0.0, value - wrong, "bar"), (value - wrong, value, "bar bad")):
                if part_high > part_low:
                    top = up(part_high)
                    size = f'width="{max(right - left - gap, 0.5):.2f}" height="{up(part_low) - top:.2f}"'
                    parts.append(Html(f'<rect class="{kind}" x="{left:.2f}" y="{top:.2f}" {size}/>'))
        return join(parts)

    return _figure(title, note, draw)


def short_number(value: float) -> str:
    """For axes: 1500 -> 1.5k."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _style(line: Series) -> str:
    """CSS classes of a curve: after `_HUES` curves the colours repeat, dashed."""
    dashes = f" dash{line.hue // _HUES % 3}" if line.hue >= _HUES else ""
    return f"line hue{line.hue % _HUES}{dashes}{' faint' if line.kind else ''}"


def _legend(series: Sequence[Series]) -> list[Html]:
    named = [line for line in series if line.name]
    sample = '<svg viewBox="0 0 28 10" aria-hidden="true"><polyline class="{}" points="0,5 28,5"/></svg>'
    lines = [tag("li", join([Html(sample.format(_style(line))), tag("span", line.name)])) for line in named]
    return [tag("ul", join(lines), class_="legend")] if named else []


def _figure(title: str, note: str, draw: Callable[[int, int], Html], above: Sequence[Html] = ()) -> Html:
    drawings = [*above]
    for kind, width, height in (("wide", WIDE, 320), ("narrow", NARROW, 260)):
        inner = join([tag("title", title), draw(width, height)])
        svg = tag("svg", inner, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
        drawings.append(tag("div", svg, class_=kind))
    caption = tag("figcaption", f"{title}. {note}" if note else f"{title}.")
    return tag("figure", join([*drawings, caption]), class_="chart")


def _scales(
    width: int, height: int, x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]
) -> tuple[_Scale, _Scale]:
    across = _scale(x, xs, _LEFT, width - _RIGHT, count=8 if width == WIDE else 4)
    return across, _scale(y, ys, height - _BOTTOM, _TOP, count=5)


def _scale(axis: Axis, values: Sequence[float], start: float, end: float, count: int) -> _Scale:
    positive = [value for value in values if value > 0] if axis.log else list(values)
    low = axis.low if axis.low is not None else min(positive, default=1.0 if axis.log else 0.0)
    high = axis.high if axis.high is not None else max(positive, default=low)
    if high <= low:
        high = low * 10 if axis.log else low + 1
    ticks = log_ticks(low, high) if axis.log else linear_ticks(low, high, count)
    return _Scale(axis, low, high, start, end, ticks)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in a range; their distance is 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten in a range."""
    return [10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def _frame(across: _Scale, up: _Scale, width: int, height: int) -> Html:
    """Grid lines, ticks and the axes' names."""
    parts = []
    for value in up.ticks:
        parts.append(_line(_LEFT, up(value), width - _RIGHT, up(value), "grid"))
        parts.append(_text(_LEFT - 6, up(value) + 4, short_number(value), "end"))
    parts.append(_line(_LEFT, height - _BOTTOM, width - _RIGHT, height - _BOTTOM, "axis"))
    for value in across.ticks:
        left, half = across(value), len(short_number(value)) * _CHARACTER / 2
        parts.append(_line(left, height - _BOTTOM, left, height - _BOTTOM + 4, "axis"))
        parts.append(_text(min(max(left, half), width - half), height - _BOTTOM + 17, short_number(value), "middle"))
    names = [f"{axis.label}{', log scale' if axis.log else ''}" for axis in (across.axis, up.axis)]
    parts.append(_text((_LEFT + width - _RIGHT) / 2, height - 6, names[0], "middle"))
    middle = (_TOP + height - _BOTTOM) / 2
    turned = f'transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle"'
    return join([*parts, Html(f"<text {turned}>{html(names[1])}</text>")])


def _mark(mark: Mark, across: _Scale, up: _Scale, *, above: bool) -> Html:
    """A dot, with its name at the upper left or the lower right, whichever has room."""
    x, y = across(mark.x), up(mark.y)
    room = len(mark.name) * _CHARACTER + 8
    left = (above and x - room > _LEFT) or x + room > across.end
    text = _text(x - 5, y - 7, mark.name, "end", "name") if left else _text(x + 6, y + 14, mark.name, "start", "name")
    return join([Html(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'), text])


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return Html(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Html:
    return Html(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html(text)}</text>')


def format_seconds(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours: `7.8 s`, `10.0 min`, `10.0 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
