"""`--data KIND:DIR`, or `--train DIR --test DIR`, as a `DataSet` with both parts. No image is decoded.

imagenet:DIR  pets:DIR  cars:DIR    published data sets as they are downloaded; class names and counts are checked
folders:DIR   DIR/train/<class>/*.jpg, DIR/{test,val}/<class>/*.jpg
shards:DIR    DIR/train/*.tar, DIR/{test,val}/*.tar, the class in each sample's json or cls; or `class_key` of the json
parquet:DIR   DIR/train*.parquet, DIR/{test,val}*.parquet, also below DIR/data: image bytes and classes

A reader of a kind gives `Parts`; `_checked` numbers the classes and finds test images in the training part.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labels.show.terminal import count
from labels.storage import UserError, local_path, printable, read_text
from train.evals.data.images import (
    FileSpan,
    LabelledImages,
    Sample,
    check_overlap,
    class_order,
    equal_images,
    list_folders,
    list_images,
    list_samples,
    list_tars,
    shorten,
)
from train.evals.data.parquet import list_parquet

_TEST_NAMES = ("test", "val", "validation")


@dataclass(frozen=True)
class DataSet:
    """Both parts of a data set. The test part is for the final score alone: nothing is chosen on it."""

    name: str  # as the user gave it
    kind: str  # the word before the colon, or `folders`
    train: LabelledImages
    test: LabelledImages
    names: tuple[str, ...]  # readable class names, for zero-shot
    overlap: int  # test images that are also in the training part: 0 but in published data sets
    class_key: str | None = None  # the key of each sample's json that is the class, if it was chosen

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number."""
        return self.train.classes

    @cached_property
    def groups(self) -> np.ndarray:
        """Numbers that images with equal bytes share, training part first: int64 [N]."""
        return equal_images([self.train, self.test])

    def describe(self) -> dict[str, Any]:
        """The data's entries in a result JSON."""
        return {
            "data": self.name,
            "class_key": self.class_key,
            "classes": list(self.classes),
            "train": self.train.describe(),
            "test": self.test.describe(),
            "test_images_in_train": self.overlap,
        }


class Parts(NamedTuple):
    """Both parts of a data set, its classes in the order of their numbers, and their readable names."""

    train: list[Sample]
    test: list[Sample]
    classes: tuple[str, ...]
    names: tuple[str, ...]


def load_data(spec: str, cache: Path | None = None, class_key: str | None = None) -> DataSet:
    """The data set that `KIND:DIR` names. `cache`: a folder that keeps the comparison of the parts; `class_key`: the
    key of each sample's json that is the class, in shards.
    """
    kind, _, value = spec.partition(":")
    if kind not in _KINDS or not value:
        allowed, fix = ", ".join(f"{name}:DIR" for name in _KINDS), "name the kind, or give --train DIR --test DIR"
        raise UserError(f"--data {spec!r} is no known kind of data", allowed=allowed, fix=fix)
    directory = local_path(value)
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", fix="fix the path given to --data")
    if kind in _TWO_FOLDERS:
        parts = _TWO_FOLDERS[kind](directory, class_key)
    elif class_key is None:
        parts = _KINDS[kind](directory)
    else:
        raise UserError(f"--class-key {class_key} with {spec}", allowed="shards:DIR", fix="omit it, or give shards")
    return _checked(spec, kind, directory, directory, parts, cache, class_key)


def load_pair(train_dir: Path, test_dir: Path, cache: Path | None = None, class_key: str | None = None) -> DataSet:
    """Both parts from two folders, each with class folders or shards; the rest as for `load_data`."""
    parts = _named_by_class(list_samples(train_dir, class_key), list_samples(test_dir, class_key), None)
    return _checked(f"{train_dir} and {test_dir}", "folders", train_dir, test_dir, parts, cache, class_key)


