"""Both modes of resampling, compared with PIL's antialiased bicubic of the same crop: photographs, noise, a zone plate.

    python benchmarks/resample.py [--work DIR] [--count 128] [--picture FILE]

Photographs are tiles of Debian's wallpapers (benchmarks/photo_tiles.py), downloaded into DIR on the first call; crops
of 0.08 to 1.0 of the area. Prints the largest difference in 8-bit levels and the share of values that differ. For the
zone plate it prints the aliasing: the standard deviation of rings that the output cannot represent, 0 for an ideal
filter; --picture writes the results in one row: PIL, host, device, and OpenCV's INTER_AREA (as in FFCV), INTER_LINEAR.
"""

import argparse
import io
import sys
from pathlib import Path

# This folder is searched for the first import only: labels.py would hide the package `labels`.
_HERE = str(Path(__file__).resolve().parent)
sys.path = [_HERE, *(entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE)]
from photo_tiles import KINDS, cut_tiles, fetch_photos

sys.path.remove(_HERE)

import cv2
import numpy as np
import torch
from PIL import Image

from train.data.inputs import resample_canvas
from train.data.order import random_crop
from train.data.resize import margin_bytes, resize_crop, vertical_first, work_bytes

SIDE = 224
BICUBIC = Image.Resampling.BICUBIC


def by_pil(pixels: np.ndarray) -> np.ndarray:
    """Two passes in Pillow 13's order, which older versions do not choose by themselves."""
    height, width = pixels.shape[:2]
    between = (width, SIDE) if vertical_first(width, height, SIDE) else (SIDE, height)
    return np.asarray(Image.fromarray(pixels).resize(between, BICUBIC).resize((SIDE, SIDE), BICUBIC), int)


def on_host(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    source = np.append(pixels.ravel(), np.zeros(margin_bytes(3 * width, float(height), SIDE), np.uint8))
    out, work = (
        np.empty(3 * SIDE * SIDE, np.uint8),
        np.empty(work_bytes(height, width, float(width), float(height), SIDE), np.uint8),
    )
    resize_crop(
        source, 3 * width, height, width, 0.0, 0.0, float(width), float(height), False, SIDE, out, 3 * SIDE, work
    )
    return out.reshape(SIDE, SIDE, 3).astype(int)


def on_device(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    boxes = torch.tensor([[0, 0, width, height, 0, 0, width, height, 0]], dtype=torch.float32, device=device)
    first = np.array([vertical_first(width, height, SIDE)])
    found = resample_canvas(torch.from_numpy(pixels[None].copy()).to(device), boxes, first, SIDE)
    return found[0].permute(1, 2, 0).cpu().numpy().astype(int)


def crops(tiles: list[bytes]) -> list[np.ndarray]:
    found = []
    for number, tile in enumerate(tiles):
        image = Image.open(io.BytesIO(tile))
        left, top, width, height = random_crop(*image.size, (0.08, 1.0), (3 / 4, 4 / 3), 0, 0, number)
        found.append(np.asarray(image.crop((left, top, left + width, top + height))))
    return found


def compare(name: str, pictures: list[np.ndarray]) -> None:
    for way, resample in (("host", on_host), ("device", on_device)):
        differences = [np.abs(resample(picture) - by_pil(picture)) for picture in pictures]
        largest = max(int(difference.max()) for difference in differences)
        differing = np.mean([(difference > 0).mean() for difference in differences])
        print(f"{name:<12} {way:<7} {len(pictures)} crops: at most {largest} levels from PIL's bicubic, ", end="")
        print(f"{differing:.4%} of the values differ")


def zone_plate(picture: Path | None) -> None:
    side = 2 * SIDE
    y, x = np.mgrid[:side, :side] - side / 2
    radius = np.hypot(x, y)
    pixels = np.repeat((127.5 + 127.5 * np.cos(np.pi * radius**2 / side))[..., None], 3, 2).astype(np.uint8)
    far = (radius > 190)[::2, ::2]  # the output holds rings up to a radius of 112
    ways = {"PIL": by_pil(pixels), "host": on_host(pixels), "device": on_device(pixels)}
    ways["INTER_AREA"] = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(int)
    ways["INTER_LINEAR"] = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).astype(int)
    print(
        "zone plate, residue of rings that are too fine: "
        + ", ".join(f"{way} {pixels[far].std():.1f}" for way, pixels in ways.items())
    )
    if picture:
        Image.fromarray(np.concatenate(list(ways.values()), axis=1).astype(np.uint8)).save(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("loader-benchmark"))
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    photos, dice = fetch_photos(arguments.work), np.random.default_rng(0)
    for kind in KINDS[:3]:
        compare(f"photos {kind.name}", crops(cut_tiles(photos, kind, arguments.count)))
    shapes = dice.integers(100, 700, (arguments.count, 2)).tolist()
    compare("noise", [dice.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in shapes])
    zone_plate(arguments.picture)


if __name__ == "__main__":
    main()
