"""Reads a drawing's caption out of the RDF metadata (Dublin Core) which its author typed into the SVG.

    SVG bytes -> first <cc:Work> with any text -> title, keywords, description
              -> "title. keyword, keyword. description"

The words are web-grade (many languages, misspellings, left-over markup) and stay as they are: only outer white space
goes. The names of the folders are never read here, so the class label cannot slip into a caption from them.
"""

import html
import io
import re
from dataclasses import dataclass
from xml.etree import ElementTree

# An entity made of other entities is how an XML bomb is built; no drawing needs one.
NESTED_ENTITY = re.compile(rb"<!ENTITY[^>]*&")

WORK = re.compile(r"<(?:\w+:)?Work\b.*?(?:</(?:\w+:)?Work\s*>|\Z)", re.DOTALL)
# Agents (creator, publisher, rights) have a dc:title of their own: a person's name, which is not part of the caption.
AGENT = re.compile(r"<(?:\w+:)?Agent\b.*?</(?:\w+:)?Agent\s*>", re.DOTALL)
TITLE = re.compile(r"<(?:\w+:)?title\b[^>]*(?<!/)>(.*?)</", re.DOTALL)
KEYWORD = re.compile(r"<(?:\w+:)?li\b[^>]*(?<!/)>(.*?)</", re.DOTALL)
DESCRIPTION = re.compile(r"<(?:\w+:)?description\b[^>]*(?<!/)>(.*?)</", re.DOTALL)


@dataclass(frozen=True)
class Caption:
    """The joined text, and whether the XML was broken, so that it had to be picked out by pattern."""

    text: str
    lenient: bool


def join_caption(titles: list[str], keywords: list[str], descriptions: list[str]) -> str:
    """Title, keywords, description: the drawing's own words first, prose (often cut off by a tokenizer) last."""
    parts = [*titles, ", ".join(word for keyword in keywords if (word := keyword.strip())), *descriptions]
    return ". ".join(text for part in parts if (text := part.strip()))


def texts(work: ElementTree.Element, path: str) -> list[str]:
    """All the text under each element that `path` finds."""
    return ["".join(element.itertext()) for element in work.findall(path)]


def parse_caption(svg: bytes) -> str:
    """Reads the caption with a real XML parser; stops at the metadata, which is usually before the drawing."""
    for _, element in ElementTree.iterparse(io.BytesIO(svg), events=("end",)):
        if element.tag.rpartition("}")[2] == "Work":
            # Only direct children: an Agent inside the Work has a title too.
            text = join_caption(
                texts(element, "{*}title"), texts(element, "{*}subject//{*}li"), texts(element, "{*}description")
            )
            if text:
                return text
    return ""


def scan_caption(svg: bytes) -> str:
    """Reads the caption by pattern: for broken XML, undefined entities and XML bombs (nothing is ever expanded)."""
    for work in WORK.findall(svg.decode("utf-8", errors="replace")):
        own = AGENT.sub("", work)
        found = [[html.unescape(text) for text in pattern.findall(own)] for pattern in (TITLE, KEYWORD, DESCRIPTION)]
        text = join_caption(*found)
        if text:
            return text
    return ""


def read_caption(svg: bytes) -> Caption:
    """The caption of one SVG file; empty text if it has none."""
    if NESTED_ENTITY.search(svg):
        return Caption(scan_caption(svg), lenient=True)
    try:
        return Caption(parse_caption(svg), lenient=False)
    except (ElementTree.ParseError, LookupError, ValueError):  # the latter two: an unknown or wrong encoding
        return Caption(scan_caption(svg), lenient=True)
