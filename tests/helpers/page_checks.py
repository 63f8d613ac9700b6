"""Checks of every HTML page: well-formed, readable without a network, alt texts for images; and Chromium's messages."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = shutil.which("chromium")
_VOID = {"meta", "link", "img", "br", "input", "wbr"}


@dataclass
class Page:
    """`text`: all visible text; `images`: their number; `ids`: of its elements; `links`: to ids."""

    text: str = ""
    images: int = 0
    ids: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page, self.open = Page(), []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute of {tag} comes twice"
        assert tag != "script" and not any(name.startswith("on") for name in given)
        for name in ("src", "href", "xlink:href", "srcset"):
            value = given.get(name)
            assert value is None or value.startswith(("data:", "#")), f"{tag} {name}={value} leads outside"
        if tag == "img":
            assert given.get("alt")
            self.page.images += 1
        if given.get("id"):
            assert given["id"] not in self.page.ids
            self.page.ids.add(str(given["id"]))
        if (given.get("href") or "").startswith("#"):
            self.page.links.add(str(given["href"])[1:])
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> ends {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.page.text += data


def check_page(markup: str) -> Page:
    """Read a page, or fail."""
    assert markup.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|url\(|@import", markup)
    assert "prefers-color-scheme: dark" in markup and "width=device-width" in markup
    reader = _Reader()
    reader.feed(markup)
    reader.close()
    assert not reader.open
    assert reader.page.links <= reader.page.ids
    return reader.page


def shown_in_chromium(page: Path, folder: Path) -> str:
    """Chromium's messages while it draws the page as on a phone."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={folder}", "--enable-logging=stderr"]
    picture = folder.with_suffix(".png")
    command += [f"--screenshot={picture}", "--window-size=360,800", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert picture.is_file(), ended.stderr
    return ended.stderr
