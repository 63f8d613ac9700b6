"""CPU time per image of the loader, compared with stock FFCV (same betons), OpenCLIP + webdataset (same tars) and a
bare decode.

    python benchmarks/loader.py [--work DIR] [--cases 256/0.9 256/0.08 500/0.9 768/0.9 1024/0.9] [--repeats 5]
                                [--epochs 8] [--json FILE]

A case is a size of photographs (benchmarks/photo_tiles.py; made in DIR on the first call, with apt-get) and the
smallest share of the area of a random crop. Every system runs in its own process with one decoding thread; they take
turns, with a warm page cache and after compilation. The result is the median CPU time of the whole process, because the
machine may be shared.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# This folder is searched for the first import alone: labels.py would hide the package `labels` (also in the other
# processes).
_HERE = str(Path(__file__).resolve().parent)
sys.path = [_HERE, *(entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE)]
from photo_tiles import KINDS, cut_tiles, fetch_photos, write_tars

sys.path.remove(_HERE)

import numpy as np

SIDE, BATCH = 224, 256
CAPTIONS = [
    "Morning light over the harbour, seen from the old bridge",
    "New arrival: hand-made ceramic cup in autumn colours, dishwasher safe",
    "a dog running through shallow water with its owner",
    "IMG_2041.jpg | Winter holiday 2019, mountain hut & ski lift",
]


def prepare(work: Path, name: str) -> Path:
    """WORK/<name> with shards and a label dataset built from them, made once."""
    from labels.config import load_pipeline
    from preprocess.build import build_labels

    folder, kind = work / name, next(kind for kind in KINDS if kind.name == name)
    if not (folder / "out" / "manifest.json").is_file():
        write_tars(folder / "shards", cut_tiles(fetch_photos(work), kind, 512 if kind.side <= 500 else 256), CAPTIONS)
        build_labels([str(folder / "shards")], folder / "out", load_pipeline(), betons=True, overwrite=False)
    return folder


def ours(folder: Path, scale: float, epochs: int, device: bool) -> Callable[[], int]:
    """One long run of the loader; each turn takes a part of it, so that its memory is used again as in training."""
    from labels.settings import Data
    from train.data.dataset import BetonSet
    from train.data.loader import Loader

    betons = BetonSet(folder / "out")
    settings = Data(crop_scale=[scale, 1.0], prefetch=1)  # the fewest batches that the ring allows
    loader = Loader(
        betons,
        settings,
        image_size=SIDE,
        batch_size=BATCH,
        seed=0,
        first_step=0,
        last_step=1 << 40,
        threads=1,
        device=device,
    )
    batches = iter(loader)

    def run() -> int:
        images = sum(len(batch.images) for batch in islice(batches, epochs * betons.samples // BATCH))
        time.sleep(1)  # until the ring is full again, as it was before
        return images

    return run


def host(folder: Path, scale: float, epochs: int) -> Callable[[], int]:
    return ours(folder, scale, epochs, device=False)


def device(folder: Path, scale: float, epochs: int) -> Callable[[], int]:
    return ours(folder, scale, epochs, device=True)


def stock(folder: Path, scale: float, epochs: int) -> Callable[[], int]:
    """ffcv's own loader on the one beton. Its samples are repeated: starting an epoch is expensive in FFCV."""
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    from labels.manifest import read_manifest

    (path,) = (folder / "out" / "beton").glob("*.beton")
    image = RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=(scale, 1.0))
    pipelines = {"image": [image], "label_ids": [NDArrayDecoder()], "index": [IntDecoder()]}
    loader = Loader(
        str(path),
        batch_size=BATCH,
        num_workers=1,
        os_cache=True,
        order=OrderOption.RANDOM,
        pipelines=pipelines,
        indices=np.tile(np.arange(read_manifest(folder / "out").samples), epochs),
    )
    return lambda: sum(len(images) for images, _, _ in loader)


