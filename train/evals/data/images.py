"""Images as they are on disk: found and checked here, decoded later (train/evals/features.py).

    DIR/<class>/**/*.jpg                      folders: the folder's name is the class, the path the key
    DIR/*.tar or DIR/shards/*.tar             shards: <key>.jpg with <key>.cls or <key>.json ({"class": ...}), or with
                                              another key of the json as the class: one data set, several tasks
    *.parquet                                 image bytes and classes, as Hugging Face's hub keeps them: parquet.py

Each reader gives `Sample`s: key, class name and an `EncodedImage`, which reads its bytes later. `LabelledImages` and
`CaptionedImages` are one part (train or test) of a data set. `check_overlap` finds test images in the training part.
N samples, C classes.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from labels.show.terminal import visible
from labels.storage import UserError, fingerprint, printable, write_json
from labels.tars import ADJACENT, SORT_FIX, TarFault, split_name, tar_members

IMAGE_SUFFIXES = ("bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
_NAMES_SHOWN = 5
_LAYOUTS = f"DIR/<class>/*.{{{','.join(IMAGE_SUFFIXES)}}}, or DIR/*.tar, or DIR/shards/*.tar"
_CLASS_FIX = "write the class into each sample's json under the key `class`, or into <key>.cls"
_SHARD_FIX = "fetch or write this shard again"


class EncodedImage(Protocol):
    """The bytes of one image on disk. `size_bytes` is -1 where only reading would give the number."""

    @property
    def path(self) -> Path: ...

    @property
    def size_bytes(self) -> int: ...

    def read(self) -> bytes: ...


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
    """One labelled image."""

    key: str  # unique in its part
    label: str
    image: EncodedImage


@dataclass(frozen=True)
class Images:
    """Images without classes: all that feature extraction needs."""

    directory: Path
    part: str  # "training" or "test"
    keys: list[str]
    encoded: Sequence[EncodedImage]
    # SHA-256 of the sorted (key, class or captions, size), 16 hex digits: independent of the directory
    fingerprint: str
    image_fingerprint: str  # likewise of (key, size), in order: what features depend on, whatever the classes are
    state: str  # file_states of the files: changes that the fingerprint cannot see

    def __len__(self) -> int:
        return len(self.encoded)

    def locate(self, row: int) -> str:
        """The file of an image, for messages; in a shard, the shard and the key."""
        file, key = self.encoded[row].path, self.keys[row]
        return printable(str(file)) if key.endswith(printable(file.name)) else f"{printable(str(file.parent))}/{key}"

    def describe(self) -> dict[str, Any]:
        """The part's entry in a result JSON."""
        return {"directory": str(self.directory), "samples": len(self), "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class LabelledImages(Images):
    """One part of a data set with classes."""

    targets: np.ndarray  # int64 [N], in [0, C)
    classes: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, part: str, samples: Sequence[Sample], classes: tuple[str, ...]) -> Self:
        """Number the classes. UserError: a key or the name of a class comes twice."""
        classes = tuple(map(printable, classes))
        number = {name: index for index, name in enumerate(classes)}
        if len(number) < len(classes):
            repeated = sorted(name for name, count in Counter(classes).items() if count > 1)
            raise UserError(
                f"{len(repeated)} names stand for several classes of {directory}: {shorten(repeated)}",
                allowed="one name per class: images of classes with one name would be one class",
                fix="rename the class in the data's list of classes (Parquet: `names` in the metadata `huggingface`)",
            )
        targets = np.array([number[printable(sample.label)] for sample in samples], dtype=np.int64)
        return cls(**_image_fields(directory, part, samples), targets=targets, classes=classes)

    def describe(self) -> dict[str, Any]:
        """As for `Images`, with the samples per class."""
        counts = np.bincount(self.targets, minlength=len(self.classes)).tolist()
        return super().describe() | {"samples_per_class": dict(zip(self.classes, counts, strict=True))}


