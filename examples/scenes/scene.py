"""What is in a scene, and its picture.

    random generator -> Scene: one or two Groups of equal objects, their relation, a background
    Scene + Sprites (drawings.json) -> draw -> JPEG

A group is `count` drawings of one category in one colour. Two groups stand left and right of each other, or above and
below. The first group is the larger one: its category and colour are the sample's classes.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 96  # pixels of a side
JPEG_QUALITY = 88
SPRITE_SIZE = 128  # longest side of a drawing in memory
MAX_OBJECTS = 4
MAX_ANGLE = 0.35  # 20 degrees
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (248, 222, 40),
    "green": (44, 160, 60),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (250, 140, 190),
    "brown": (125, 78, 45),
    "black": (42, 42, 46),
    "white": (245, 245, 245),
}
CATEGORIES: dict[str, list[str]] = json.loads((Path(__file__).parent / "drawings.json").read_text("utf8"))
_NAMES, _COLOUR_NAMES = tuple(CATEGORIES), tuple(COLOURS)
_BACKGROUND_DISTANCE = 90  # of red, green and blue, between the background and each object
_NOISE_FIELDS = 64


@dataclass(frozen=True)
class Group:
    """Equal objects."""

    category: str
    colour: str
    count: int


@dataclass(frozen=True)
class Scene:
    """One or two groups; `relation`: where the first stands, as seen from the second, or "" for one group."""

    groups: tuple[Group, ...]
    relation: str

    @property
    def count(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def words(self) -> str:
        """All that the picture shows, in words: the best caption that there can be."""
        said = [f"{group.count} {group.colour} {group.category}" for group in self.groups]
        return f" {self.relation} ".join(said)


def choose_scene(random: np.random.Generator) -> Scene:
    """A scene of one to four objects; two groups have different categories and colours."""
    kinds = 1 + int(random.random() < 0.5)
    counts = random.choice([1, 2, 3], p=[0.6, 0.25, 0.15], size=kinds)
    while counts.sum() > MAX_OBJECTS:
        counts = random.choice([1, 2, 3], size=kinds)
    categories = random.choice(len(_NAMES), size=kinds, replace=False)
    colours = random.choice(len(_COLOUR_NAMES), size=kinds, replace=False)
    groups = tuple(
        Group(_NAMES[category], _COLOUR_NAMES[colour], int(count))
        for category, colour, count in zip(categories, colours, counts, strict=True)
    )
    return Scene(groups, RELATIONS[int(random.integers(4))] if kinds == 2 else "")


class Drawing(NamedTuple):
    """Brightness from 0.2 to 1, which its colour is multiplied by, and opacity; both in mode L."""

    brightness: Image.Image
    alpha: Image.Image


class Sprites:
    """The drawings of all categories, and what backgrounds are made of."""

    def __init__(self, png_folder: Path) -> None:
        self._of = {name: [_load(png_folder / path) for path in paths] for name, paths in CATEGORIES.items()}
        random = np.random.default_rng(0)
        self._fields = [_noise_field(random) for _ in range(_NOISE_FIELDS)]

    def draw(self, scene: Scene, random: np.random.Generator) -> bytes:
        """The scene as a JPEG of SIZE x SIZE pixels."""
        colours = [_jittered(COLOURS[group.colour], random) for group in scene.groups]
        canvas = self._background(colours, random)
        for group, colour, region in zip(scene.groups, colours, _regions(scene, random), strict=True):
            drawings = self._of[group.category]
            sizes = drawings[int(random.integers(len(drawings)))]
            for cell in _cells(region, group.count):
                _paste(canvas, sizes, colour, cell, random)
        with io.BytesIO() as file:
            canvas.save(file, "JPEG", quality=JPEG_QUALITY)
            return file.getvalue()

    def _background(self, colours: list[np.ndarray], random: np.random.Generator) -> Image.Image:
        """A plain colour, a gradient of two, or noise with the spectrum of photographs, away from the objects' own."""
        kind, one, other = int(random.integers(3)), _away_from(colours, random), _away_from(colours, random)
        if kind == 0:
            return Image.new("RGB", (SIZE, SIZE), tuple(one.astype(int).tolist()))
        if kind == 1:
            mixed = np.linspace(one, other, SIZE).astype(np.uint8)[:, None]
            pixels = np.repeat(mixed, SIZE, axis=1)
            return Image.fromarray(pixels if random.random() < 0.5 else pixels.transpose(1, 0, 2).copy())
        palette = np.linspace(one, np.clip(one + random.uniform(-70, 70, 3), 0, 255), 256).astype(np.uint8)
        field = self._fields[int(random.integers(_NOISE_FIELDS))]
        top, left = random.integers(len(field) - SIZE, size=2)
        return Image.fromarray(palette[field[top : top + SIZE, left : left + SIZE]])


