"""What every reader of data gives: places of encoded images, with classes or captions. N samples, C classes."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from labels.storage import UserError, fingerprint, write_json

NAMES_SHOWN = 5
IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")


class EncodedImage(Protocol):
    """Where the bytes of one image lie. `size_bytes` is their number, or -1 where only reading would tell."""

    @property
    def path(self) -> Path: ...

    @property
    def size_bytes(self) -> int: ...

    def read(self) -> bytes:
        """The encoded image."""
        ...


class FileSpan(NamedTuple):
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
    image: EncodedImage


@dataclass(frozen=True)
class Images:
    """Images without more: what features are extracted from.

    `fingerprint` is SHA-256 over the sorted (key, class or captions, bytes) of all samples, 16 hex digits: the same for
    the same data in another place. `modified_ns` is the newest modification time of the files, which tells a cache of
    changes that the fingerprint cannot see.
    """

    directory: Path
    keys: list[str]
    encoded: Sequence[EncodedImage]
    fingerprint: str
    modified_ns: int

    def __len__(self) -> int:
        return len(self.encoded)

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
            encoded=[sample.image for sample in samples],
            fingerprint=fingerprint_rows([sample.key, sample.label, sample.image.size_bytes] for sample in samples),
            modified_ns=newest(sample.image for sample in samples),
            targets=np.array([number[sample.label] for sample in samples], dtype=np.int64),
            classes=classes,
        )

    def describe(self) -> dict[str, Any]:
        """Directory, samples, samples per class, fingerprint."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return super().describe() | {
            "samples_per_class": {name: int(count) for name, count in zip(self.classes, counts, strict=True)}
        }


