"""Images as they are on disk: found and checked here, decoded later (train/evals/features.py).

    DIR/<class>/**/*.jpg                      folders: the folder's name is the class, the path the key
    DIR/*.tar or DIR/shards/*.tar             shards: <key>.jpg with <key>.cls or <key>.json ({"class": ...})
    *.parquet                                 image bytes and classes, as Hugging Face's hub keeps them

Each reader gives `Sample`s: key, class name and an `EncodedImage`, which reads its bytes later. `LabelledImages` and
`CaptionedImages` are one part (train or test) of a data set. `check_overlap` finds test images in the training part.
N samples, C classes.
"""

import hashlib
import json
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels.storage import UserError, fingerprint, write_json

IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
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
    keys: list[str]
    encoded: Sequence[EncodedImage]
    fingerprint: (
        str  # SHA-256 of the sorted (key, class or captions, size), 16 hex digits: independent of the directory
    )
    modified_ns: int  # newest modification time of the files: changes that the fingerprint cannot see

    def __len__(self) -> int:
        return len(self.encoded)

    def describe(self) -> dict[str, Any]:
        """The part's entry in a result JSON."""
        return {"directory": str(self.directory), "samples": len(self), "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class LabelledImages(Images):
    """One part of a data set with classes."""

    targets: np.ndarray  # int64 [N], in [0, C)
    classes: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, samples: Sequence[Sample], classes: tuple[str, ...]) -> Self:
        """Number the classes and check that no key comes twice."""
        number = {name: index for index, name in enumerate(classes)}
        targets = np.array([number[sample.label] for sample in samples], dtype=np.int64)
        return cls(**_image_fields(directory, samples), targets=targets, classes=classes)

    def describe(self) -> dict[str, Any]:
        """As for `Images`, with the samples per class."""
        counts = np.bincount(self.targets, minlength=len(self.classes)).tolist()
        return super().describe() | {"samples_per_class": dict(zip(self.classes, counts, strict=True))}


@dataclass(frozen=True)
class CaptionedImages(Images):
    """One part of a captioned data set."""

    captions: list[list[str]]  # one or more for each image, in the file's order

    @classmethod
    def of(cls, directory: Path, samples: Sequence[tuple[str, list[str], EncodedImage]]) -> Self:
        """From (key, captions, image); checks that no key comes twice."""
        return cls(**_image_fields(directory, samples), captions=[captions for _, captions, _ in samples])

    def describe(self) -> dict[str, Any]:
        """As for `Images`, with the number of captions."""
        return super().describe() | {"captions": sum(map(len, self.captions))}


def _image_fields(directory: Path, samples: Sequence[tuple[str, Any, EncodedImage]]) -> dict[str, Any]:
    """The fields of `Images` from (key, class or captions, image)."""
    key, count = Counter(key for key, _, _ in samples).most_common(1)[0]
    if count > 1:
        raise UserError(f"{directory} has the key {key!r} {count} times", allowed="each key once, its members adjacent")
    rows = sorted(json.dumps([key, content, image.size_bytes]) for key, content, image in samples)
    return {
        "directory": directory,
        "keys": [key for key, _, _ in samples],
        "encoded": [image for _, _, image in samples],
        "fingerprint": hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16],
        "modified_ns": max(path.stat().st_mtime_ns for path in {image.path for _, _, image in samples}),
    }


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their numbers: whole numbers first, by value, then names by code point."""
    key = lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)  # noqa: E731
    return tuple(sorted(set(labels), key=key))


def shorten(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# -- folders by class, and shards


def list_samples(directory: Path) -> list[Sample]:
    """Every labelled image below `directory`, in sorted order, whichever of the two layouts it has."""
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", allowed=_LAYOUTS, fix="fix the path of the data")
    tars = list_tars(directory)
    samples = [sample for tar in tars for sample in _shard_samples(tar)] if tars else list_folders(directory)
    if not samples:
        fix = "fix the path of the data; images directly in DIR have no class"
        raise UserError(f"{directory} holds no labelled image", allowed=_LAYOUTS, fix=fix)
    return samples


def list_tars(directory: Path) -> list[Path]:
    """DIR/*.tar, or else DIR/shards/*.tar, sorted."""
    return sorted(directory.glob("*.tar")) or sorted((directory / "shards").glob("*.tar"))


def list_folders(directory: Path) -> list[Sample]:
    """Samples of DIR/<class>/**/*.jpg, without hidden folders and files."""
    return [
        Sample(file.relative_to(directory).as_posix(), folder.name, FileSpan.of_file(file))
        for folder in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
        for file in list_images(folder)
    ]


def list_images(folder: Path) -> list[Path]:
    """Image files anywhere below `folder`, sorted."""
    files = (file for file in sorted(folder.rglob("*")) if file.suffix[1:].lower() in IMAGE_SUFFIXES)
    return [file for file in files if not file.name.startswith(".") and file.is_file()]


def tar_members(path: Path) -> Iterator[tuple[tarfile.TarFile, str, dict[str, tarfile.TarInfo]]]:
    """The samples of one tar, in order: the open tar, key, members by ending. The key ends at a basename's first dot.

    Raises UserError wherever the tar is damaged or cut.
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
                        problem = f"{path}: the sample {key!r} has two members .{ending}"
                        raise UserError(problem, allowed="one of each ending")
                yield tar, key, fields
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read to its end: {error}", fix=_SHARD_FIX) from None


