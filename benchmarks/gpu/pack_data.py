"""Data for check.py: small JPEGs as tars and label datasets. Run by pack.sh, in an environment with `preprocess`.

examples/openclipart/make_shards.py's output -> smaller JPEGs -> DATA/clipart/{train,test}/*.tar, DATA/clipart/out
benchmarks/photo_tiles.py, or drawn pictures -> DATA/photos-{256,original}/out

python pack_data.py --out DATA [--clipart demo/data] [--photos WORK | --drawn]
"""

import argparse
import io
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

_BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[0] = str(_BENCHMARKS)  # for photo_tiles; labels.py in that folder would hide the package `labels`
from photo_tiles import KINDS, cut_tiles, fetch_photos, write_tars

sys.path[0] = str(_BENCHMARKS.parent)

import numpy as np
from PIL import Image

from labels.config import load_pipeline
from preprocess.build import build_labels

CLIPART_SIDE, CLIPART_QUALITY = 80, 85
CLIPART_SAMPLES = {"train": 2000, "test": 400}
PHOTOS = {"photos-256": ("256", 288), "photos-original": ("768", 20)}  # name: kind of photo_tiles, number
CAPTIONS = ["a dog on a beach", "red car parked in front of an old house", "mountains at sunset, panorama", "two cups"]
_TILES_IN_TAR = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clipart", type=Path, help="Output of make_shards.py.")
    parser.add_argument("--photos", type=Path, help="Folder for photo_tiles' download (apt-get).")
    parser.add_argument("--drawn", action="store_true", help="Drawn pictures instead of photographs; no download.")
    parser.add_argument("--share", type=float, default=1.0, help="Part of the numbers of pictures.")
    arguments = parser.parse_args()
    for name, (kind_name, count) in PHOTOS.items():
        kind, count = next(kind for kind in KINDS if kind.name == kind_name), max(int(count * arguments.share), 8)
        tiles = drawn(kind.side, count) if arguments.drawn else cut_tiles(fetch_photos(arguments.photos), kind, count)
        write_tars(arguments.out / name / "shards", tiles, CAPTIONS)
        build(arguments.out / name / "shards", arguments.out / name / "out")
        shutil.rmtree(arguments.out / name / "shards")  # the loader reads betons
    if arguments.clipart:
        for part, count in CLIPART_SAMPLES.items():
            samples = read_samples(arguments.clipart / part / "shards", int(count * arguments.share))
            write_samples(arguments.out / "clipart" / part, samples)
        build(arguments.out / "clipart" / "train", arguments.out / "clipart" / "out")


def build(shards: Path, out: Path) -> None:
    build_labels([str(shards)], out, load_pipeline(None, []), betons=True, overwrite=True)


def drawn(side: int, count: int) -> list[bytes]:
    """Smooth pictures with grain, about as large as photographs of that shorter side."""
    tiles = []
    for number in range(count):
        dice = np.random.default_rng(number)
        width, height = ((side * 4 // 3, side), (side, side * 4 // 3), (side, side))[number % 3]
        small = Image.fromarray(dice.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = dice.normal(0, 6, (height, width, 1)).astype(np.int16)
        tiles.append(jpeg(Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)), 90))
    return tiles


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def read_samples(shards: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the first `count` samples, their JPEGs at most CLIPART_SIDE pixels wide and high."""
    seen: set[str] = set()
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if len(seen | {Path(member.name).stem}) > count:
                    return
                seen.add(Path(member.name).stem)
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".jpg"):
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    image.thumbnail((CLIPART_SIDE, CLIPART_SIDE), Image.Resampling.LANCZOS)
                    data = jpeg(image, CLIPART_QUALITY)
                yield member.name, data


def write_samples(folder: Path, samples: Iterator[tuple[str, bytes]]) -> None:
    """Tars of up to 1,000 samples; three members each."""
    folder.mkdir(parents=True, exist_ok=True)
    tar: tarfile.TarFile | None = None
    for number, (name, data) in enumerate(samples):
        if number % (3 * _TILES_IN_TAR) == 0:
            if tar:
                tar.close()
            tar = tarfile.open(folder / f"{number // (3 * _TILES_IN_TAR):08d}.tar", "w")  # noqa: SIM115
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))  # type: ignore[union-attr]
    if tar:
        tar.close()


if __name__ == "__main__":
    main()
