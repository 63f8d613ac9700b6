"""Finds the pairs of PNG and SVG, and makes a sample out of each.

    ROOT/png/CLASS/.../NAME.png + ROOT/svg/CLASS/.../NAME.svg -> Pair
    Pair -> caption (from the SVG) + picture (from the PNG) -> Sample, or the reason why there is none

All of this depends on one pair only, so pairs can be worked on in any order and in any process.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from clipart_caption import read_caption
from clipart_image import Picture, SkippedImageError, make_picture


@dataclass(frozen=True)
class Pair:
    """A PNG and the SVG it was rendered from; the class is the top folder."""

    url: str
    class_name: str
    png: Path
    svg: Path


@dataclass(frozen=True)
class Sample:
    """One image with its caption and class label, ready to be written; the hashes are of the original files."""

    url: str
    class_name: str
    caption: str
    png_sha256: str
    svg_sha256: str
    picture: Picture

    @property
    def uid(self) -> str:
        """The sample's name; as it is a hash, sorting by it shuffles the archive, which is sorted by category."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """The result for a pair: a sample or the reason to skip it, and whether the SVG's XML was broken."""

    sample: Sample | None
    skip: str
    broken_xml: bool


def find_pairs(root: Path) -> list[Pair]:
    """All PNGs which have an SVG under the same relative path; the archive's symbolic links count as files."""
    pairs: list[Pair] = []
    for png in sorted((root / "png").rglob("*.png")):
        relative = png.relative_to(root / "png")
        svg = (root / "svg" / relative).with_suffix(".svg")
        if png.is_file() and svg.is_file():
            pairs.append(Pair(f"openclipart/{relative.as_posix()}", relative.parts[0], png, svg))
    return pairs


def read_pair(pair: Pair) -> Outcome:
    """Makes the sample of a pair."""
    svg = pair.svg.read_bytes()
    caption = read_caption(svg)
    if not caption.text:
        return Outcome(None, "no_text", caption.lenient)
    try:
        picture = make_picture(pair.png)
    except SkippedImageError as error:
        return Outcome(None, str(error), caption.lenient)
    sample = Sample(
        url=pair.url,
        class_name=pair.class_name,
        caption=caption.text,
        png_sha256=hashlib.sha256(pair.png.read_bytes()).hexdigest(),
        svg_sha256=hashlib.sha256(svg).hexdigest(),
        picture=picture,
    )
    return Outcome(sample, "", caption.lenient)
