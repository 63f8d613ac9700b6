"""Speed of writing betons, compared with FFCV's writer and with `cp`, from the same tars.

    python benchmarks/writer.py --tars FOLDER [--samples 100000] [--stock-samples 10000] [--repeats 3] [--workers 2]
                                [--decode-check header]

FOLDER contains tars of photographs (e.g. from benchmarks/photo_tiles.py); their samples are repeated under new keys up
to --samples, 10,000 per tar as in DataComp. The sides take turns, each after a `sync`, with a warm page cache; medians.

    ours       the whole command `preprocess build-labels` with labels already built: reads the tars, checks header and
               end marker of every JPEG (`--decode-check header`, the default; `full` decodes each), hashes, and fsyncs
    nothing    the same command again with nothing left to do: the time that is not writing
    ffcv       ffcv.DatasetWriter with RGBImageField(write_mode="jpg"), which decodes and encodes in worker processes
    cp         `cp` of the tars into a new folder, without sync
    cp+sync    `cp` until the bytes are on the disk, like ours
"""

import argparse
import io
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# A script's folder is searched first, where labels.py would hide the package `labels`.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from labels.manifest import read_manifest

A_TAR, LIMIT = 10_000, 75


def repeat_samples(folder: Path, target: Path, count: int) -> None:
    """Tars of 10,000 samples with the images of those in `folder`, again and again."""
    images = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            images += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    target.mkdir()
    for first in range(0, count, A_TAR):
        with tarfile.open(target / f"{first // A_TAR:08d}.tar", "w", bufsize=1 << 22) as tar:
            for number in range(first, min(first + A_TAR, count)):
                caption = f"a photograph, number {number % 997}".encode()
                for suffix, data in (("jpg", images[number % len(images)]), ("txt", caption), ("json", b"{}")):
                    info = tarfile.TarInfo(f"{number:012d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class TarImages:
    """The first samples of a tar as FFCV wants them: image, label row, index."""

    def __init__(self, path: Path, count: int) -> None:
        with tarfile.open(path) as tar:
            offsets = [(member.offset_data, member.size) for member in tar if member.name.endswith(".jpg")]
        self._path, self._offsets = path, offsets[:count]

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        offset, size = self._offsets[number]
        with open(self._path, "rb") as file:
            file.seek(offset)
            with Image.open(io.BytesIO(file.read(size))) as image:
                return np.asarray(image.convert("RGB")), np.full(LIMIT, -1, np.int32), number


def command(tars: Path, out: Path, workers: int, *more: str) -> list[str]:
    words = ["build-labels", str(tars), "--out", str(out), "--workers", str(workers), *more]
    return [sys.executable, "-m", "preprocess", *words]


def ours(tars: Path, out: Path, workers: int, check: str) -> None:
    """The command up to its exit. Without pipes: they would also wait for its worker server, which exits later."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tars, out, workers, "--decode-check", check), check=True, **quiet)  # type: ignore[call-overload]


def stock(tar: Path, target: Path, count: int, workers: int) -> None:
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", jpeg_quality=95)
    fields = {"image": image, "label_ids": NDArrayField(np.dtype("int32"), (LIMIT,)), "index": IntField()}
    DatasetWriter(str(target), fields, num_workers=workers).from_indexed_dataset(TarImages(tar, count))


def timed(run: Callable[[], object]) -> float:
    """Wall seconds, after everything from earlier turns is on the disk."""
    subprocess.run(["sync"], check=True)
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--stock-samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--decode-check", default="header")
    parser.add_argument("--work", type=Path, help="Folder for all that is written, on the disk to be measured.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work, workers, check = Path(name), arguments.workers, arguments.decode_check
        tars, out, copy = work / "tars", work / "out", work / "copy"
        repeat_samples(arguments.tars, tars, arguments.samples)
        subprocess.run(
            command(tars, out, workers, "--no-beton", "--decode-check", check), check=True, stdout=subprocess.DEVNULL
        )
        seconds: dict[str, list[float]] = {"ours": [], "nothing": [], "ffcv": [], "cp": [], "cp+sync": []}
        for _ in range(arguments.repeats):
            seconds["ours"].append(timed(lambda: ours(tars, out, workers, check)))
            seconds["nothing"].append(timed(lambda: ours(tars, out, workers, check)))
            size = sum(part.bytes for part in read_manifest(out).betons)
            for folder in ("beton", "done/beton"):
                shutil.rmtree(out / folder)
            seconds["ffcv"].append(
                timed(lambda: stock(tars / "00000000.tar", work / "stock.beton", arguments.stock_samples, workers))
            )
            (work / "stock.beton").unlink()
            for side, then in (("cp", []), ("cp+sync", ["sync"])):
                script = " && ".join([f"cp -r {tars} {copy}", *then])
                seconds[side].append(timed(lambda script=script: subprocess.run(script, shell=True, check=True)))
                shutil.rmtree(copy)
        tar_bytes = sum(path.stat().st_size for path in tars.iterdir())
    counts = dict.fromkeys(seconds, arguments.samples) | {"ffcv": arguments.stock_samples}
    print(
        f"{arguments.samples:,} samples, tars {tar_bytes / 1e9:.2f} GB, betons {size / 1e9:.2f} GB, {workers} workers, "
        f"check: {check}"
    )
    rates = {side: counts[side] / statistics.median(values) for side, values in seconds.items()}
    for side, rate in rates.items():
        spread = f"{min(seconds[side]):.2f} to {max(seconds[side]):.2f} s"
        ratio = rates["ours"] / rate
        print(f"  {side:8} {rate:10,.0f} images/s  ({spread} for {counts[side]:,});  ours is {ratio:6.2f} times that")


if __name__ == "__main__":
    main()