def _checked(
    name: str, kind: str, train_dir: Path, test_dir: Path, parts: Parts, cache: Path | None, class_key: str | None
) -> DataSet:
    name += f", {class_key}" if class_key else ""
    train = LabelledImages.of(train_dir, "training", parts.train, parts.classes)
    if len(parts.classes) == 1:
        raise UserError(
            f"{train_dir} holds one class only: {parts.classes[0]!r}",
            allowed="two classes or more",
            fix=f"give a folder for every class, or shards whose json has several values of `{class_key or 'class'}`",
        )
    known = set(parts.classes)
    unknown = {printable(sample.label): sample for sample in reversed(parts.test) if sample.label not in known}
    if unknown:
        first = printable(f"{unknown[min(unknown)].image.path}: {unknown[min(unknown)].key}")
        raise UserError(
            f"the test part of {printable(name)} has {len(unknown)} classes that its training part lacks: "
            f"{shorten(sorted(unknown))}; an image of the first: {first}",
            allowed=f"the {len(parts.classes)} classes of the training part: {shorten(parts.classes)}",
            fix="give two parts of one data set, or remove these classes from the test part",
        )
    test = LabelledImages.of(test_dir, "test", parts.test, parts.classes)
    overlap = check_overlap(printable(name), train, test, cache, published=kind in _PUBLISHED)
    return DataSet(printable(name), kind, train, test, tuple(map(printable, parts.names)), overlap, class_key)


def _named_by_class(train: list[Sample], test: list[Sample], classes: tuple[str, ...] | None) -> Parts:
    classes = classes or class_order(sample.label for sample in train)
    return Parts(train, test, classes, tuple(name.replace("_", " ") for name in classes))


# -- the user's own data


def _two_folders(directory: Path, class_key: str | None) -> Parts:
    train, test = (list_samples(folder, class_key) for folder in (directory / "train", _test_part(directory)))
    return _named_by_class(train, test, None)


def _two_shard_folders(directory: Path, class_key: str | None) -> Parts:
    for folder in (directory / "train", _test_part(directory)):
        if not list_tars(folder):
            raise UserError(f"{folder} holds no tar", allowed="DIR/train/*.tar, and DIR/test/*.tar or DIR/val/*.tar")
    return _two_folders(directory, class_key)


def _parquet_files(directory: Path) -> Parts:
    root = directory if list(directory.glob("*.parquet")) else directory / "data"
    train, names = list_parquet(sorted(root.glob("train*.parquet")))
    test = next((files for name in _TEST_NAMES if (files := sorted(root.glob(f"{name}*.parquet")))), None)
    if not train or test is None:
        raise UserError(
            f"{directory} holds {'no training rows' if not train else 'no test files'}",
            allowed="train*.parquet with test*.parquet or val*.parquet, in DIR or DIR/data",
            fix="fix the path given to --data",
        )
    return _named_by_class(train, list_parquet(test)[0], names)


def _test_part(directory: Path) -> Path:
    for name in _TEST_NAMES:
        if (directory / name).is_dir():
            return directory / name
    allowed = f"one of the folders {', '.join(_TEST_NAMES)} next to train"
    raise UserError(f"{directory} has no test part", allowed=allowed)


# -- published data sets


class Counts(NamedTuple):
    """Images and classes of a whole copy."""

    train: int
    test: int
    classes: int

    def __str__(self) -> str:
        images = f"{count(self.train, 'training image')}, {count(self.test, 'test image')}"
        return f"{images}, {count(self.classes, 'class', 'classes')}"


IMAGENET_1K = Counts(train=1_281_167, test=50_000, classes=1000)
PETS = Counts(train=3680, test=3669, classes=37)
CARS = Counts(train=8144, test=8041, classes=196)


def check_counts(name: str, directory: Path, parts: Parts, published: Counts) -> Parts:
    """`parts`, if they have the published numbers of images and classes."""
    counts = Counts(len(parts.train), len(parts.test), len(parts.classes))
    if counts != published:
        raise UserError(
            f"{directory} holds {counts}",
            allowed=f"{name} as published: {published}",
            fix="fetch or unpack what is missing; for a subset: --data folders:DIR, or --train DIR --test DIR",
        )
    return parts


def first_file(directory: Path, *candidates: str) -> Path | None:
    """The first of some paths below `directory` that is a file."""
    return next((directory / candidate for candidate in candidates if (directory / candidate).is_file()), None)


def missing(name: str, directory: Path, wanted: str) -> UserError:
    """The error for a layout that is not there."""
    problem = f"{directory} is not {name} as it is downloaded: {wanted} is missing"
    return UserError(problem, fix="fix the path given to --data")