@dataclass(frozen=True)
class CaptionedImages(Images):
    """One part of a captioned data set."""

    captions: list[list[str]]  # one or more for each image, in the file's order

    @classmethod
    def of(cls, directory: Path, part: str, samples: Sequence[tuple[str, list[str], EncodedImage]]) -> Self:
        """From (key, captions, image). UserError: a key comes twice."""
        captions = [[printable(caption) for caption in captions] for _, captions, _ in samples]
        return cls(**_image_fields(directory, part, samples), captions=captions)

    def describe(self) -> dict[str, Any]:
        """As for `Images`, with the number of captions."""
        return super().describe() | {"captions": sum(map(len, self.captions))}


def _image_fields(directory: Path, part: str, samples: Sequence[tuple[str, Any, EncodedImage]]) -> dict[str, Any]:
    """The fields of `Images` from (key, class or captions, image)."""
    if not samples:
        raise UserError(f"the {part} part of {directory} holds no image", fix="fix the path of the data")
    key, count = Counter(key for key, _, _ in samples).most_common(1)[0]
    if count > 1:
        raise UserError(f"{directory} has the key {key!r} {count} times", allowed="each key once, its members adjacent")
    rows = sorted(json.dumps([key, content, image.size_bytes]) for key, content, image in samples)
    return {
        "directory": directory,
        "part": part,
        "keys": [printable(key) for key, _, _ in samples],
        "encoded": [image for _, _, image in samples],
        "fingerprint": hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16],
        "image_fingerprint": fingerprint([(printable(key), image.size_bytes) for key, _, image in samples]),
        "state": file_states(image.path for _, _, image in samples),
    }


def file_states(files: Iterable[Path]) -> str:
    """Fingerprint of size, modification and change time and inode of every file, in order: it stands for the contents.

    What is computed from images is kept under this key. Hashing a terabyte before every evaluation is no option, and
    size and modification time alone miss an image that is replaced with its time kept (`cp -p`, `rsync -t`, `tar x`).
    The change time cannot be set by programs, and the inode changes where a file system's clock is too coarse. So no
    result of other images is ever taken; the price is that copied or touched data are computed again.
    """
    states = hashlib.sha256()
    for file in dict.fromkeys(files):
        stat = file.stat()
        states.update(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}\n".encode())
    return states.hexdigest()[:16]


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their numbers: whole numbers first, by value, then names by code point."""
    key = lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)  # noqa: E731
    return tuple(sorted(set(labels), key=key))


def shorten(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# -- folders by class, and shards


def list_samples(directory: Path, class_key: str | None = None) -> list[Sample]:
    """Every labelled image below `directory`, in sorted order, whichever of the two layouts it has.

    `class_key`: the key of each sample's json that is the class; None: <key>.cls, or else `class`.
    """
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", allowed=_LAYOUTS, fix="fix the path of the data")
    tars = list_tars(directory)
    if class_key is not None and not tars:
        problem = f"{directory} has no shards whose json could have the class key {class_key!r}"
        raise UserError(problem, allowed="DIR/*.tar or DIR/shards/*.tar", fix="omit --class-key, or give shards")
    samples = [sample for tar in tars for sample in _shard_samples(tar, class_key)] if tars else list_folders(directory)
    if not samples:
        fix = "fix the path of the data; images directly in DIR have no class"
        raise UserError(f"{directory} holds no labelled image", allowed=_LAYOUTS, fix=fix)
    return samples


def list_tars(directory: Path) -> list[Path]:
    """DIR/*.tar, or else DIR/shards/*.tar, sorted, without hidden files."""
    folders = (directory, directory / "shards")
    tars = (sorted(tar for tar in folder.glob("*.tar") if not _is_hidden(tar.name)) for folder in folders)
    return next(filter(None, tars), [])


def list_folders(directory: Path) -> list[Sample]:
    """Samples of DIR/<class>/**/*.jpg, without hidden folders and files. UserError: a class folder without image."""
    samples: list[Sample] = []
    for folder in sorted(Path(entry.path) for entry in _entries(directory) if entry.is_dir()):
        images = list_images(folder)
        if not images:
            raise UserError(
                f"the class folder {folder} holds no image",
                allowed=f"files with an ending of {', '.join(IMAGE_SUFFIXES)}",
                fix="put the images of the class there, or remove the folder",
            )
        samples += (
            Sample(file.relative_to(directory).as_posix(), folder.name, FileSpan.of_file(file)) for file in images
        )
    return samples


def list_images(folder: Path) -> list[Path]:
    """Image files anywhere below `folder`, sorted, without hidden folders and files. Linked folders are followed.

    Each folder is listed once, and a link to a folder above is not followed: links in a circle end. UserError: a link
    that leads nowhere, a folder that cannot be read.
    """
    above = {*folder.resolve().parents, folder.parent.resolve(), *folder.parent.resolve().parents}
    images, waiting, listed = [], [folder], {_identity(parent.stat()) for parent in above}
    while waiting:
        current = waiting.pop()
        if (identity := _identity(current.stat())) in listed:
            continue
        listed.add(identity)
        for entry in _entries(current):
            if entry.is_dir():
                waiting.append(Path(entry.path))
            elif os.path.splitext(entry.name)[1][1:].lower() in IMAGE_SUFFIXES and entry.is_file():
                images.append(Path(entry.path))
    return sorted(images)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name, without hidden names. UserError: see list_images."""
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        fix = "give this user the right to read it, or remove it"
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}", fix=fix) from None
    for entry in visible:
        if entry.is_symlink() and not os.path.exists(entry.path):
            problem = f"{entry.path} is a link that leads nowhere: to {os.readlink(entry.path)}"
            raise UserError(problem, fix="restore what it leads to, or remove the link")
    return visible