def image_member(path: Path, key: str, fields: dict[str, tarfile.TarInfo]) -> FileSpan:
    """The one image among the members of a sample."""
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
    """A tar ends with blocks of zeros. tarfile does not notice when it was cut between two members."""
    with open(path, "rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            problem = f"{path} is cut or damaged at byte {tar.offset:,}: no end-of-archive block there"
            raise UserError(problem, allowed="a whole tar", fix=_SHARD_FIX)


def _class_of(tar: tarfile.TarFile, path: Path, key: str, fields: dict[str, tarfile.TarInfo]) -> str:
    """The text of <key>.cls, or `class` in <key>.json: a string, or a whole number as its digits."""
    where = f"{path}: the sample {key!r}"
    member = fields.get("cls") or fields.get("json")
    file = tar.extractfile(member) if member else None
    if file is None:
        allowed = '<key>.json with {"class": "name"}, or <key>.cls'
        raise UserError(f"{where} has no json", allowed=allowed, fix=_CLASS_FIX)
    try:
        content = {"class": file.read().decode().strip()} if "cls" in fields else json.loads(file.read())
    except ValueError as error:  # both JSON and UTF-8 faults
        raise UserError(f"{where} has a json that cannot be read: {error}", fix=_CLASS_FIX) from None
    label = content.get("class") if isinstance(content, dict) else None
    if not _is_class(label):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{where} has no class in its json: `class` is {label!r}, the json holds {keys}",
            allowed="a key `class` with a name or a whole number",
            fix=_CLASS_FIX,
        )
    return str(label)


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _split_key(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


# Parquet: an image column, binary or struct<bytes: binary, ...>, and a class column, text or whole numbers, which the
# file's own `huggingface` metadata may name

_IMAGE_COLUMNS, _CLASS_COLUMNS = ("image", "img", "jpg"), ("label", "class", "fine_label")
_GROUPS_HELD = 4  # row groups of encoded images in memory: threads read neighbouring rows
_reading = threading.Lock()


class ParquetCell(NamedTuple):
    """Row `row` of a row group; `column` is the leaf that holds the bytes, e.g. `image.bytes`."""

    path: Path
    group: int
    row: int
    column: str

    @property
    def size_bytes(self) -> int:
        """Unknown before it is read."""
        return -1

    def read(self) -> bytes:
        """The encoded image."""
        with _reading:  # else all threads would read the same new group
            values = _read_group(self.path, self.path.stat().st_mtime_ns, self.group, self.column)
        return values[self.row].as_py() or b""


@lru_cache(_GROUPS_HELD)
def _read_group(path: Path, modified_ns: int, group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(path) as file:
        values = file.read_row_group(group, columns=[column]).column(0)
    return pa.chunked_array([chunk.field("bytes") for chunk in values.chunks]) if "." in column else values


def list_parquet(files: list[Path]) -> tuple[list[Sample], tuple[str, ...] | None]:
    """Every labelled image of Parquet files of one schema, and the classes in order if the files name them.

    Only the class column is read.
    """
    samples: list[Sample] = []
    names: tuple[str, ...] | None = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                image, label = _columns(path, schema)
                names = _class_names(schema, label) or names
                for group in range(file.num_row_groups):
                    for row, value in enumerate(file.read_row_group(group, columns=[label]).column(0).to_pylist()):
                        name, cell = _class_name(path, row, value, names), ParquetCell(path, group, row, image)
                        samples.append(Sample(f"{path.name}/{len(samples)}", name, cell))
        except (pa.ArrowException, OSError) as error:
            fix = "fetch or write this file again"
            raise UserError(f"{path} is not readable as Parquet: {error}", fix=fix) from None
    return samples, names


def _columns(path: Path, schema: pa.Schema) -> tuple[str, str]:
    """The leaf of the image bytes, and the class column."""
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in _CLASS_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise UserError(
            f"{path} has the columns {', '.join(schema.names)}",
            allowed=f"an image column ({', '.join(_IMAGE_COLUMNS)}) and a class column ({', '.join(_CLASS_COLUMNS)})",
            fix="rename the columns",
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{image}.bytes", label
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{path}: the column {image} is of type {kind}", allowed="binary, or a struct with `bytes`")
    return image, label


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The names that Hugging Face's metadata gives to the numbers of a class column."""
    try:
        features: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (ValueError, LookupError, TypeError):
        return None


def _class_name(path: Path, row: int, value: Any, names: tuple[str, ...] | None) -> str:
    if isinstance(value, int) and names is not None:
        if 0 <= value < len(names):
            return names[value]
        allowed = f"0 to {len(names) - 1}, which the file names"
        raise UserError(f"{path} has the class {value} in row {row}", allowed=allowed)
    if not _is_class(value):
        raise UserError(f"{path} has no class in row {row}: {value!r}", allowed="a name or a whole number")
    return str(value)


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
        print(f"{name}: {overlap.images} {message}", flush=True)
    elif overlap.images:
        first = f"{overlap.test_key} of {test.directory} is {overlap.train_key} of {train.directory}, byte by byte"
        raise UserError(
            f"{overlap.images} of {len(test)} test images are training images too, the first: {first}",
            allowed="a test part without images of the training part",
            fix="remove them from one of the two parts",
        )
    return overlap.images


def _find_overlap(train: Images, test: Images, cache: Path | None) -> Overlap:
    """Compare by SHA-256; kept in the cache under the fingerprints and times of both parts."""
    key = fingerprint([part.fingerprint + str(part.modified_ns) for part in (train, test)])
    file = cache / f"overlap-{key}.json" if cache else None
    if file and file.is_file():
        return Overlap(**json.loads(file.read_bytes()))
    sizes = [{image.size_bytes for image in part.encoded} for part in (train, test)]
    # Equal images have equal sizes: others need not be read, unless sizes are unknown (Parquet).
    compared = sizes[0] & sizes[1] if -1 not in sizes[0] | sizes[1] else sizes[0] | sizes[1]
    train_keys = dict(_digests(train, compared))
    twins = [(key, train_keys[digest]) for digest, key in _digests(test, compared) if digest in train_keys]
    overlap = Overlap(len(twins), *(twins[0] if twins else ("", "")))
    if file:
        write_json(file, overlap._asdict())
    return overlap


def _digests(part: Images, sizes: set[int]) -> list[tuple[bytes, str]]:
    """SHA-256 and key of the images of these sizes."""
    rows = [row for row, image in enumerate(part.encoded) if image.size_bytes in sizes]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda row: hashlib.sha256(part.encoded[row].read()).digest(), rows)
        return [(digest, part.keys[row]) for digest, row in zip(digests, rows, strict=True)]