def _load(path: Path) -> list[Drawing]:
    """A drawing in several sizes, the largest at most SPRITE_SIZE wide and high, cropped to what is drawn."""
    with Image.open(path) as opened:
        opened.thumbnail((4 * SPRITE_SIZE, 4 * SPRITE_SIZE))
        drawing = opened.convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    drawing.thumbnail((SPRITE_SIZE, SPRITE_SIZE))
    brightness = np.asarray(drawing.convert("L"), np.float32)
    solid = np.asarray(drawing.getchannel("A")) > 128
    low, high = np.percentile(brightness[solid], [2, 98])
    even = np.clip((brightness - low) / max(high - low, 1), 0, 1) * 204 + 51
    full = Image.fromarray(np.where(solid, even, 128).astype(np.uint8)), drawing.getchannel("A")
    return [Drawing(*(band.reduce(factor) for band in full)) for factor in (1, 2, 4)]


def _noise_field(random: np.random.Generator, size: int = 256) -> np.ndarray:
    """Noise whose amplitude falls as 1/f: uint8 [size, size]."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(random.standard_normal((size, size))) / frequency).real
    low, high = np.percentile(field, [1, 99])
    return (np.clip((field - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _jittered(colour: tuple[int, int, int], random: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour) + random.uniform(-18, 18, 3), 0, 255)


def _away_from(colours: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    while True:
        chosen = random.uniform(0, 255, 3)
        if all(np.abs(chosen - colour).sum() > _BACKGROUND_DISTANCE for colour in colours):
            return chosen


Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the picture."""


def _regions(scene: Scene, random: np.random.Generator) -> list[Box]:
    """Where the groups stand; the first has the larger part."""
    if not scene.relation:
        return [(0, 0, 1, 1)]
    share = random.uniform(0.52, 0.62)
    first_comes_first = scene.relation in ("left of", "above")
    border = share if first_comes_first else 1 - share
    if scene.relation in ("left of", "right of"):
        parts: list[Box] = [(0, 0, border, 1), (border, 0, 1, 1)]
    else:
        parts = [(0, 0, 1, border), (0, border, 1, 1)]
    return parts if first_comes_first else parts[::-1]


def _cells(region: Box, count: int) -> list[Box]:
    """Equal parts of a region, along its longer side."""
    left, top, right, bottom = region
    if right - left >= bottom - top:
        width = (right - left) / count
        return [(left + number * width, top, left + (number + 1) * width, bottom) for number in range(count)]
    height = (bottom - top) / count
    return [(left, top + number * height, right, top + (number + 1) * height) for number in range(count)]


def _paste(
    canvas: Image.Image, sizes: list[Drawing], colour: np.ndarray, cell: Box, random: np.random.Generator
) -> None:
    """Paste a drawing in its colour, rotated by up to 20 degrees and scaled into its cell."""
    left, top, right, bottom = (share * SIZE for share in cell)
    angle, fill = random.uniform(-MAX_ANGLE, MAX_ANGLE), random.uniform(0.7, 1.0)
    cosine, sine = np.cos(angle), np.sin(angle)
    width, height = sizes[0].alpha.size
    turned_width, turned_height = width * cosine + height * abs(sine), width * abs(sine) + height * cosine
    scale = fill * min((right - left) / turned_width, (bottom - top) / turned_height)
    drawing = next((one for one in reversed(sizes) if one.alpha.width >= width * scale), sizes[0])
    box = max(int(turned_width * scale), 3), max(int(turned_height * scale), 3)
    # Each pixel of the box is looked up in the drawing: turned around the centre of both.
    step = drawing.alpha.width / (width * scale)
    across, down = step * cosine, step * sine
    x = drawing.alpha.width / 2 - across * box[0] / 2 - down * box[1] / 2
    y = drawing.alpha.height / 2 + down * box[0] / 2 - across * box[1] / 2
    lookup = (across, down, x, -down, across, y)
    brightness, alpha = (
        band.transform(box, Image.Transform.AFFINE, lookup, Image.Resampling.BILINEAR) for band in drawing
    )
    tinted = np.asarray(brightness, np.uint16)[..., None] * colour.astype(np.uint16) // 255
    corner = (
        int(left + (right - left - box[0]) * random.random()),
        int(top + (bottom - top - box[1]) * random.random()),
    )
    canvas.paste(Image.fromarray(tinted.astype(np.uint8)), corner, alpha)