def open_clip(folder: Path, scale: float, epochs: int) -> Callable[[], int]:
    """webdataset, PIL, open_clip's own transform and tokenizer."""
    import torch
    import webdataset
    from open_clip import SimpleTokenizer
    from open_clip.transform import AugmentationCfg, image_transform

    torch.set_num_threads(1)
    transform = image_transform(SIDE, is_train=True, aug_cfg=AugmentationCfg(scale=(scale, 1.0)))
    tokenizer = SimpleTokenizer()
    tars = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode("pilrgb").rename(image="jpg", text="txt")
    batches = (
        samples.map_dict(image=transform, text=lambda text: tokenizer(text)[0]).to_tuple("image", "text").batched(BATCH)
    )
    return lambda: sum(len(images) for images, _ in batches)


def bare(folder: Path, scale: float, epochs: int) -> Callable[[], int]:
    """libjpeg-turbo alone, called in a compiled loop: every image whole, at full size."""
    from labels.native import RGB, Decompressor, njit, tj_decompress

    jpegs = [np.frombuffer(data, np.uint8) for data in jpegs_of(folder)]
    sizes = np.array([size_of(data) for data in jpegs])
    addresses, lengths = (
        np.array([value(data) for data in jpegs], np.uint64) for value in (lambda data: data.ctypes.data, len)
    )
    decompressor, pixels = Decompressor(), np.empty(int(sizes.prod(1).max()) * 3, np.uint8)

    @njit
    def decode(addresses, lengths, sizes, handle, pixels):  # noqa: ANN202
        for row in range(len(addresses)):
            width, height = sizes[row]
            tj_decompress(
                handle, addresses[row], lengths[row], np.uint64(pixels.ctypes.data), width, 3 * width, height, RGB, 0
            )
        return len(addresses)

    def run() -> int:
        for _ in range(epochs):
            decode(addresses, lengths, sizes, decompressor.handle, pixels)
        return epochs * len(jpegs)  # `jpegs` holds the memory of `addresses`

    return run


def jpegs_of(folder: Path) -> list[bytes]:
    import webdataset

    tars = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    return [sample["jpg"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]


def size_of(jpeg: np.ndarray) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg.tobytes())).size


SYSTEMS = {
    "this, host": host,
    "this, device": device,
    "stock FFCV": stock,
    "OpenCLIP + webdataset": open_clip,
    "bare decode": bare,
}


def serve(system: str, folder: Path, scale: float, epochs: int, pipe: Connection) -> None:
    """A process that measures on request and returns microseconds of CPU time per image."""
    run = SYSTEMS[system](folder, scale, epochs)
    run()
    pipe.send(0.0)
    while pipe.recv():
        start = time.process_time()
        images = run()
        pipe.send(1e6 * (time.process_time() - start) / images)


def measure(folder: Path, scale: float, repeats: int, epochs: int) -> dict[str, list[float]]:
    context, ends, times = multiprocessing.get_context("spawn"), {}, {name: [] for name in SYSTEMS}
    for name in SYSTEMS:
        ends[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, folder, scale, epochs, theirs), daemon=True).start()
        ends[name].recv()  # wait until it has compiled and run once
    for _ in range(repeats):
        for name, end in ends.items():
            end.send(True)
            times[name].append(end.recv())
    for end in ends.values():
        end.send(False)
    return times


def likeness(folder: Path, scale: float, count: int = 128) -> dict[str, float]:
    """Mean PSNR in dB against PIL's bicubic of the same crop: of this loader's host mode and of FFCV's resize
    (INTER_AREA).
    """
    import cv2
    from PIL import Image

    from train.data.order import random_crop
    from train.data.resize import margin_bytes, resize_crop, work_bytes

    psnr: dict[str, list[float]] = {"this, host": [], "stock FFCV": []}
    for number, jpeg in enumerate(jpegs_of(folder)[:count]):
        image = Image.open(io.BytesIO(jpeg))
        left, top, width, height = random_crop(*image.size, (scale, 1.0), (3 / 4, 4 / 3), 0, 0, number)
        crop = image.crop((left, top, left + width, top + height))
        expected, pixels = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC), float), np.asarray(crop)
        source = np.append(pixels.ravel(), np.zeros(margin_bytes(3 * width, float(height), SIDE), np.uint8))
        out, work = (
            np.empty((SIDE, SIDE, 3), np.uint8),
            np.empty(work_bytes(height, width, float(width), float(height), SIDE), np.uint8),
        )
        box = (0.0, 0.0, float(width), float(height), False)
        resize_crop(source, 3 * width, height, width, *box, SIDE, out.reshape(-1), 3 * SIDE, work)
        for name, result in (
            ("this, host", out),
            ("stock FFCV", cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)),
        ):
            psnr[name].append(10 * np.log10(255**2 / max(float(np.mean((result - expected) ** 2)), 1e-6)))
    return {name: statistics.mean(values) for name, values in psnr.items()}


