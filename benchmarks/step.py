"""Overhead of the trainer: the loop against bare steps, and CPU work outside the model against the paper's pipeline.

Run: python benchmarks/step.py loop     samples/s with preloaded batches, against forward, backward and optimizer step
     python benchmarks/step.py cpu      CPU microseconds per sample, with images of 256 pixels and batches of 128

`loop`: both sides use the same ViT (4 layers, width 192, patch 8 at 64 pixels), a head of 49,408 classes, batch 64,
fp32.
`cpu`: the loop with loader and normalisation around a model with one parameter, so that nearly all time is outside
model and optimizer; the paper's pipeline is rebuilt from public libraries (webdataset, PIL, torchvision's
RandomResizedCrop, open_clip's tokenizer, default collation; without its dense targets). Both read the same 1,024 JPEGs
of 256 x 256 pixels, made in code, from the page cache, on one thread. CPU time is that of the process. The sides take
turns; medians.
"""

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A script's folder is searched first, where labels.py would hide the package `labels`.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
from PIL import Image

from labels.config import load_pipeline
from labels.settings import Train
from train.data.inputs import synthetic_batches, synthetic_inputs
from train.distributed import World
from train.loop import Budget, TrainState, run_loop
from train.metrics import Metrics, Speed
from train.optim import make_optimizer
from train.trainer import make_train_state

ALONE = World(0, 1, torch.device("cpu"))
PAPER_US = 4392  # what the paper's pipeline needed in this measure, on another machine
PAPERS = "the paper's pipeline"
IMAGES, SIDE, BATCH, CAPTION_WORDS = 1024, 256, 128, 12
EPOCHS = 4  # of a turn of ours, so that its memory is used again, as in a run


def looped(
    train_state: TrainState, settings: Train, batches: Iterator[Any], inputs: Callable[[Any], Any], steps: int
) -> None:
    """`steps` steps of the one loop, metrics and all, without checkpoints."""
    with tempfile.TemporaryDirectory() as run:
        metrics = Metrics(
            Path(run), ALONE, settings, steps=steps, first_step=0, skipped=(0, 0), speed=Speed(1, None), trackers=[]
        )
        budget = Budget(steps, 1, 0)
        run_loop(
            batches, inputs, train_state, settings, budget, ALONE, metrics, save=lambda _: None, stopping=lambda: False
        )
        metrics.close()


def compare_loop(rounds: int, steps: int) -> None:
    arguments = "{patch_size: 8, depth: 4, embed_dim: 192, num_heads: 3}"
    trunk = f"{{trunk: vit_tiny_patch16_224, trunk_args: {arguments}, image_size: 64}}"
    keys = [f"train.model={trunk}", "train.batch_size=64", "train.samples=1M", "train.log.every_seconds=10"]
    settings = load_pipeline(None, [*keys, "train.runtime.precision=fp32"]).train
    train_state = make_train_state(settings, torch.ones(49_408), ALONE)
    batch = next(synthetic_batches(settings, 49_408, 75, ALONE, 1))

    def bare() -> None:
        for _ in range(steps):
            train_state.optimizer.zero_grad(set_to_none=True)
            train_state.model(batch.images, batch.label_ids).backward()
            train_state.optimizer.step()

    def ours() -> None:
        looped(train_state, settings, iter([batch] * steps), synthetic_inputs, steps)
        train_state.optimizer.found_inf = train_state.optimizer.grad_scale = None  # type: ignore[attr-defined]

    times: dict[str, list[float]] = {"bare": [], "loop": []}
    for turn in range(rounds + 1):
        for name, side in (("bare", bare), ("loop", ours)):
            start = time.perf_counter()
            side()
            if turn:
                times[name].append(time.perf_counter() - start)
    rates = {name: 64 * steps / statistics.median(values) for name, values in times.items()}
    print(f"bare step  {rates['bare']:8.1f} samples/s")
    print(f"the loop   {rates['loop']:8.1f} samples/s, {rates['loop'] / rates['bare']:.3f} of it")
    print(
        "by round   " + ", ".join(f"{one / other:.3f}" for one, other in zip(times["bare"], times["loop"], strict=True))
    )


