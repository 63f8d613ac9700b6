"""Makes image-text shards of scenes: public-domain clip arts, recoloured, on backgrounds, with captions that name them.

    openclipart-png (Debian package) -> Sprites                     scene.py
    seed, split, number of the shard -> Scene -> JPEG, caption      scene.py, words.py
    -> OUT/{train,labelled,test}/{00000000.tar,.parquet,_stats.json}

A shard is a function of the seed and its number alone: shards are made in parallel, and a second run makes the missing
ones. `train` has noisy captions; `labelled` and `test` have none, for probes.

Run: python examples/scenes/make_scenes.py --out demo/scenes --noise 0.6
"""

import argparse
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).resolve().parents[1] / "openclipart"))

from clipart_packages import ClipartTree, PackageError, fetch_tree
from scene import SIZE, Sprites, choose_scene
from words import SWAPPED, caption_of, with_noise

VERSION = 1  # raise it with every change of scenes, captions or layout: shards that exist then are outdated
SPLITS = ("train", "labelled", "test")
SHARD = 1_000
_FIELDS = ("key", "uid", "caption", "words", "class", "colour", "count", "relation")
_SCHEMA = pa.schema([(name, pa.string()) for name in _FIELDS] + [("width", pa.int32()), ("height", pa.int32())])


@dataclass(frozen=True)
class Task:
    """One shard."""

    folder: Path
    png: Path
    seed: int
    split: int
    number: int
    samples: int
    noise: float

    @property
    def path(self) -> Path:
        return self.folder / f"{self.number:08d}.tar"

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.number:08d}_stats.json"

    @property
    def options(self) -> dict[str, float]:
        """What the shard's bytes are a function of; written last, into its marker."""
        return {"version": VERSION, "seed": self.seed, "noise": self.noise, "successes": self.samples}

    def is_done(self) -> bool:
        try:
            return json.loads(self.marker.read_text("utf8")) == self.options
        except (OSError, ValueError):
            return False


def samples_of(task: Task, sprites: Sprites) -> Iterator[tuple[dict[str, object], bytes]]:
    """The json and the JPEG of each sample. A scene and its picture are the same for any share of noise."""
    scenes, pictures, captions = (
        np.random.default_rng([task.seed, task.split, task.number, part]) for part in range(3)
    )
    chosen = [choose_scene(scenes) for _ in range(task.samples)]
    texts = [caption_of(scene, captions) for scene in chosen]
    swapped = np.flatnonzero(captions.random(task.samples) < SWAPPED * task.noise)
    for number, other in zip(swapped, np.roll(swapped, 1), strict=True):
        texts[number] = caption_of(chosen[other], captions)
    for index, (scene, text) in enumerate(zip(chosen, texts, strict=True)):
        key = f"{task.number * SHARD + index:012d}"
        fields: dict[str, object] = {
            "key": key,
            "uid": f"{task.split:02x}{task.seed:014x}{int(key):016x}",
            "caption": with_noise(text, task.noise, captions) if task.noise else text,
            "words": scene.words,
            "class": scene.groups[0].category,
            "colour": scene.groups[0].colour,
            "count": str(scene.count),
            "relation": scene.relation or "none",
            "width": SIZE,
            "height": SIZE,
        }
        yield fields, sprites.draw(scene, pictures)


_sprites: Sprites | None = None


def make_shard(task: Task) -> int:
    """Writes one shard, its marker last; returns the number of samples."""
    global _sprites
    _sprites = _sprites or Sprites(task.png)
    rows = []
    part = task.path.with_suffix(".part")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for fields, jpeg in samples_of(task, _sprites):
            rows.append(fields)
            text, described = str(fields["caption"]).encode(), json.dumps(fields, ensure_ascii=False).encode()
            for ending, data in (("jpg", jpeg), ("txt", text), ("json", described)):
                member = tarfile.TarInfo(f"{fields['key']}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    part.replace(task.path)
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), task.path.with_suffix(".parquet"))
    part = task.marker.with_suffix(".part")
    part.write_text(json.dumps(task.options) + "\n", "utf8")
    part.replace(task.marker)
    return len(rows)


def tasks_of(chosen: argparse.Namespace, png: Path) -> list[Task]:
    """All shards of the three splits."""
    tasks = []
    for split, name in enumerate(SPLITS):
        samples, noise = getattr(chosen, name), chosen.noise if name == "train" else 0.0
        folder = chosen.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(-(-samples // SHARD)):
            size = min(SHARD, samples - number * SHARD)
            tasks.append(Task(folder, png, chosen.seed, split, number, size, noise))
    return tasks


def share(text: str) -> float:
    """Checks --noise."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be at least 0 and less than 1")
    return value


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make image-text shards of scenes with captions and labels.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train/, labelled/ and test/")
    parser.add_argument("--noise", type=share, default=0.3, help="share of words that say nothing (default: 0.3)")
    parser.add_argument("--train", type=int, default=100_000, help="image-text pairs (default: 100,000)")
    parser.add_argument("--labelled", type=int, default=10_000, help="images to fit probes on (default: 10,000)")
    parser.add_argument("--test", type=int, default=10_000, help="test images (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder for the package (default: 'cache' next to --out)")
    parser.add_argument("--tree", type=Path, help="unpacked archive (contains png/), instead of the package")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    return parser.parse_args()


def main() -> int:
    """Runs the command line; returns the exit status."""
    chosen, begin = parse_arguments(), time.monotonic()
    try:
        cache = chosen.cache or chosen.out.absolute().parent / "cache"
        tree = ClipartTree(chosen.tree, ()) if chosen.tree else fetch_tree(cache)
    except PackageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tasks = tasks_of(chosen, tree.root / "png")
    missing = [task for task in tasks if not task.is_done()]
    for task in missing:
        task.marker.unlink(missing_ok=True)
    made = 0
    with ProcessPoolExecutor(chosen.workers) as pool:
        for done in as_completed(pool.submit(make_shard, task) for task in missing):
            made += done.result()
            print(f"\r{made:,} scenes, {made / (time.monotonic() - begin):,.0f} a second", end="", file=sys.stderr)
    total = sum(task.samples for task in tasks)
    print(f"\n{chosen.out}: {total:,} scenes in {len(tasks)} shards, {made:,} of them made now", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