def label_cost(folder: Path) -> float:
    """Microseconds per sample to look it up in the tables and copy its label row."""
    from labels.native import njit
    from train.data.dataset import BetonSet
    from train.data.image_index import TABLE_BYTES, copy_labels, find_sample

    betons = BetonSet(folder / "out")
    labels, scratch, limit = (
        np.empty((betons.samples, betons.label_limit), np.int32),
        np.zeros(1 << 20, np.uint8),
        betons.label_limit,
    )

    @njit
    def labels_alone(tables, samples, limit, vocabulary, scratch, labels):  # noqa: ANN202
        for sample in samples:
            span = find_sample(tables, sample, limit, scratch)
            copy_labels(scratch, TABLE_BYTES + span.status, vocabulary, labels[sample])

    samples, times = np.arange(betons.samples), []
    with betons.held(samples):
        for _ in range(20):
            start = time.process_time()
            labels_alone(betons.tables, samples, limit, betons.vocabulary, scratch, labels)
            times.append(1e6 * (time.process_time() - start) / len(samples))
    return min(times)


def python_calls(folder: Path) -> dict[int, float]:
    """Calls of Python functions per batch, in all threads, for batches of 32 and 256: growth is Python per sample."""
    import threading

    from labels.settings import Data
    from train.data.dataset import BetonSet
    from train.data.loader import Loader

    betons, calls_of = BetonSet(folder / "out"), {}
    for batch in (32, 32, 256):
        calls = [0]

        def count(frame: Any, event: str, argument: Any, calls: list[int] = calls) -> None:
            calls[0] += event == "call"

        loader = Loader(
            betons, Data(), image_size=SIDE, batch_size=batch, seed=0, first_step=0, last_step=12, threads=1
        )
        threading.setprofile(count)
        sys.setprofile(count)
        steps = sum(1 for _ in loader)
        sys.setprofile(None)
        threading.setprofile(None)
        calls_of[batch] = calls[0] / steps
    return calls_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("loader-benchmark"))
    parser.add_argument("--cases", nargs="+", default=["256/0.9", "256/0.08", "500/0.9", "768/0.9", "1024/0.9"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--epochs", type=int, default=8, help="In one turn, so that memory is used again as in training."
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for case in arguments.cases:
        name, share = case.split("/")
        folder = prepare(arguments.work, name)
        times = measure(folder, float(share), arguments.repeats, arguments.epochs)
        medians = {system: statistics.median(values) for system, values in times.items()}
        print(f"\nphotographs {name}, crops of {share} to 1.0 of the area, {SIDE} pixels; us of CPU an image")
        for system, median in medians.items():
            ratios = ", ".join(
                f"{median / medians[other]:.2f} of {other}"
                for other in ("stock FFCV", "OpenCLIP + webdataset", "bare decode")
            )
            print(f"{system:<22} {median:7,.0f} ({min(times[system]):,.0f} to {max(times[system]):,.0f}): {ratios}")
        psnr = likeness(folder, float(share))
        print(
            "PSNR against PIL's bicubic of the same crop: "
            + ", ".join(f"{system} {value:.1f} dB" for system, value in psnr.items())
        )
        results[case] = {"microseconds": times, "psnr_db": psnr}
    folder = prepare(arguments.work, arguments.cases[0].split("/")[0])
    results["label_microseconds"], results["python_calls_a_batch"] = label_cost(folder), python_calls(folder)
    print(f"\nlabels and index: {results['label_microseconds']:.2f} us a sample")
    print(f"Python calls a batch: {results['python_calls_a_batch']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
