"""Decides which drawings are held out for testing, so that variants of one drawing never end up on both sides.

    sample -> keys: variant key of the name ("cone3_bw_ganson" -> "cone_ganson"), hash of the JPEG, hash of the SVG
           -> groups of samples that share a key -> order by hash -> the first 10% are test

The folder is not part of the key: the archive files one drawing under several folders.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from clipart_pairs import Sample

TEST_FRACTION = 0.1
# A few families are drawn by a program (1,375 stars named star_NNptMMstep): a test side that is mostly one family
# measures nothing, so families larger than this always go to training.
LARGEST_TEST_GROUP = 100

# A number with a lone letter after it: "_01", "-2", "v0.3", "06b", "_01r", and "98pt45step" without its numbers.
NUMBER = re.compile(r"\d+(?:[a-z](?![a-z]))?")
NOT_A_LETTER = re.compile(r"[^a-z]+")
# Marks the black-and-white copy of a coloured drawing.
COPY_WORDS = {"bw"}


def variant_key(stem: str) -> str:
    """What the names of a drawing's variants have in common; the name itself without its last number if nothing."""
    lowered = stem.lower()
    words = [word for word in NOT_A_LETTER.split(NUMBER.sub(" ", lowered)) if word and word not in COPY_WORDS]
    # Last single letters number things as well: playing cards ("white_d_q"), "cloud_l", "gear_v2".
    while len(words) > 1 and len(words[-1]) == 1:
        words.pop()
    return "_".join(words) or lowered.rstrip("0123456789") or lowered


def sample_keys(sample: Sample) -> list[str]:
    """Samples that share any of these stay on one side.

    The finished JPEG stands for the image: it is equal for equal PNG files, and for PNG files that differ only in how
    the same pixels were packed.
    """
    name = variant_key(PurePosixPath(sample.url).stem)
    jpeg = hashlib.sha256(sample.picture.jpeg).hexdigest()
    return [f"name {name}", f"jpeg {jpeg}", f"svg {sample.svg_sha256}"]


def joined_groups(keys_of_items: Sequence[Iterable[str]]) -> list[list[int]]:
    """Groups the indices of items that share a key, directly or through other items (union-find)."""
    parents = list(range(len(keys_of_items)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first_with: dict[str, int] = {}
    for index, keys in enumerate(keys_of_items):
        for key in keys:
            parents[root(index)] = root(first_with.setdefault(key, index))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(len(keys_of_items)):
        groups[root(index)].append(index)
    return list(groups.values())


def group_order(keys: Iterable[str]) -> str:
    """A repeatable random position for a group; its smallest key names it, whatever the order of its members."""
    return hashlib.sha256(min(keys).encode()).hexdigest()


def split_samples(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each side, in shuffled order: groups go to the test side until it has its share."""
    keys = [sample_keys(sample) for sample in samples]
    groups = joined_groups(keys)
    groups.sort(key=lambda group: group_order(key for index in group for key in keys[index]))
    room = round(TEST_FRACTION * len(samples))
    sides: dict[str, list[Sample]] = {"train": [], "test": []}
    for group in groups:
        is_test = len(group) <= min(room, LARGEST_TEST_GROUP)
        if is_test:
            room -= len(group)
        sides["test" if is_test else "train"] += [samples[index] for index in group]
    return {side: sorted(members, key=lambda sample: sample.uid) for side, members in sides.items()}
