"""CPU time per image of the loader, beside a stock ffcv.Loader on the same beton with the same crops asked for.

Run: python benchmarks/loader.py --beton OUT [--image-size 224] [--scale 0.9 1.0] [--repeats 5]

Each side reads the same beton of OUT (the largest), one decoding thread, page cache warm, compiled before the clock starts; the
sides take turns, the median counts. CPU time is the process's (all threads), not the wall clock's: the machine may be shared.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# A script's folder is searched first, where labels.py would hide the package `labels`.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from labels.settings import Data
from train.betons import BetonSet
from train.loader import Loader

BATCH = 64


def ours(betons: BetonSet, size: int, scale: list[float], images: int) -> Callable[[], int]:
    """A function that loads `images` images once and returns how many it loaded."""

    def run() -> int:
        settings = Data(crop_scale=scale)
        steps = images // BATCH
        with Loader(betons, settings, image_size=size, batch_size=BATCH, seed=0, first_step=0, last_step=steps, threads=1) as loader:
            return sum(len(batch.images) for batch in loader)

    return run


def stock(path: Path, size: int, scale: list[float]) -> Callable[[], int]:
    """The same with ffcv's own loader, which is compiled here, once."""
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as StockLoader
    from ffcv.loader import OrderOption

    image = RandomResizedCropRGBImageDecoder((size, size), scale=tuple(scale))
    pipelines = {"image": [image], "label_ids": [NDArrayDecoder()], "index": [IntDecoder()]}
    loader = StockLoader(str(path), batch_size=BATCH, num_workers=1, os_cache=True, order=OrderOption.RANDOM, pipelines=pipelines)
    return lambda: sum(len(images) for images, _, _ in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beton", type=Path, required=True, help="OUT of build-labels")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--scale", type=float, nargs=2, default=[0.9, 1.0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    betons = BetonSet(arguments.beton)
    part = max(betons.manifest.betons, key=lambda part: part.samples)
    path = arguments.beton / "beton" / f"{part.number:05d}.beton"
    sides = {
        "this loader": ours(betons, arguments.image_size, arguments.scale, part.samples),
        "stock ffcv.Loader": stock(path, arguments.image_size, arguments.scale),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):
        for name, run in sides.items():
            start = time.process_time()
            images = run()
            if repeat:  # the first round warms up
                times[name].append(1e6 * (time.process_time() - start) / images)
    base = statistics.median(times["stock ffcv.Loader"])
    for name, values in times.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(
            f"{name:<18} {statistics.median(values):8,.0f} us of CPU an image ({spread}), {statistics.median(values) / base:.2f} of stock"
        )


if __name__ == "__main__":
    main()