def write_tar(folder: Path) -> Path:
    """Pictures of smooth shapes with some grain, about as large as photos of that size."""
    words = [
        f"{first}{second}"
        for first in ("red", "old", "new", "sun", "blue")
        for second in ("house", "dog", "tree", "car", "boat", "man")
    ]
    with tarfile.open(folder / "00000000.tar", "w") as tar:
        for number in range(IMAGES):
            dice = np.random.default_rng(number)
            smooth = Image.fromarray(dice.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            grain = np.asarray(smooth, np.int16) + dice.normal(0, 6, (SIDE, SIDE, 1)).astype(np.int16)
            jpeg = io.BytesIO()
            Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
            caption = " ".join(dice.choice(words, CAPTION_WORDS)).encode()
            for suffix, data in (("jpg", jpeg.getvalue()), ("txt", caption)):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "00000000.tar"


class OneNumber(torch.nn.Module):
    """A model that costs nothing: the work of loop, loader and input remains."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.scale * images[0, 0, 0, 0]).square().sum()


def our_side(tar: Path, folder: Path) -> Callable[[], None]:
    from preprocess.build import build_labels
    from train.data.dataset import BetonSet
    from train.data.inputs import ImageInput
    from train.data.loader import Loader

    build_labels(
        [str(tar.parent)], folder / "out", load_pipeline(None, ["build.workers=1"]), betons=True, overwrite=False
    )
    keys = [
        f"train.batch_size={BATCH}",
        "train.optimizer.warmup_samples=0",
        "train.runtime.precision=fp32",
        "train.data.prefetch=100MiB",
    ]
    settings, betons = load_pipeline(None, keys).train, BetonSet(folder / "out")
    model = OneNumber()
    train_state = TrainState(model, model, make_optimizer(model, settings.optimizer))
    steps, size = EPOCHS * IMAGES // BATCH, settings.model.image_size
    inputs = ImageInput(settings.data, ALONE.device, image_size=size, seed=0)

    def run() -> None:
        with Loader(
            betons, settings.data, image_size=size, batch_size=BATCH, seed=0, first_step=0, last_step=steps, threads=1
        ) as loader:
            looped(train_state, settings, iter(loader), inputs, steps)

    return run


def papers_side(tar: Path) -> Callable[[], None]:
    import open_clip
    import webdataset
    from torchvision import transforms

    convert = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    def run() -> None:
        samples = webdataset.WebDataset(str(tar), shardshuffle=False).decode("pilrgb").to_tuple("jpg", "txt")
        pairs = samples.map_tuple(convert, lambda text: tokenize(text)[0]).batched(BATCH, partial=False)
        assert sum(len(images) for images, _ in pairs) == IMAGES

    return run


def compare_cpu(rounds: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        tar = write_tar(folder / "shards")
        sides = {"this trainer": (our_side(tar, folder), EPOCHS), PAPERS: (papers_side(tar), 1)}
        kib = os.path.getsize(tar) / IMAGES / 1024
        print(f"{IMAGES} JPEGs of {SIDE} x {SIDE} pixels, {kib:.1f} KiB a sample in the tar")
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            for name, (side, epochs) in sides.items():
                start = time.process_time()
                side()
                if turn:
                    times[name].append(1e6 * (time.process_time() - start) / IMAGES / epochs)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:<21} {median:7,.0f} us of CPU a sample ({min(times[name]):,.0f} to {max(times[name]):,.0f})")
    ours = medians["this trainer"]
    print(f"ratio {ours / medians[PAPERS]:.3f}; {ours / PAPER_US:.3f} of the {PAPER_US:,} us measured elsewhere")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["loop", "cpu"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each round of `loop`")
    arguments = parser.parse_args()
    if arguments.measure == "loop":
        compare_loop(arguments.rounds, arguments.steps)
    else:
        compare_cpu(arguments.rounds)


if __name__ == "__main__":
    main()
