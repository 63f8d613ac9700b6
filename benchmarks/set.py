"""Large data sets, many small betons, images in tars, and how well samples are mixed.

    python benchmarks/set.py [--work DIR] [--repeats 5] [--parts open order small mixing]

    open     10 million samples in 100 sparse betons (opening does not read pages): seconds and memory, in a new process
    order    1.28 billion samples: seconds until the first batch, and memory, in a new process
    small    images/s of one beton, of the same samples in 16 betons, and in their tars (`--no-images`), in turns,
             with a warm page cache; pixels and labels are compared
    mixing   batches of 1,024 from a million samples in 100 shards, compared with a true shuffle: shards per batch, most
             samples of one shard, correlation of sample and position, mean distance of two neighbours as a share of the
             set (a third if they are independent)

Photographs (benchmarks/photo_tiles.py) and label datasets are made in DIR on the first call.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

# This folder is searched for the first import only: labels.py would hide the package `labels`.
_HERE = str(Path(__file__).resolve().parent)
sys.path = [_HERE, *(entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE)]
from photo_tiles import KINDS, cut_tiles, fetch_photos, write_tars

sys.path.remove(_HERE)

import numpy as np
import torch

from labels import beton
from labels.manifest import read_manifest, write_manifest
from labels.settings import Data
from labels.storage import Layout
from train.data.dataset import BetonSet
from train.data.loader import Loader
from train.data.open import make_rows
from train.data.order import Order

BETONS, SAMPLES_EACH = 100, 100_000
SIDE, BATCH, STEPS, IMAGES = 224, 128, 16, 512
_MEASURED = """
import time
{imports}

def peak():  # of this program alone: getrusage also counts what the process was before it became this program
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

memory, begun = peak(), time.perf_counter()
{work}
seconds = time.perf_counter() - begun
print(f"{{seconds:.2f}} s, {{peak() - memory:.0f}} MiB beyond the {{memory:.0f}} of the imports")
"""


def prepare(work: Path) -> dict[str, Path]:
    """The same photographs as one beton, as 16, and as an image index of their tars."""
    shards, outs = work / "set" / "shards", {name: work / "set" / name for name in ("one", "sixteen", "tars")}
    if not shards.is_dir():
        write_tars(
            shards,
            cut_tiles(fetch_photos(work), KINDS[0], IMAGES),
            ["a photograph of a place", "hills at dusk, seen from afar"],
        )
    more = {"one": [], "sixteen": ["--set", f"build.beton_samples={IMAGES // 16}"], "tars": ["--no-images"]}
    for name, out in outs.items():
        if not (out / "manifest.json").is_file():
            words = ["build-labels", str(shards), "--out", str(out), "--workers", "1", *more[name]]
            subprocess.run([sys.executable, "-m", "preprocess", *words], check=True, capture_output=True)
    list(make_rows(outs["tars"], outs["tars"]))
    return outs


def large_set(out: Path, target: Path) -> Path:
    """A label dataset of 10 million samples: manifest and beton headers only."""
    manifest, layout = read_manifest(out), Layout(target)
    layout.betons.mkdir(parents=True, exist_ok=True)
    layout.idf_parquet.write_bytes(Layout(out).idf_parquet.read_bytes())
    head, fields = np.zeros(1, beton.HEADER), beton.field_descriptors(manifest.label_limit)
    table = SAMPLES_EACH * 25_000
    size = table + 2 * SAMPLES_EACH * beton.ALLOCATION.itemsize
    head[0] = (beton.VERSION, len(beton.FIELD_NAMES), beton.MIN_PAGE_BYTES, SAMPLES_EACH, table)
    parts = []
    for number in range(BETONS):
        with open(layout.beton_file(number), "wb") as file:
            file.write(head.tobytes() + fields.tobytes())
            file.truncate(size)
        parts.append(manifest.betons[0].model_copy(update={"number": number, "samples": SAMPLES_EACH, "bytes": size}))
    shards = [manifest.shards[0].model_copy(update={"rows": BETONS * SAMPLES_EACH})]
    samples = BETONS * SAMPLES_EACH
    write_manifest(
        layout, manifest.model_copy(update={"betons": parts, "shards": shards, "samples": samples, "captions": samples})
    )
    return target


def in_new_process(imports: str, work: str) -> str:
    program = _MEASURED.format(imports=imports, work=work)
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def compare_rates(outs: dict[str, Path], repeats: int) -> None:
    sets = {name: BetonSet(out) for name, out in outs.items()}
    rates: dict[str, list[float]] = {name: [] for name in sets}
    for turn in range(repeats + 1):
        first: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, betons in sets.items():
            loader = Loader(
                betons, Data(), image_size=SIDE, batch_size=BATCH, seed=0, first_step=0, last_step=STEPS, threads=2
            )
            begun = time.perf_counter()
            for batch in loader:
                first.setdefault(name, (batch.images.clone(), batch.label_ids.clone()))
            if turn:
                rates[name].append(BATCH * STEPS / (time.perf_counter() - begun))
        assert all(torch.equal(*pair) for name in sets for pair in zip(first[name], first["one"], strict=True))
    one = statistics.median(rates["one"])
    for name, values in rates.items():
        ratios = ", ".join(f"{mine / its:.3f}" for mine, its in zip(values, rates["one"], strict=True))
        middle = statistics.median(values)
        print(f"{name:<9} {len(sets[name].parts)} files: {middle:,.0f} images/s, {middle / one:.3f} ({ratios})")


def compare_mixing() -> None:
    samples, shard, batch = 1_000_000, 10_000, 1024
    orders = {
        f"blocks of {block}": Order([samples], (1,), block, 1024, 0).take(0, samples)[0] for block in (1, 16, 64, 256)
    }
    orders["true shuffle"] = np.random.default_rng(0).permutation(samples)
    for name, order in orders.items():
        batches = order[: samples // batch * batch].reshape(-1, batch) // shard
        counts = np.stack([np.bincount(shards, minlength=samples // shard) for shards in batches])
        correlation = np.corrcoef(order, np.arange(samples))[0, 1]
        distance = np.abs(np.diff(order)).mean() / samples
        mean_shards, mean_most = (counts > 0).sum(1).mean(), counts.max(1).mean()
        print(
            f"{name:<14} {mean_shards:6.2f} of 100 shards in a batch, {mean_most:5.1f} samples of one at most, "
            f"correlation {correlation:+.4f}, distance {distance:.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("loader-benchmark"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["open", "order", "small", "mixing"])
    arguments = parser.parse_args()
    outs = prepare(arguments.work)
    if "open" in arguments.parts:
        large = large_set(outs["one"], arguments.work / "set" / "large")
        imports = "from pathlib import Path\nfrom train.data.dataset import BetonSet"
        work = f"betons = BetonSet(Path({str(large)!r}))\nassert betons.samples == {BETONS * SAMPLES_EACH}"
        print("open    ", in_new_process(imports, work))
    if "order" in arguments.parts:
        work = "Order([1_280_000_000], (1,), 64, 1024, 0).batch(1_000, 16_384, 3, 8)"
        print("order   ", in_new_process("from train.data.order import Order", work))
    if "small" in arguments.parts:
        compare_rates(outs, arguments.repeats)
    if "mixing" in arguments.parts:
        compare_mixing()


if __name__ == "__main__":
    main()