def read_mat(path: Path) -> dict[str, Any]:
    """A MATLAB file, by SciPy; structures are objects with attributes."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        fix = "pip install 'superclass-lean[evals]'"
        raise UserError(f"{path} is a MATLAB file, and SciPy is not installed", fix=fix) from None
    try:
        return loadmat(str(path), squeeze_me=True, struct_as_record=False)
    except (MatReadError, OSError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path} is not readable as a MATLAB file: {error}", fix="fetch it again") from None


# Stanford Cars: cars_train/*.jpg, cars_test/*.jpg and the devkit's .mat files;
# or Kaggle's train/<make model year>/*.jpg, test/<make model year>/*.jpg below car_data/car_data

_FOLDER_ROOTS = (".", "car_data/car_data", "car_data")
_TEST_LISTS = ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")


def read_cars(directory: Path, counts: Counts = CARS) -> Parts:
    """Both parts, from whichever of the two layouts is there."""
    root = next((directory / root for root in _FOLDER_ROOTS if (directory / root / "train").is_dir()), None)
    if root is not None and (root / "test").is_dir():
        train, test = list_folders(root / "train"), list_folders(root / "test")
        classes = class_order(sample.label for sample in train)
    else:
        train, test, classes = _cars_devkit(directory)
    return check_counts("Stanford Cars", directory, Parts(train, test, classes, classes), counts)


def _cars_devkit(directory: Path) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    meta = first_file(directory, "devkit/cars_meta.mat", "cars_meta.mat")
    train = first_file(directory, "devkit/cars_train_annos.mat", "cars_train_annos.mat")
    test = first_file(directory, *_TEST_LISTS)
    if meta is None or train is None or test is None:
        files = {"devkit/cars_meta.mat": meta, "devkit/cars_train_annos.mat": train, _TEST_LISTS[0]: test}
        lacking = next(name for name, file in files.items() if file is None)
        raise missing("Stanford Cars", directory, f"{lacking} (or the folders train/ and test/)")
    classes = tuple(map(str, read_mat(meta)["class_names"]))
    train_part = _cars_part(directory / "cars_train", train, classes)
    return train_part, _cars_part(directory / "cars_test", test, classes), classes


def _cars_part(folder: Path, annotations: Path, classes: tuple[str, ...]) -> list[Sample]:
    samples = []
    for annotation in read_mat(annotations)["annotations"]:
        file = folder / str(annotation.fname)
        if not file.is_file():
            raise UserError(f"{file} is missing, which {annotations.name} names", fix=f"unpack {folder.name}.tgz again")
        samples.append(Sample(file.name, classes[int(getattr(annotation, "class")) - 1], FileSpan.of_file(file)))
    return samples


# ImageNet-1k: train/<wnid>/*.JPEG, and val/ in class folders or flat. The classes of a flat val/ come from the first of
#     LOC_val_solution.csv                              Kaggle's: image, wnid and boxes
#     ILSVRC2012_validation_ground_truth.txt, meta.mat  the devkit's: class numbers, and their wnids

_ROOTS = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_DEVKITS = (".", "data", "devkit", "devkit/data", "ILSVRC2012_devkit_t12/data")
_SYNSETS = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt")


def read_imagenet(directory: Path, counts: Counts = IMAGENET_1K) -> Parts:
    """Both parts; the validation part is the test part, as usual. Classes are wnids in sorted order."""
    root = next((directory / root for root in _ROOTS if (directory / root / "train").is_dir()), None)
    if root is None or not (root / "val").is_dir():
        raise missing("ImageNet-1k", directory, "train/<wnid>/*.JPEG with val/ next to it")
    train = list_folders(root / "train")
    classes = tuple(sorted({sample.label for sample in train}))
    test = list_folders(root / "val") or _flat_val(directory, root / "val")
    return check_counts("ImageNet-1k", directory, Parts(train, test, classes, _synsets(directory, classes)), counts)


def _flat_val(directory: Path, val: Path) -> list[Sample]:
    files = list_images(val)
    wnids = _kaggle_wnids(directory) or _devkit_wnids(directory, len(files))
    without = [file.name for file in files if file.stem not in wnids]
    if without:
        raise UserError(
            f"{len(without)} of {len(files)} images in {val} have no class, the first: {without[0]}",
            allowed="images named as in the list of classes: ILSVRC2012_val_00000001.JPEG and so on",
        )
    return [Sample(file.name, wnids[file.stem], FileSpan.of_file(file)) for file in files]


def _kaggle_wnids(directory: Path) -> dict[str, str]:
    """Image name without ending -> wnid."""
    file = first_file(directory, "LOC_val_solution.csv", "../LOC_val_solution.csv")
    if file is None:
        return {}
    wnids: dict[str, str] = {}
    for number, row in enumerate(csv.DictReader(read_text(file).splitlines()), start=2):
        image, boxes = row.get("ImageId"), (row.get("PredictionString") or "").split()
        if not image or not boxes:
            problem = f"{file}: line {number} has no image with a class: {printable(str(row))}"
            raise UserError(problem, allowed="ImageId,PredictionString with `wnid x y x y ...`", fix="fetch it again")
        wnids[image] = boxes[0]
    return wnids


def _devkit_wnids(directory: Path, images: int) -> dict[str, str]:
    """Line i of the ground truth is the class number of validation image i; meta.mat has the wnid of each number."""
    truth = first_file(directory, *(f"{folder}/ILSVRC2012_validation_ground_truth.txt" for folder in _DEVKITS))
    meta = first_file(directory, *(f"{folder}/meta.mat" for folder in _DEVKITS))
    if truth is None or meta is None:
        lacking = "ILSVRC2012_validation_ground_truth.txt" if truth is None else "meta.mat"
        raise UserError(
            f"{directory}/val is flat, and no file gives the classes of its images: {lacking} is missing",
            allowed="LOC_val_solution.csv in DIR, or the devkit (ILSVRC2012_devkit_t12/) in DIR, or val/<wnid>/*.JPEG",
            fix="unpack ILSVRC2012_devkit_t12.tar.gz into DIR",
        )
    wnid_of = {str(int(synset.ILSVRC2012_ID)): str(synset.WNID) for synset in read_mat(meta)["synsets"]}
    numbers = read_text(truth).split()
    if unknown := sorted({number for number in numbers if number not in wnid_of}):
        problem = f"{truth} has {len(unknown)} class numbers that {meta.name} lacks: {shorten(unknown)}"
        raise UserError(problem, allowed=f"1 to {len(wnid_of)}, one a line", fix="fetch it again")
    if len(numbers) != images:
        problem = f"{truth} has {len(numbers)} lines for {images} images"
        raise UserError(problem, allowed="a line for every image", fix="fetch both whole")
    return {f"ILSVRC2012_val_{index:08d}": wnid_of[number] for index, number in enumerate(numbers, start=1)}


def _synsets(directory: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each synset, where a list of synsets is there; else the wnid itself."""
    file = first_file(directory, *_SYNSETS)
    lines = read_text(file).split("\n") if file else []
    words = {line.partition(" ")[0]: line.partition(" ")[2].partition(",")[0].strip() for line in lines}
    return tuple(words.get(wnid) or wnid for wnid in classes)


