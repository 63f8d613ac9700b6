"""Test images that the training part holds too, found by their bytes, whatever they are called.

Only images whose size stands in both parts are read; where sizes are unknown (Parquet), all are. The finding is kept in a cache.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from labels.errors import UserError
from labels.storage import fingerprint, write_json
from train.evals.data.images import Images, Place


class Overlap(NamedTuple):
    """How many test images the training part holds too, and the first of them: its key there, and in the training part."""

    images: int
    test_key: str
    train_key: str


def find_overlap(train: Images, test: Images, cache: Path | None = None) -> Overlap:
    """Compare two parts by the SHA-256 of their images' bytes.

    Args:
        cache: a folder that keeps the finding under the fingerprints and times of both parts.
    """
    key = fingerprint([part.fingerprint + str(part.modified_ns) for part in (train, test)])
    file = cache / f"overlap-{key}.json" if cache else None
    if file and file.is_file():
        return Overlap(**json.loads(file.read_bytes()))
    train_rows, test_rows = _same_sizes(train.places, test.places)
    digests = dict(zip(_digests(train, train_rows), train_rows, strict=True))
    twins = [(row, digests[digest]) for row, digest in zip(test_rows, _digests(test, test_rows), strict=True) if digest in digests]
    first = (test.keys[twins[0][0]], train.keys[twins[0][1]]) if twins else ("", "")
    found = Overlap(len(twins), *first)
    if file:
        write_json(file, found._asdict())
    return found


def check_overlap(name: str, train: Images, test: Images, cache: Path | None, *, published: bool) -> int:
    """How many test images the training part holds too: told where the data are published so, refused elsewhere.

    Args:
        name: of the data.
        cache: see find_overlap.

    Raises:
        UserError: some, in data of one's own.
    """
    overlap = find_overlap(train, test, cache)
    if overlap.images and published:
        print(f"{name}: {overlap.images} test images are training images too, as published; the result says so", flush=True)
    elif overlap.images:
        raise UserError(
            f"{overlap.images} of {len(test)} test images are training images too, "
            f"the first: {overlap.test_key} of {test.directory} is {overlap.train_key} of {train.directory}, byte by byte",
            allowed="a test part that the training part has nothing of",
            mend="remove them from one of the two parts",
        )
    return overlap.images


def _same_sizes(train: Sequence[Place], test: Sequence[Place]) -> tuple[list[int], list[int]]:
    """Positions in both parts of the images that may have a twin in the other."""
    sizes = [{place.size_bytes for place in part} for part in (train, test)]
    shared = sizes[0] & sizes[1] if -1 not in sizes[0] | sizes[1] else sizes[0] | sizes[1]
    train_rows, test_rows = ([row for row, place in enumerate(part) if place.size_bytes in shared] for part in (train, test))
    return train_rows, test_rows


def _digests(part: Images, rows: list[int]) -> list[bytes]:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda row: hashlib.sha256(part.places[row].read()).digest(), rows))
