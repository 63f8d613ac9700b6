"""Photographs for loader benchmarks: tiles of Debian's wallpapers, stored as img2dataset does.

    apt-get download plasma-workspace-wallpapers -> WORK/unpacked -> WORK/<name>/shards/<nnnnnnnn>.tar

Nothing is installed. The tiles are cut with a fixed seed, shrunk to half size (256 and 500 pixels), so that they are as
sharp as photographs on the web, and stored with img2dataset's default quality.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PACKAGE = "plasma-workspace-wallpapers"
QUALITY = 95
_ASPECTS = (4 / 3, 3 / 2, 1.0, 3 / 4, 16 / 9, 2 / 3)
_PHOTO_HEIGHTS = (1600, 2000)
_TILES_A_TAR = 1024


class Kind(NamedTuple):
    """Which tiles: the side that is given (shorter or longer) in pixels, and by how much tiles are reduced."""

    name: str
    side: int
    shorter: bool
    reduce: int


KINDS = (Kind("256", 256, True, 2), Kind("500", 500, False, 2), Kind("768", 768, True, 1), Kind("1024", 1024, True, 1))


def fetch_photos(work: Path) -> list[Path]:
    """The photographs of the package, downloaded and unpacked into `work` on the first call."""
    tree = work / "unpacked"
    if not tree.is_dir():
        part = work / "unpacked.part"
        part.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=work, check=True, capture_output=True)
        (package,) = work.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, part], check=True)
        package.unlink()
        part.rename(tree)
    # The drawn wallpapers are PNGs, or larger.
    return sorted(path for path in tree.rglob("*x*.jpg") if min(map(int, path.stem.split("x"))) in _PHOTO_HEIGHTS)


def cut_tiles(photos: list[Path], kind: Kind, count: int, seed: int = 0) -> list[bytes]:
    """`count` JPEGs of a kind, their positions and aspects drawn from `seed`."""
    rng = np.random.default_rng(seed)
    tiles = []
    for number in range(count):
        photo = _open(photos[number % len(photos)])
        aspect = _ASPECTS[rng.integers(len(_ASPECTS))]
        long = kind.side * max(aspect, 1 / aspect) if kind.shorter else kind.side
        short = kind.side if kind.shorter else kind.side / max(aspect, 1 / aspect)
        width, height = (round(long), round(short)) if aspect >= 1 else (round(short), round(long))
        full = (min(width * kind.reduce, photo.width), min(height * kind.reduce, photo.height))
        left, top = (int(rng.integers(room + 1)) for room in (photo.width - full[0], photo.height - full[1]))
        tile = photo.crop((left, top, left + full[0], top + full[1])).resize((width, height), Image.Resampling.BOX)
        buffer = io.BytesIO()
        tile.save(buffer, "JPEG", quality=QUALITY)
        tiles.append(buffer.getvalue())
    return tiles


_opened: dict[Path, Image.Image] = {}


def _open(path: Path) -> Image.Image:
    if path not in _opened:
        _opened[path] = Image.open(path).convert("RGB")
    return _opened[path]


def write_tars(folder: Path, tiles: list[bytes], captions: list[str]) -> None:
    """`tiles` as img2dataset's tars; captions are given out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(tiles), _TILES_A_TAR):
        with tarfile.open(folder / f"{first // _TILES_A_TAR:08d}.tar", "w") as tar:
            for number, tile in enumerate(tiles[first : first + _TILES_A_TAR], first):
                caption, meta = captions[number % len(captions)], {"uid": f"{number:032x}"}
                for suffix, data in (("jpg", tile), ("txt", caption.encode()), ("json", json.dumps(meta).encode())):
                    info = tarfile.TarInfo(f"{number:012d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