def read_tar(path: Path) -> list[tuple[str, dict[str, FileSpan]]]:
    """The samples of one tar, in order: key, and members by suffix.

    Raises:
        UserError: the tar is damaged or cut, or members cannot be read in place, or are repeated or apart.
    """
    samples: list[tuple[str, dict[str, FileSpan]]] = []
    try:
        with open(path, "rb") as file:
            for member in tar_members(file, os.fstat(file.fileno()).st_size):
                key, suffix = split_name(member.name)
                if not key:
                    continue
                if member.problem:
                    raise member.problem
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                if suffix in samples[-1][1]:
                    problem = f"{path}: the sample {key!r} has two members .{suffix}"
                    raise UserError(problem, allowed="one of each suffix")
                samples[-1][1][suffix] = FileSpan(path, member.begin, member.end - member.begin)
    except TarFault as error:
        raise UserError(f"{path}: {error.reason}: {error.detail}", fix=error.fix or _SHARD_FIX) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read to its end: {error}", fix=_SHARD_FIX) from None
    _check_adjacent(path, samples)
    return samples


def _check_adjacent(path: Path, samples: list[tuple[str, dict[str, FileSpan]]]) -> None:
    first: dict[str, dict[str, FileSpan]] = {}
    for key, fields in samples:
        if first.setdefault(key, fields).keys().isdisjoint(fields):
            problem = f"{path}: members of the sample {key!r} are apart: {', '.join(first[key])}; {', '.join(fields)}"
            raise UserError(problem, allowed=ADJACENT, fix=SORT_FIX)