# -- Oxford-IIIT Pets: images/*.jpg, and annotations/{trainval,test}.txt with image and class number


def read_pets(directory: Path, counts: Counts = PETS) -> Parts:
    """Both parts. A class is named as its images are (`Abyssinian_100` -> `Abyssinian`); its number is the list's."""
    order: dict[int, str] = {}
    train, test = (_pets_part(directory, f"annotations/{part}.txt", order) for part in ("trainval", "test"))
    classes = tuple(order[number] for number in sorted(order))
    names = tuple(name.replace("_", " ").lower() for name in classes)
    return check_counts("Oxford-IIIT Pets", directory, Parts(train, test, classes, names), counts)


def _pets_part(directory: Path, name: str, order: dict[int, str]) -> list[Sample]:
    file = directory / name
    if not file.is_file() or not (directory / "images").is_dir():
        raise missing("Oxford-IIIT Pets", directory, name if not file.is_file() else "images/")
    samples = []
    for line in read_text(file).split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        stem, number, *_ = *line.split(), ""
        label, image = stem.rpartition("_")[0], directory / "images" / f"{stem}.jpg"
        if not number.isdecimal() or order.setdefault(int(number), label) != label:
            problem = f"{file}: the line {line!r} gives no class, or another than before"
            raise UserError(problem, allowed="NAME_NUMBER CLASS ...")
        if not image.is_file():
            raise UserError(f"{image} is missing, which {name} names", fix="unpack images.tar.gz again")
        samples.append(Sample(image.name, label, FileSpan.of_file(image)))
    return samples


_PUBLISHED: dict[str, Callable[[Path], Parts]] = {"imagenet": read_imagenet, "pets": read_pets, "cars": read_cars}
_TWO_FOLDERS = {"folders": _two_folders, "shards": _two_shard_folders}  # these take a class key
_KINDS: dict[str, Callable[..., Parts]] = {**_PUBLISHED, **_TWO_FOLDERS, "parquet": _parquet_files}
