"""Label rows that betons do not hold, made ready before any rank opens them: those of another OUT (`train run --labels OTHER_OUT`), and
captions in their order (`train clip`).

OTHER_OUT/labels/<shard>.parquet -> labels/arrays.py -> OTHER_OUT/rows/*.npy -> BetonSet(OUT, OTHER_OUT)
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from labels.arrays import Column, check_same_rows, open_rows, shards_needed, write_rows
from labels.manifest import read_manifest
from train.distributed import World

_TELL_EVERY_S = 5.0


def make_rows(out: Path, labels: Path, column: Column = "label_ids") -> Iterator[str]:
    """Make, one at a time, the arrays of label rows that are not there yet; yields the name of each shard done.

    Args:
        out: of the betons.
        labels: OUT of the labels.
        column: of the label files.

    Raises:
        UserError: the two have other rows, or a label file is damaged.
    """
    manifest, other = read_manifest(out), read_manifest(labels)
    check_same_rows(out, manifest, labels, other)
    todo = [part for part in shards_needed(manifest, other, column) if open_rows(labels, part, other.label_limit, column) is None]
    told = time.monotonic()
    for number, part in enumerate(todo, start=1):
        write_rows(labels, part, other.label_limit, column)
        if number == len(todo) or time.monotonic() - told >= _TELL_EVERY_S:
            told = time.monotonic()
            print(f"label rows of {labels}: {number:,} of {len(todo):,} shards made", flush=True)
        yield part.name


def make_rows_once(out: Path, labels: Path, world: World, stopping: Callable[[], bool], column: Column = "label_ids") -> bool:
    """`make_rows` on the first rank while all others wait; False if somebody asked to stop.

    The first rank of every other node has a second turn: it finds the work done on a shared disk, and does it on a disk of
    its own. The ranks meet after every shard, because a collective that waits for the whole work would run into its timeout.
    """
    first_of_node = int(os.environ.get("LOCAL_RANK", world.rank)) == 0
    for turn in (world.is_first, first_of_node and not world.is_first):
        making = make_rows(out, labels, column) if turn else iter(())
        while world.any(next(making, None) is not None)[0]:
            if world.any(stopping())[0]:
                return False
    return True
