"""A data set with both parts, from `--data KIND:DIR` or from the two folders of `--train` and `--test`; checked before it is used.

imagenet:DIR  pets:DIR  cars:DIR    published data sets as they are downloaded; class names and counts are checked
folders:DIR   DIR/train/<class>/*.jpg, DIR/{test,val}/<class>/*.jpg
shards:DIR    DIR/train/*.tar, DIR/{test,val}/*.tar, the class in each sample's json or cls
parquet:DIR   DIR/train*.parquet, DIR/{test,val}*.parquet, also below DIR/data: image bytes and classes
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.errors import UserError
from train.evals.data.cars import read_cars
from train.evals.data.imagenet import read_imagenet
from train.evals.data.images import LabelledImages, Sample, class_order, shorten
from train.evals.data.listing import list_samples, list_tars
from train.evals.data.overlap import check_overlap
from train.evals.data.parquet import list_parquet
from train.evals.data.pets import read_pets
from train.evals.data.published import Parts

_TEST_NAMES = ("test", "val", "validation")


@dataclass(frozen=True)
class DataSet:
    """Both parts of a data set. The test part is for the last figure alone: no choice may look at it.

    name: as the user gave it. kind: the word before the colon, or `folders`. names: what people call the classes, for zero-shot.
    overlap: test images that the training part holds too; not 0 in published data sets alone, where it belongs to the data.
    """

    name: str
    kind: str
    train: LabelledImages
    test: LabelledImages
    names: tuple[str, ...]
    overlap: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number."""
        return self.train.classes

    def describe(self) -> dict[str, Any]:
        """What a result JSON says of the data."""
        return {
            "data": self.name,
            "classes": list(self.classes),
            "train": self.train.describe(),
            "test": self.test.describe(),
            "test_images_in_train": self.overlap,
        }


def load_data(spec: str, cache: Path | None = None) -> DataSet:
    """The data set that `KIND:DIR` names. No image is decoded.

    Args:
        cache: a folder that keeps what took long to find.

    Raises:
        UserError: an unknown kind, a layout that is not there, counts that are not the published ones, and all of `load_pair`.
    """
    kind, _, value = spec.partition(":")
    if kind not in _KINDS or not value:
        kinds = ", ".join(f"{name}:DIR" for name in _KINDS)
        raise UserError(f"--data {spec!r} is no known kind of data", allowed=kinds, mend="name the kind, or give --train DIR --test DIR")
    directory = Path(value)
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", mend="mend the path given to --data")
    return _checked(spec, kind, directory, directory, _KINDS[kind](directory), cache)


def load_pair(train_dir: Path, test_dir: Path, cache: Path | None = None) -> DataSet:
    """Both parts from two folders, each with class folders or shards. No image is decoded.

    Raises:
        UserError: a directory is missing or empty, a sample has no class or no image, a tar is damaged, a key comes twice, the training
            part has one class only, the test part has a class that the training part lacks, or an image is in both.
    """
    parts = _named_by_class(list_samples(train_dir), list_samples(test_dir), None)
    return _checked(f"{train_dir} and {test_dir}", "folders", train_dir, test_dir, parts, cache)


def _checked(name: str, kind: str, train_dir: Path, test_dir: Path, parts: Parts, cache: Path | None) -> DataSet:
    train = LabelledImages.of(train_dir, parts.train, parts.classes)
    if len(parts.classes) == 1:
        raise UserError(
            f"{train_dir} holds one class only: {parts.classes[0]!r}",
            allowed="two classes or more",
            mend="give a folder for every class, or shards whose json has a key `class`",
        )
    unknown = sorted({sample.label for sample in parts.test} - set(parts.classes))
    if unknown:
        raise UserError(
            f"{test_dir} has {len(unknown)} classes that {train_dir} lacks: {shorten(unknown)}",
            allowed=f"the {len(parts.classes)} classes of the training part: {shorten(parts.classes)}",
            mend="give two parts of one data set, or leave these classes out of the test part",
        )
    test = LabelledImages.of(test_dir, parts.test, parts.classes)
    overlap = check_overlap(name, train, test, cache, published=kind in _PUBLISHED)
    return DataSet(name, kind, train, test, parts.names, overlap)


def _named_by_class(train: list[Sample], test: list[Sample], classes: tuple[str, ...] | None) -> Parts:
    classes = classes or class_order(sample.label for sample in train)
    return Parts(train, test, classes, tuple(name.replace("_", " ") for name in classes))


def _two_folders(directory: Path) -> Parts:
    return _named_by_class(list_samples(directory / "train"), list_samples(_test_part(directory)), None)


def _two_shard_folders(directory: Path) -> Parts:
    test = _test_part(directory)
    for folder in (directory / "train", test):
        if not list_tars(folder):
            raise UserError(f"{folder} holds no tar", allowed="DIR/train/*.tar, and DIR/test/*.tar or DIR/val/*.tar")
    return _two_folders(directory)


def _parquet_files(directory: Path) -> Parts:
    root = directory if list(directory.glob("*.parquet")) else directory / "data"
    train, names = list_parquet(sorted(root.glob("train*.parquet")))
    test_name = next((name for name in _TEST_NAMES if list(root.glob(f"{name}*.parquet"))), None)
    if not train or test_name is None:
        raise UserError(
            f"{directory} holds {'no training rows' if not train else 'no test files'}",
            allowed="train*.parquet with test*.parquet or val*.parquet, in DIR or DIR/data",
            mend="mend the path given to --data",
        )
    return _named_by_class(train, list_parquet(sorted(root.glob(f"{test_name}*.parquet")))[0], names)


def _test_part(directory: Path) -> Path:
    for name in _TEST_NAMES:
        if (directory / name).is_dir():
            return directory / name
    raise UserError(f"{directory} has no test part", allowed=f"one of the folders {', '.join(_TEST_NAMES)} beside train")


_PUBLISHED: dict[str, Callable[[Path], Parts]] = {"imagenet": read_imagenet, "pets": read_pets, "cars": read_cars}
_KINDS: dict[str, Callable[[Path], Parts]] = {
    **_PUBLISHED,
    "folders": _two_folders,
    "shards": _two_shard_folders,
    "parquet": _parquet_files,
}