@dataclass(frozen=True)
class CaptionedImages(Images):
    """One part of a captioned data set: `captions[i]` are the captions of image i, one or more, in the file's order."""

    captions: list[list[str]]

    @classmethod
    def of(cls, directory: Path, samples: Sequence[tuple[str, EncodedImage, list[str]]]) -> Self:
        """From (key, place, captions) of every image.

        Raises:
            UserError: a key comes twice.
        """
        check_keys(directory, [key for key, _, _ in samples])
        return cls(
            directory=directory,
            keys=[key for key, _, _ in samples],
            encoded=[place for _, place, _ in samples],
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


def newest(places: Iterable[EncodedImage]) -> int:
    """The newest modification time of the places' files, ns."""
    return max(path.stat().st_mtime_ns for path in {place.path for place in places})


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their numbers: whole numbers first, by value, then names by code point."""
    return tuple(
        sorted(set(labels), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    )


def suffix(name: str) -> str:
    """`a.B.JPG` -> `jpg`."""
    return name.rpartition(".")[2].lower()


def shorten(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# ---- listing: Every labelled image below one folder: folders by class, or webdataset shards with the class in each sample.
#
# DIR/<class>/**/*.jpg                      folders: the folder's name is the class, the path the key
# DIR/*.tar or DIR/shards/*.tar             shards: <key>.jpg with <key>.cls or <key>.json ({"class": ...}), members of a key adjacent


_LAYOUTS = "folders by class (DIR/<class>/*.jpg), or shards (DIR/*.tar or DIR/shards/*.tar)"
_CLASS_MEND = "write the class into each sample's json under the key `class`, or into <key>.cls"


def list_samples(directory: Path) -> list[Sample]:
    """Every labelled image below `directory`, in sorted order, whichever of the two layouts it has.

    Raises:
        UserError: the directory is missing or empty, a sample has no class or no image, a tar is damaged.
    """
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", allowed=_LAYOUTS, fix="fix the path of the data")
    tars = list_tars(directory)
    samples = [sample for tar in tars for sample in _shard_samples(tar)] if tars else list_folders(directory)
    if not samples:
        raise UserError(
            f"{directory} holds no labelled image",
            allowed=f"DIR/<class>/*.{{{','.join(IMAGE_SUFFIXES)}}}, or DIR/*.tar, or DIR/shards/*.tar",
            fix="fix the path of the data; images directly in DIR have no class",
        )
    return samples


def list_tars(directory: Path) -> list[Path]:
    """DIR/*.tar, or else DIR/shards/*.tar, sorted."""
    return sorted(directory.glob("*.tar")) or sorted((directory / "shards").glob("*.tar"))


def list_folders(directory: Path) -> list[Sample]:
    """Samples of DIR/<class>/**/*.jpg; hidden folders and files are passed over."""
    found = []
    for folder in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for file in list_images(folder):
            found.append(Sample(file.relative_to(directory).as_posix(), folder.name, FileSpan.of_file(file)))
    return found


def list_images(folder: Path) -> list[Path]:
    """Image files anywhere below `folder`, sorted."""
    files = sorted(folder.rglob("*"))
    return [
        file
        for file in files
        if suffix(file.name) in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]


def tar_members(path: Path) -> Iterator[tuple[tarfile.TarFile, str, dict[str, tarfile.TarInfo]]]:
    """The samples of one tar, in its order: the open tar, key, members by ending. Before a basename's first dot is the
    key.

    Raises:
        UserError: the tar is damaged or cut, at whatever place.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            _check_end(tar, path)
            for key, group in groupby(members, lambda member: _split_key(member.name)[0]):
                fields: dict[str, tarfile.TarInfo] = {}
                for member in group:
                    ending = _split_key(member.name)[1]
                    if fields.setdefault(ending, member) is not member:
                        raise UserError(
                            f"{path}: the sample {key!r} has two members .{ending}", allowed="one of each ending"
                        )
                yield tar, key, fields
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read to its end: {error}", fix="fetch or write this shard again") from None


def image_member(path: Path, key: str, fields: dict[str, tarfile.TarInfo]) -> FileSpan:
    """The place of a sample's one image.

    Raises:
        UserError: it has none, or several.
    """
    images = [member for ending, member in fields.items() if ending in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise UserError(
            f"{path}: the sample {key!r} has {len(images)} images (members: {', '.join(fields)})",
            allowed=f"one member with an ending of {', '.join(IMAGE_SUFFIXES)}",
        )
    return FileSpan(path, images[0].offset_data, images[0].size)


def _shard_samples(path: Path) -> Iterator[Sample]:
    for tar, key, fields in tar_members(path):
        label = _class_of(tar, path, key, fields)
        yield Sample(f"{path.name}/{key}", label, image_member(path, key, fields))


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """A tar ends with blocks of zeros. Without them it was cut between two members, which tarfile passes over."""
    with open(path, "rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path} is cut or damaged at byte {tar.offset:,}: no end-of-archive block there",
                allowed="a whole tar",
                fix="fetch or write this shard again",
            )


def _class_of(tar: tarfile.TarFile, path: Path, key: str, fields: dict[str, tarfile.TarInfo]) -> str:
    """The class name: the text of <key>.cls, or of `class` in <key>.json: a string, or a whole number taken as its
    digits.
    """
    where = f"{path}: the sample {key!r}"
    member = fields.get("cls") or fields.get("json")
    file = tar.extractfile(member) if member else None
    if file is None:
        raise UserError(
            f"{where} has no json", allowed='<key>.json with {"class": "name"}, or <key>.cls', fix=_CLASS_MEND
        )
    try:
        content = {"class": file.read().decode().strip()} if "cls" in fields else json.loads(file.read())
    except ValueError as error:  # both JSON and UTF-8 faults
        raise UserError(f"{where} has a json that cannot be read: {error}", fix=_CLASS_MEND) from None
    label = content.get("class") if isinstance(content, dict) else None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{where} has no class in its json: `class` is {label!r}, the json holds {keys}",
            allowed="a key `class` with a name or a whole number",
            fix=_CLASS_MEND,
        )
    return str(label)


def _split_key(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


# ---- overlap: Test images that the training part holds too, found by their bytes, whatever they are called.
#
# Only images whose size stands in both parts are read; where sizes are unknown (Parquet), all are. The finding is kept
# in a cache.


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
    train_rows, test_rows = _same_sizes(train.encoded, test.encoded)
    digests = dict(zip(_digests(train, train_rows), train_rows, strict=True))
    twins = [
        (row, digests[digest])
        for row, digest in zip(test_rows, _digests(test, test_rows), strict=True)
        if digest in digests
    ]
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
        print(
            f"{name}: {overlap.images} test images are training images too, as published; the result says so",
            flush=True,
        )
    elif overlap.images:
        raise UserError(
            f"{overlap.images} of {len(test)} test images are training images too, "
            f"the first: {overlap.test_key} of {test.directory} is {overlap.train_key} of {train.directory}, byte by byte",
            allowed="a test part that the training part has nothing of",
            fix="remove them from one of the two parts",
        )
    return overlap.images


def _same_sizes(train: Sequence[EncodedImage], test: Sequence[EncodedImage]) -> tuple[list[int], list[int]]:
    """Positions in both parts of the images that may have a twin in the other."""
    sizes = [{place.size_bytes for place in part} for part in (train, test)]
    shared = sizes[0] & sizes[1] if -1 not in sizes[0] | sizes[1] else sizes[0] | sizes[1]
    train_rows, test_rows = (
        [row for row, place in enumerate(part) if place.size_bytes in shared] for part in (train, test)
    )
    return train_rows, test_rows


def _digests(part: Images, rows: list[int]) -> list[bytes]:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda row: hashlib.sha256(part.encoded[row].read()).digest(), rows))
