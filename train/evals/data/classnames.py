"""Class names and templates for zero-shot: the data's own, a file's, or ImageNet's as open_clip ships them.

names file       a line for every class, in the order of their numbers; or `class<TAB>name` in any order
templates file   a line for every template, `{}` where the name goes
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from labels.storage import UserError, sha256_file
from train.evals.data.images import shorten
from train.evals.data.sets import DataSet


def class_names(source: str, data: DataSet) -> list[str]:
    """One name for every class of `data`, in the order of their numbers.

    Args:
        source: `auto` (the data's own; for imagenet: data ImageNet's), `imagenet`, or the path of a file.

    Raises:
        UserError: a file that is missing, or names that do not match the classes.
    """
    if source == "imagenet" or (source == "auto" and data.kind == "imagenet"):
        names = list(_metadata().IMAGENET_CLASSNAMES)
        if len(names) != len(data.classes):
            raise UserError(
                f"{data.name} has {len(data.classes)} classes, ImageNet's names are {len(names)}",
                allowed="ImageNet-1k's classes, numbered by their sorted wnids",
                fix="--classnames FILE with a line for every class",
            )
        return names
    if source == "auto":
        return list(data.names)
    lines = _lines(Path(source), "class names")
    if any("\t" in line for line in lines):
        return _by_class(Path(source), lines, data)
    if len(lines) != len(data.classes):
        raise UserError(
            f"{source} has {len(lines)} names, {data.name} has {len(data.classes)} classes: {shorten(data.classes)}",
            allowed="a line for every class, in the order of their numbers; or lines of class<TAB>name",
            fix="write one name for every class",
        )
    return lines


def templates(source: str) -> list[str]:
    """Templates with `{}` in the place of the name.

    Args:
        source: `none` (the bare name), `openai` (the 80 for ImageNet), or the path of a file.

    Raises:
        UserError: a file that is missing, or a line without `{}`.
    """
    if source == "none":
        return ["{}"]
    if source == "openai":
        makers: list[Callable[[str], str]] = list(_metadata().OPENAI_IMAGENET_TEMPLATES)
        return [make("{}") for make in makers]
    lines = _lines(Path(source), "templates")
    without = [line for line in lines if "{}" not in line]
    if without:
        raise UserError(
            f"{source}: {len(without)} templates have no {{}}, the first: {without[0]!r}", allowed="a photo of a {}."
        )
    return lines


def told(source: str) -> str:
    """The source in a word for results; of a file with its fingerprint, since its content decides them."""
    return f"{source} ({sha256_file(Path(source))[:16]})" if Path(source).is_file() else source


def _by_class(file: Path, lines: list[str], data: DataSet) -> list[str]:
    pairs = [line.split("\t", 1) for line in lines]
    names = {label.strip(): rest[0].strip() for label, *rest in pairs if rest and rest[0].strip()}
    missing, unknown = [label for label in data.classes if label not in names], sorted(set(names) - set(data.classes))
    if missing or unknown:
        parts = {"classes have no name": missing, "names are of no class": unknown}
        told = "; ".join(f"{len(found)} {what}: {shorten(found)}" for what, found in parts.items() if found)
        raise UserError(
            f"{file} does not match the classes of {data.name}: {told}",
            allowed=f"the classes {shorten(data.classes)}",
            fix="write a line class<TAB>name for every class, spelt as the data spell it",
        )
    return [names[label] for label in data.classes]


def _lines(file: Path, what: str) -> list[str]:
    if not file.is_file():
        raise UserError(f"no file of {what} at {file}", fix="fix the path")
    lines = [line.strip() for line in file.read_text(encoding="utf8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty", allowed=f"a line for each of the {what}")
    return lines


def _metadata() -> Any:
    try:
        from open_clip import zero_shot_metadata
    except ImportError:
        fix = "pip install 'superclass-lean[evals]', or give a file"
        raise UserError(
            "ImageNet's class names and templates come with open_clip, which is not installed", fix=fix
        ) from None
    return zero_shot_metadata
