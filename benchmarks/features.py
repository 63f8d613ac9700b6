"""Speed of feature extraction, compared with the training loader and the trunk's forward pass.

Run: python benchmarks/features.py              both trunks
     python benchmarks/features.py demo --rounds 9

Input: JPEGs of 256 x 256 pixels, made in code: labelled shards for the extraction, and betons built from them for the
loader. Four measurements take turns, each on all cores (and the GPU, if there is one), from the page cache; medians:
  loader      train/data/loader.py with host resampling; batches are discarded
  decoding    the decoding part of extraction (train/evals/features.py: the central crop); batches are discarded
  trunk       the forward pass, repeated on one batch in the device's memory
  extraction  train/evals/features.py, from image locations to the feature array
Upper limit: on a GPU the slower of loader and trunk; on a CPU, where both share the cores,
1 / (1 / loader + 1 / trunk).
"""

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

# A script's folder is searched first, where labels.py would hide the package `labels`.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
from PIL import Image

from labels.config import load_pipeline
from labels.settings import Data, Features, Model
from train.encoders.encoder import Encoder, EncoderSpec, ImageForm, finish
from train.evals.data.sets import DataSet, load_data
from train.evals.features import Extractor, decode, decoded_batches
from train.evals.measure import on_device
from train.model import build_trunk

SIDE, BATCH, IMAGES = 256, 64, {"train": 512, "test": 32}
TRUNKS = {
    "demo": Model(
        trunk="vit_tiny_patch16_224",
        trunk_args={"patch_size": 8, "depth": 4, "embed_dim": 192, "num_heads": 3},
        image_size=64,
    ),
    "vit-ti16": Model(trunk="vit_tiny_patch16_224", image_size=224),
}
FORM = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def write_shards(folder: Path) -> None:
    """Smooth shapes with grain, JPEGs about as large as photos of that size, in two classes, with captions."""
    for part, count in IMAGES.items():
        (folder / part).mkdir(parents=True)
        with tarfile.open(folder / part / "00000000.tar", "w") as tar:
            for number in range(count):
                dice = np.random.default_rng([len(part), number])
                smooth = Image.fromarray(dice.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
                    (SIDE, SIDE), Image.Resampling.BICUBIC
                )
                grain = np.asarray(smooth, np.int16) + dice.normal(0, 6, (SIDE, SIDE, 1)).astype(np.int16)
                jpeg = io.BytesIO()
                Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
                words = json.dumps({"class": f"c{number % 2}"}).encode()
                for suffix, data in (("jpg", jpeg.getvalue()), ("txt", b"a picture of shapes"), ("json", words)):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def loader_side(out: Path, model: Model, threads: int) -> Callable[[], int]:
    """One long run of the loader; each turn takes a part of it."""
    from train.data.dataset import BetonSet
    from train.data.loader import Loader

    betons = BetonSet(out)
    loader = Loader(
        betons,
        Data(prefetch=1),
        image_size=model.image_size,
        batch_size=BATCH,
        seed=0,
        first_step=0,
        last_step=1 << 40,
        threads=threads,
        device=False,
    )
    batches = iter(loader)

    return lambda: sum(len(batch.images) for batch in islice(batches, 8 * IMAGES["train"] // BATCH))


def sides(folder: Path, model: Model) -> dict[str, Callable[[], int]]:
    """The four measurements; each call returns its number of images."""
    threads = len(os.sched_getaffinity(0))
    data: DataSet = load_data(f"shards:{folder / 'shards'}")
    extract: Extractor = on_device(Features(batch_size=BATCH), None)
    encoder: Encoder = finish(EncoderSpec("trunk"), build_trunk(model), ImageForm(model.image_size, *FORM), {})
    net = encoder.net.to(extract.device)
    images = torch.randn(BATCH, 3, model.image_size, model.image_size, device=extract.device)
    encoded, count = data.train.encoded, len(data.train)

    def decoding() -> int:
        batches = (np.arange(start, min(start + BATCH, count)) for start in range(0, count, BATCH))
        picture = lambda row: decode(encoded[row].read(), model.image_size)  # noqa: E731
        return sum(
            len(batch.images) for batch in decoded_batches(batches, model.image_size, picture, threads, extract.device)
        )

    def trunk() -> int:
        with (
            torch.inference_mode(),
            torch.autocast(extract.device.type, torch.bfloat16, enabled=extract.precision == "bf16"),
        ):
            for _ in range(count // BATCH):
                features = net(images)
        float(features.sum())  # waits for the device
        return count // BATCH * BATCH

    return {
        "loader": loader_side(folder / "out", model, threads),
        "decoding": decoding,
        "trunk": trunk,
        "extraction": lambda: len(extract(encoder, data.train)),
    }


def compare(folder: Path, name: str, rounds: int) -> None:
    """Take turns and print the medians."""
    made, rates = sides(folder, TRUNKS[name]), dict[str, list[float]]()
    for turn in range(rounds + 1):
        for side, run in made.items():
            time.sleep(0.5)  # until the prefetched batches are complete, and the cores are idle
            start = time.perf_counter()
            images = run()
            if turn:
                rates.setdefault(side, []).append(images / (time.perf_counter() - start))
    medians = {side: statistics.median(values) for side, values in rates.items()}
    shared = not torch.cuda.is_available()
    best = 1 / (1 / medians["loader"] + 1 / medians["trunk"]) if shared else min(medians["loader"], medians["trunk"])
    print(f"{name}: {TRUNKS[name].trunk}, {TRUNKS[name].image_size} pixels, {rounds} rounds, images/s", flush=True)
    for side, rate in medians.items():
        print(f"  {side:<11}{rate:10.1f}   {min(rates[side]):10.1f} to {max(rates[side]):.1f}")
    print(f"  at best    {best:10.1f}   {'both share the cores' if shared else 'the slower of loader and trunk'}")
    print(f"  extraction / best {medians['extraction'] / best:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunks", nargs="*", choices=[*TRUNKS, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_shards(folder / "shards")
        from preprocess.build import build_labels

        build_labels([str(folder / "shards" / "train")], folder / "out", load_pipeline(), betons=True, overwrite=False)
        for name in arguments.trunks or TRUNKS:
            compare(folder, name, arguments.rounds)


if __name__ == "__main__":
    main()
