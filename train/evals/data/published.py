"""What the readers of published data sets share: the two parts as they are found, and the counts that a whole copy has."""

from pathlib import Path
from typing import Any, NamedTuple

from labels.errors import UserError
from train.evals.data.images import Sample


class Parts(NamedTuple):
    """Both parts of a data set, its classes in the order of their numbers, and what people call them."""

    train: list[Sample]
    test: list[Sample]
    classes: tuple[str, ...]
    names: tuple[str, ...]


class Counts(NamedTuple):
    """Images and classes of a whole copy."""

    train: int
    test: int
    classes: int


def check_counts(name: str, directory: Path, parts: Parts, counts: Counts) -> Parts:
    """`parts`, if they are all there.

    Raises:
        UserError: other numbers than the published ones.
    """
    found = Counts(len(parts.train), len(parts.test), len(parts.classes))
    if found != counts:
        raise UserError(
            f"{directory} holds {_tell(found)}",
            allowed=f"{name} as published: {_tell(counts)}",
            mend="fetch or unpack what is missing; a part of it is named as class folders: --data folders:DIR, or --train DIR --test DIR",
        )
    return parts


def first_file(directory: Path, *candidates: str) -> Path | None:
    """The first of some paths below `directory` that is a file."""
    return next((directory / candidate for candidate in candidates if (directory / candidate).is_file()), None)


def missing(name: str, directory: Path, wanted: str) -> UserError:
    """The error for a layout that is not there."""
    return UserError(f"{directory} is not {name} as it is downloaded: {wanted} is missing", mend="mend the path given to --data")


def read_mat(path: Path) -> dict[str, Any]:
    """A MATLAB file, by SciPy, structures as objects with attributes.

    Raises:
        UserError: SciPy is not installed, or the file is damaged.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise UserError(f"{path} is a MATLAB file, and SciPy is not installed", mend="pip install 'superclass-lean[evals]'") from None
    try:
        return loadmat(str(path), squeeze_me=True, struct_as_record=False)
    except (MatReadError, OSError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path} is not readable as a MATLAB file: {error}", mend="fetch it again") from None


def _tell(counts: Counts) -> str:
    return f"{counts.train:,} training images, {counts.test:,} test images, {counts.classes:,} classes"
