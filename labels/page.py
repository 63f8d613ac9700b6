"""One self-contained HTML page, of which both stages' reports are made: nothing is fetched, no script runs.

Light and dark by the reader's own setting, readable from 320 pixels of width on, usable by keyboard alone.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from labels import __version__

# The page may show what is in it and nothing else; a browser that finds an address in it does not follow it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Markup. Plain strings are text, and are escaped wherever a page takes them in."""


def html(value: Any) -> Html:
    """Markup as it is, everything else as text."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[Any]) -> Html:
    """The parts one after another."""
    return Html("\n".join(html(part) for part in parts))


def tag(name: str, content: Any = "", **attributes: Any) -> Html:
    """One element; `class_` stands for `class`, `data_x` for `data-x`."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{told}>{html(content)}</{name}>")


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading, reachable from the page's head."""

    name: str
    title: str
    content: Html


def page(title: str, lead: Any, sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: the page's heading and its name in the browser.
        lead: what stands below the heading.
        sections: in order; with two or more of them a list of links leads to each.
    """
    style = resources.files("labels").joinpath("page.css").read_text("utf8")
    links = join(tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections)
    body = join(tag("section", join([tag("h2", section.title), section.content]), id=section.name) for section in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n<a class="skip" href="#content">To the content</a>\n'
        f"<header>\n<h1>{escape(title)}</h1>\n{html(lead)}\n"
        + (f'<nav aria-label="Sections">\n<ul>\n{links}\n</ul>\n</nav>\n' if len(sections) > 1 else "")
        + f'</header>\n<main id="content">\n{body}\n</main>\n'
        f'<footer><p class="muted">superclass-lean {__version__}</p></footer>\n</body>\n</html>\n'
    )


def paragraph(*content: Any, muted: bool = False) -> Html:
    """Text in one paragraph."""
    return tag("p", join(content), **({"class_": "muted"} if muted else {}))


def tiles(facts: Iterable[tuple[str, Any, Any]]) -> Html:
    """Numbers at a glance: name, value, and a remark or an empty string."""
    cells = (
        tag("div", join([tag("dt", name), tag("dd", join([value, tag("small", note)] if note else [value]))]))
        for name, value, note in facts
    )
    return tag("dl", join(cells), class_="tiles")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "", label: str = "") -> Html:
    """A table that scrolls sideways where it is wider than the screen.

    Args:
        columns: headings; one that begins with `#` is a column of numbers, aligned at the right.
        rows: cells, text or markup.
        caption: what the table shows.
        label: the same for those who hear it without what stands around it; the caption where it is empty.
    """
    numeric = [column.startswith("#") for column in columns]

    def cells(kind: str, values: Sequence[Any], **attributes: str) -> Html:
        return join(
            tag(kind, value, **attributes, **({"class_": "number"} if right else {})) for value, right in zip(values, numeric, strict=True)
        )

    head = tag("thead", tag("tr", cells("th", [column.removeprefix("#") for column in columns], scope="col")))
    body = tag("tbody", join(tag("tr", cells("td", row)) for row in rows))
    whole = tag("table", join([*([tag("caption", caption)] if caption else []), head, body]))
    # A region that scrolls has to be reachable by keyboard.
    return tag(
        "div", whole, class_="scroll", tabindex="0", role="region", aria_label=label or caption or ", ".join(columns).replace("#", "")
    )


def key_name(name: str) -> Html:
    """A dotted key as code that may break behind its dots, where a screen is narrow."""
    return tag("code", Html(escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")))


def details(summary: Any, content: Any) -> Html:
    """What is shown when it is asked for."""
    return tag("details", join([tag("summary", summary), content]))


def picture(data: bytes, *, alt: str, kind: str = "jpeg", large: bool = False) -> Html:
    """An image inside the page; `data` are its file's bytes."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    image = Html(f'<img src="{source}" alt="{escape(alt)}">')
    return tag("div", image, class_="picture large" if large else "picture")


def weights(rows: Iterable[tuple[Any, float, str]]) -> Html:
    """Names with bars, the largest of them full: name, value, and how the value is told."""
    rows = list(rows)
    full = max((value for _, value, _ in rows), default=1.0) or 1.0
    lines = []
    for name, value, told in rows:
        bar = tag("span", "", style=f"width:{100 * value / full:.1f}%")
        lines.append(tag("li", join([tag("span", name), tag("span", told, class_="value"), tag("span", bar, class_="track")])))
    return tag("ul", join(lines), class_="weights")