def image_member(path: Path, key: str, fields: dict[str, FileSpan]) -> FileSpan:
    """The one image among the members of a sample."""
    images = [member for suffix, member in fields.items() if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise UserError(
            f"{path}: the sample {key!r} has {len(images)} images (members: {', '.join(fields)})",
            allowed=f"one member with a suffix of {', '.join(IMAGE_SUFFIXES)}",
        )
    return images[0]


def _shard_samples(path: Path, class_key: str | None) -> list[Sample]:
    return [
        Sample(f"{path.name}/{key}", _class_of(path, key, fields, class_key), image_member(path, key, fields))
        for key, fields in read_tar(path)
    ]


def _class_of(path: Path, key: str, fields: dict[str, FileSpan], class_key: str | None) -> str:
    """`class_key` in <key>.json: a string, or a whole number as its digits. None: the text of <key>.cls, or `class`."""
    where, name = f"{path}: the sample {key!r}", class_key or "class"
    from_cls = class_key is None and "cls" in fields
    member = fields.get("cls" if from_cls else "json")
    if member is None:
        allowed = f'<key>.json with {{"{name}": "name"}}' + ("" if class_key else ", or <key>.cls")
        raise UserError(f"{where} has no json", allowed=allowed, fix=_CLASS_FIX)
    try:
        content = {name: member.read().decode().strip()} if from_cls else json.loads(member.read())
    except ValueError as error:  # both JSON and UTF-8 faults
        raise UserError(f"{where} has a json that cannot be read: {error}", fix=_CLASS_FIX) from None
    label = content.get(name) if isinstance(content, dict) else None
    if not is_class(label):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        classes = [other for other, value in content.items() if is_class(value)] if isinstance(content, dict) else []
        close = get_close_matches(name, classes, 1)
        raise UserError(
            f"{where} has no class in its json: `{name}` is {label!r}, the json holds {keys}",
            allowed=f"a key `{name}` with a name or a whole number"
            + (f"; this json has {', '.join(classes)}" if classes else ""),
            fix=f"--class-key {close[0]}" if close else f"{_CLASS_FIX}; or name another key: --class-key NAME",
        )
    return str(label)


def is_class(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


# Test images that are also in the training part, found by their bytes, whatever their names: an error in the user's own
# data; only reported in published data, which keep them.


class Overlap(NamedTuple):
    """The number of test images that are also in the training part, and both keys of the first."""

    images: int
    test_key: str
    train_key: str


def check_overlap(name: str, train: Images, test: Images, cache: Path | None, *, published: bool) -> int:
    """How many test images of the data set `name` are also in the training part; an error unless it is `published`.

    `cache`: a folder that keeps the result.
    """
    overlap = _find_overlap(train, test, cache)
    if overlap.images and published:
        message = "test images are training images too, as published; the result reports the number"
        print(f"{visible(name)}: {overlap.images} {message}", flush=True)
    elif overlap.images:
        first = f"{overlap.test_key} of {test.directory} is {overlap.train_key} of {train.directory}, byte by byte"
        raise UserError(
            f"{overlap.images} of {len(test)} test images are training images too, the first: {first}",
            allowed="a test part without images of the training part",
            fix="remove them from one of the two parts",
        )
    return overlap.images


def _find_overlap(train: Images, test: Images, cache: Path | None) -> Overlap:
    """Compare by SHA-256; kept in the cache under the image fingerprints and file states of both parts."""
    key = fingerprint([part.image_fingerprint + part.state for part in (train, test)])
    file = cache / f"overlap-{key}.json" if cache else None
    if file and file.is_file():
        return Overlap(**json.loads(file.read_bytes()))
    sizes = [{image.size_bytes for image in part.encoded} for part in (train, test)]
    # Equal images have equal sizes: others need not be read, unless sizes are unknown (Parquet).
    compared = sizes[0] & sizes[1] if -1 not in sizes[0] | sizes[1] else sizes[0] | sizes[1]
    rows = dict(_digests(train, compared))
    pairs = [(row, rows[digest]) for digest, row in _digests(test, compared) if digest in rows]
    twins = [(test.keys[row], train.keys[train_row]) for row, train_row in pairs]
    overlap = Overlap(len(twins), *(twins[0] if twins else ("", "")))
    if file:
        write_json(file, overlap._asdict())
    return overlap


def equal_images(parts: Sequence[Images]) -> np.ndarray:
    """Numbers 0, 1, ... that images with equal bytes share, for the images of all parts in order: int64 [N]."""
    counts = Counter(image.size_bytes for part in parts for image in part.encoded)
    compared = {size for size, count in counts.items() if count > 1 or -1 in counts}
    numbers, begin, first = np.arange(sum(map(len, parts))), 0, dict[bytes, int]()
    for part in parts:
        for digest, row in _digests(part, compared):
            numbers[begin + row] = first.setdefault(digest, begin + row)
        begin += len(part)
    return np.unique(numbers, return_inverse=True)[1]


def _digests(part: Images, sizes: set[int]) -> list[tuple[bytes, int]]:
    """SHA-256 and row of the images of these sizes."""
    rows = [row for row, image in enumerate(part.encoded) if image.size_bytes in sizes]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda row: hashlib.sha256(part.encoded[row].read()).digest(), rows)
        return list(zip(digests, rows, strict=True))
