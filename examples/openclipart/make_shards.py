"""Makes image-text shards from Debian's public-domain clip art.

    openclipart-svg, openclipart-png (Debian packages)            clipart_packages
      -> pairs of PNG and SVG                                     clipart_pairs
      -> caption (from the SVG) and JPEG (from the PNG)           clipart_caption, clipart_image, clipart_progress
      -> train or test side, shuffled                             clipart_split
      -> OUT/{train,test}/{shards,metadata}                       clipart_shards
      -> OUT/openclipart.json (counts), written last, when the rest is complete

Run: python examples/openclipart/make_shards.py --out demo/data
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipart_image import JPEG_QUALITY, MAX_PIXELS, MAX_SIDE
from clipart_packages import ClipartTree, PackageError, fetch_tree
from clipart_pairs import Sample, find_pairs, read_pair
from clipart_progress import map_with_progress
from clipart_shards import LARGEST_SHARD, write_shard
from clipart_split import LARGEST_TEST_GROUP, TEST_FRACTION, split_samples

# Raise this with any change to captions, images, split or layout: earlier output then counts as outdated.
VERSION = 1
SPLITS = ("train", "test")
MARKER = "openclipart.json"
PART_FOLDER = "openclipart.part"


class OutputError(Exception):
    """The output folder cannot be used; the message says why."""


def options_of(samples_per_shard: int) -> dict[str, object]:
    """Everything that determines the output; a marker with other options means: make it again."""
    return {
        "version": VERSION,
        "samples_per_shard": samples_per_shard,
        "max_side": MAX_SIDE,
        "jpeg_quality": JPEG_QUALITY,
        "max_pixels": MAX_PIXELS,
        "test_fraction": TEST_FRACTION,
        "largest_test_group": LARGEST_TEST_GROUP,
    }


def finished_marker(out: Path, options: dict[str, object]) -> dict[str, Any] | None:
    """The marker of an earlier run with the same options, if its shards are still there."""
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if marker.get("options") != options:
        return None
    for split, counts in marker["splits"].items():
        if len(list((out / split / "shards").glob("*_stats.json"))) != counts["shards"]:
            return None
    return marker


def write_split(samples: Sequence[Sample], folder: Path, samples_per_shard: int) -> dict[str, object]:
    """Writes one split, shard by shard, and returns its counts."""
    starts = range(0, len(samples), samples_per_shard)
    for shard, start in enumerate(starts):
        write_shard(folder, shard, samples[start : start + samples_per_shard])
    classes = Counter(sample.class_name for sample in samples)
    return {"samples": len(samples), "shards": len(starts), "classes": dict(sorted(classes.items()))}


def prepare_part_folder(out: Path) -> Path:
    """An empty folder to work in; clears what a killed run left, but never folders that are not this script's."""
    part = out / PART_FOLDER
    strangers = [split for split in SPLITS if (out / split).exists()]
    if strangers and not part.exists() and not (out / MARKER).exists():
        raise OutputError(f"{out} has a folder {strangers[0]} that this script did not make: choose another --out.")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def publish(part: Path, out: Path) -> None:
    """Moves the finished splits into place, the marker last; until then the part folder marks the output as this
    script's.
    """
    (out / MARKER).unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
        if (part / split).exists():
            (part / split).replace(out / split)
    (part / MARKER).replace(out / MARKER)
    part.rmdir()


def make_shards(tree: ClipartTree, out: Path, samples_per_shard: int, workers: int) -> dict[str, object]:
    """Does all the work on an unpacked archive; returns the marker."""
    pairs = find_pairs(tree.root)
    if not pairs:
        raise PackageError(f"{tree.root} holds no pairs of png/CLASS/NAME.png and svg/CLASS/NAME.svg.")
    part = prepare_part_folder(out)
    outcomes = list(map_with_progress("clip art", read_pair, pairs, workers))
    # All JPEGs are in memory (120 MB), because the split depends on which of them are equal.
    sides = split_samples([outcome.sample for outcome in outcomes if outcome.sample is not None])
    skipped = Counter(outcome.skip for outcome in outcomes if outcome.sample is None)
    marker: dict[str, object] = {
        "options": options_of(samples_per_shard),
        "packages": list(tree.packages),
        "pairs": len(pairs),
        "splits": {split: write_split(sides[split], part / split, samples_per_shard) for split in SPLITS},
        "skipped": dict(sorted(skipped.items())),
        "captions_from_broken_xml": sum(outcome.broken_xml for outcome in outcomes),
    }
    (part / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    publish(part, out)
    return marker


def shard_size(text: str) -> int:
    """Checks --samples-per-shard: the keys have room for 10,000 samples a shard."""
    size = int(text)
    if not 1 <= size <= LARGEST_SHARD:
        raise argparse.ArgumentTypeError(f"must be between 1 and {LARGEST_SHARD}")
    return size


def worker_count(text: str) -> int:
    """Checks --workers."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make image-text shards from Debian's public-domain clip art.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train/, test/ and the marker")
    parser.add_argument("--cache", type=Path, help="folder for the packages (default: 'cache' next to --out)")
    parser.add_argument("--tree", type=Path, help="unpacked archive (contains svg/ and png/), instead of the packages")
    parser.add_argument("--workers", type=worker_count, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("--samples-per-shard", type=shard_size, default=1000, help="default: 1000")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    chosen = parse_arguments(arguments)
    options = options_of(chosen.samples_per_shard)
    marker = finished_marker(chosen.out, options)
    if marker is not None:
        print(f"done already: {chosen.out / MARKER}")
        return 0
    start = time.monotonic()
    try:
        cache = chosen.cache or chosen.out.absolute().parent / "cache"
        tree = ClipartTree(chosen.tree, ()) if chosen.tree else fetch_tree(cache)
        marker = make_shards(tree, chosen.out, chosen.samples_per_shard, chosen.workers)
    except (PackageError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(marker, indent=2))
    print(f"done in {time.monotonic() - start:.0f} s: {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
