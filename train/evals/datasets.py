"""Labelled images on disk: folders by class, or webdataset shards with the class in each sample's json.

    DIR/<class>/**/*.jpg                      folders: the folder's name is the class, the path the key
    DIR/*.tar or DIR/shards/*.tar             shards: <key>.jpg and <key>.json, {"class": ...}, members of a key adjacent

Only places are held in memory (file, offset, size), never bytes. N samples, C classes.
"""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labels.errors import UserError

IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
_CLASSES_SHOWN = 5


class Place(NamedTuple):
    """Where the bytes of one image lie: `size_bytes` bytes of `path` from `offset` on."""

    path: Path
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        """The encoded image."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)


class Sample(NamedTuple):
    """One labelled image: `key` is unique in its directory."""

    key: str
    label: str
    place: Place


@dataclass(frozen=True)
class LabelledImages:
    """One part (train or test) of a data set, its classes numbered by the training part's sorted names.

    `targets` is int64 [N] with values in [0, C). `fingerprint` is SHA-256 over the sorted (key, class, bytes) of all
    samples, 16 hex digits: the same for the same data in another place. `modified_ns` is the newest modification time
    of the files, which tells a cache of changes that the fingerprint cannot see.
    """

    directory: Path
    keys: list[str]
    places: list[Place]
    targets: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    modified_ns: int

    def __len__(self) -> int:
        return len(self.places)

    def describe(self) -> dict[str, Any]:
        """What a result JSON says of the data: directory, samples, samples per class, fingerprint."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return {
            "directory": str(self.directory),
            "samples": len(self),
            "samples_per_class": {name: int(count) for name, count in zip(self.classes, counts, strict=True)},
            "fingerprint": self.fingerprint,
        }


def load_labelled(train_dir: Path, test_dir: Path) -> tuple[LabelledImages, LabelledImages]:
    """Find and check both parts of a data set. No image is decoded.

    Raises:
        UserError: a directory is missing or empty, a sample has no class or no image, a tar is damaged, a key comes
            twice, the training part has one class only, the test part has a class that the training part lacks, or
            both parts are the same data.
    """
    train_samples, test_samples = list_samples(train_dir), list_samples(test_dir)
    classes = tuple(sorted({sample.label for sample in train_samples}))
    if len(classes) < 2:
        raise UserError(
            f"{train_dir} holds one class only: {train_samples[0].label!r}",
            allowed="two classes or more",
            mend="give --train a directory with a folder for every class, or shards whose json has a key `class`",
        )
    unknown = sorted({sample.label for sample in test_samples} - set(classes))
    if unknown:
        raise UserError(
            f"{test_dir} has {len(unknown)} classes that {train_dir} lacks: {_shorten(unknown)}",
            allowed=f"the {len(classes)} classes of the training part: {_shorten(classes)}",
            mend="give --train and --test two parts of one data set, or leave these classes out of --test",
        )
    train, test = _index(train_dir, train_samples, classes), _index(test_dir, test_samples, classes)
    if train.fingerprint == test.fingerprint:
        raise UserError(
            f"--train {train_dir} and --test {test_dir} hold the same {len(train)} samples",
            allowed="a test part that the training part has nothing of",
            mend="give --test the held-out part",
        )
    return train, test


def list_samples(directory: Path) -> list[Sample]:
    """Every labelled image below `directory`, in sorted order, whichever of the two layouts it has.

    Raises:
        UserError: as for load_labelled, as far as it concerns one directory.
    """
    if not directory.is_dir():
        raise UserError(
            f"no directory at {directory}",
            allowed="folders by class (DIR/<class>/*.jpg), or shards (DIR/*.tar or DIR/shards/*.tar)",
            mend="mend the path given to --train or --test",
        )
    tars = sorted(directory.glob("*.tar")) or sorted((directory / "shards").glob("*.tar"))
    samples = [sample for tar in tars for sample in _shard_samples(tar)] if tars else list(_folder_samples(directory))
    if not samples:
        raise UserError(
            f"{directory} holds no labelled image",
            allowed=f"DIR/<class>/*.{{{','.join(IMAGE_SUFFIXES)}}}, or DIR/*.tar, or DIR/shards/*.tar",
            mend="mend the path given to --train or --test; images directly in DIR have no class",
        )
    key, count = Counter(sample.key for sample in samples).most_common(1)[0]
    if count > 1:
        raise UserError(f"{directory} has the key {key!r} {count} times", allowed="each key once, its members adjacent")
    return samples


def _folder_samples(directory: Path) -> Iterator[Sample]:
    for folder in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for file in sorted(folder.rglob("*")):
            if _suffix(file.name) in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file():
                yield Sample(file.relative_to(directory).as_posix(), folder.name, Place(file, 0, file.stat().st_size))


def _shard_samples(path: Path) -> Iterator[Sample]:
    """The samples of one tar, in its order: everything before the first dot of a basename is the key."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            _check_end(tar, path)
            for key, group in groupby(members, lambda member: _split_key(member.name)[0]):
                fields = [(_split_key(member.name)[1], member) for member in group]
                label = _class_of(tar, path, key, dict(fields))
                images = [member for ending, member in fields if ending in IMAGE_SUFFIXES]
                if len(images) != 1:
                    raise UserError(
                        f"{path}: the sample {key!r} has {len(images)} images (members: {', '.join(dict(fields))})",
                        allowed=f"one member with an ending of {', '.join(IMAGE_SUFFIXES)}",
                    )
                yield Sample(f"{path.name}/{key}", label, Place(path, images[0].offset_data, images[0].size))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read to its end: {error}", mend="fetch or write this shard again") from None


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """A tar ends with blocks of zeros. Without them it was cut between two members, which tarfile passes over."""
    with open(path, "rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path} is cut or damaged at byte {tar.offset:,}: no end-of-archive block there",
                allowed="a whole tar",
                mend="fetch or write this shard again",
            )


def _class_of(tar: tarfile.TarFile, path: Path, key: str, fields: dict[str, tarfile.TarInfo]) -> str:
    """The class name in a sample's json: a string, or a whole number taken as its digits."""
    where, mend = f"{path}: the sample {key!r}", "write the class into each sample's json under the key `class`"
    file = tar.extractfile(fields["json"]) if "json" in fields else None
    if file is None:
        raise UserError(f"{where} has no json", allowed='<key>.json with {"class": "name"}', mend=mend)
    try:
        content = json.loads(file.read())
    except ValueError as error:  # both JSON and UTF-8 faults
        raise UserError(f"{where} has a json that cannot be read: {error}", mend=mend) from None
    label = content.get("class") if isinstance(content, dict) else None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{where} has no class in its json: `class` is {label!r}, the json holds {keys}",
            allowed="a key `class` with a name or a whole number",
            mend=mend,
        )
    return str(label)


def _index(directory: Path, samples: list[Sample], classes: tuple[str, ...]) -> LabelledImages:
    """Number the classes and take the fingerprint."""
    number = {name: index for index, name in enumerate(classes)}
    lines = sorted(json.dumps([sample.key, sample.label, sample.place.size_bytes]) for sample in samples)
    return LabelledImages(
        directory=directory,
        keys=[sample.key for sample in samples],
        places=[sample.place for sample in samples],
        targets=np.array([number[sample.label] for sample in samples], dtype=np.int64),
        classes=classes,
        fingerprint=hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        modified_ns=max(path.stat().st_mtime_ns for path in {sample.place.path for sample in samples}),
    )


def _split_key(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _shorten(names: tuple[str, ...] | list[str]) -> str:
    rest = len(names) - _CLASSES_SHOWN
    return ", ".join(names[:_CLASSES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
