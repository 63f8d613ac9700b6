"""What every reader of data gives: places of encoded images, with classes or captions. N samples, C classes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from labels.errors import UserError

NAMES_SHOWN = 5
IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")


class Place(Protocol):
    """Where the bytes of one image lie. `size_bytes` is their number, or -1 where only reading would tell."""

    @property
    def path(self) -> Path: ...

    @property
    def size_bytes(self) -> int: ...

    def read(self) -> bytes:
        """The encoded image."""
        ...


class FilePlace(NamedTuple):
    """`size_bytes` bytes of `path` from `offset` on: a whole file, or a member of a tar."""

    path: Path
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        """The encoded image."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """A file as a whole."""
        return cls(path, 0, path.stat().st_size)


class Sample(NamedTuple):
    """One labelled image: `key` is unique in its part."""

    key: str
    label: str
    place: Place


@dataclass(frozen=True)
class Images:
    """Images without more: what features are extracted from.

    `fingerprint` is SHA-256 over the sorted (key, class or captions, bytes) of all samples, 16 hex digits: the same for the same
    data in another place. `modified_ns` is the newest modification time of the files, which tells a cache of changes that the
    fingerprint cannot see.
    """

    directory: Path
    keys: list[str]
    places: Sequence[Place]
    fingerprint: str
    modified_ns: int

    def __len__(self) -> int:
        return len(self.places)

    def describe(self) -> dict[str, Any]:
        """What a result JSON says of the data."""
        return {"directory": str(self.directory), "samples": len(self), "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class LabelledImages(Images):
    """One part (train or test) of a data set. `targets` is int64 [N] with values in [0, C), numbering `classes`."""

    targets: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, samples: Sequence[Sample], classes: tuple[str, ...]) -> Self:
        """Number the classes and take the fingerprint.

        Raises:
            UserError: a key comes twice.
        """
        check_keys(directory, [sample.key for sample in samples])
        number = {name: index for index, name in enumerate(classes)}
        return cls(
            directory=directory,
            keys=[sample.key for sample in samples],
            places=[sample.place for sample in samples],
            fingerprint=fingerprint_rows([sample.key, sample.label, sample.place.size_bytes] for sample in samples),
            modified_ns=newest(sample.place for sample in samples),
            targets=np.array([number[sample.label] for sample in samples], dtype=np.int64),
            classes=classes,
        )

    def describe(self) -> dict[str, Any]:
        """Directory, samples, samples per class, fingerprint."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return super().describe() | {"samples_per_class": {name: int(count) for name, count in zip(self.classes, counts, strict=True)}}


@dataclass(frozen=True)
class CaptionedImages(Images):
    """One part of a captioned data set: `captions[i]` are the captions of image i, one or more, in the file's order."""

    captions: list[list[str]]

    @classmethod
    def of(cls, directory: Path, samples: Sequence[tuple[str, Place, list[str]]]) -> Self:
        """From (key, place, captions) of every image.

        Raises:
            UserError: a key comes twice.
        """
        check_keys(directory, [key for key, _, _ in samples])
        return cls(
            directory=directory,
            keys=[key for key, _, _ in samples],
            places=[place for _, place, _ in samples],
            fingerprint=fingerprint_rows([key, captions, place.size_bytes] for key, place, captions in samples),
            modified_ns=newest(place for _, place, _ in samples),
            captions=[captions for _, _, captions in samples],
        )

    def describe(self) -> dict[str, Any]:
        """Directory, samples, captions, fingerprint."""
        return super().describe() | {"captions": sum(map(len, self.captions))}


def check_keys(directory: Path, keys: Sequence[str]) -> None:
    """Raises:
    UserError: a key comes twice.
    """
    key, count = Counter(keys).most_common(1)[0] if keys else ("", 0)
    if count > 1:
        raise UserError(f"{directory} has the key {key!r} {count} times", allowed="each key once, its members adjacent")


def fingerprint_rows(rows: Iterable[list[Any]]) -> str:
    """SHA-256 over the rows as sorted lines of JSON, 16 hex digits."""
    return hashlib.sha256("\n".join(sorted(map(json.dumps, rows))).encode()).hexdigest()[:16]


def newest(places: Iterable[Place]) -> int:
    """The newest modification time of the places' files, ns."""
    return max(path.stat().st_mtime_ns for path in {place.path for place in places})


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their numbers: whole numbers first, by value, then names by code point."""
    return tuple(sorted(set(labels), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


def suffix(name: str) -> str:
    """`a.B.JPG` -> `jpg`."""
    return name.rpartition(".")[2].lower()


def shorten(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
