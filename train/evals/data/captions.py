"""Captioned data sets, `KIND:DIR`, as a `CaptionSet`.

coco:DIR       annotations/captions_{train,val}{2014,2017}.json, images in DIR/<part>/ or DIR/images/<part>/
karpathy:DIR   dataset_coco.json, images in DIR/{train,val}2014/; or dataset_flickr30k.json, images below DIR
flickr30k:DIR  dataset_flickr30k.json (Karpathy's splits), images in flickr30k-images/ or flickr30k_images/ or images/
pairs:DIR      DIR/{train,val,test}/*.tar: <key>.jpg with <key>.txt

A part is `train`, `val` or `test`; Karpathy's `restval` belongs to `train`, as usual.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from labels.storage import UserError, local_path
from train.evals.data.images import CaptionedImages, FileSpan, check_overlap, image_member, list_tars, tar_members
from train.evals.data.sets import first_file, missing

_IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", ".")
_PUBLISHED = ("coco", "karpathy", "flickr30k")


@dataclass(frozen=True)
class CaptionSet:
    """A captioned data set. The test part is for the final score alone: nothing is chosen on it."""

    name: str  # as results name it
    kind: str  # the word before the colon
    part: str  # which part `test` is
    test: CaptionedImages
    train: CaptionedImages | None  # None where the data have no such part
    cache: Path | None = None  # a folder that keeps the comparison of the parts

    @property
    def trained(self) -> CaptionedImages:
        """The training part; an error if there is none."""
        if self.train is None:
            problem = f"{self.name} has no training part"
            raise UserError(problem, allowed="data with a part `train`", fix="give the whole data set")
        return self.train

    @cached_property
    def overlap(self) -> int:
        """How many test images are also in the training part; an error in data that are not published so."""
        return check_overlap(self.name, self.trained, self.test, self.cache, published=self.kind in _PUBLISHED)

    def describe(self) -> dict[str, Any]:
        """The data's entries in a result JSON."""
        train = {} if self.train is None else {"train": self.train.describe()}
        return {"data": self.name, "part": self.part, **train, "test": self.test.describe()}


def load_caption_set(spec: str, cache: Path | None = None, part: str | None = None) -> CaptionSet:
    """The `part` of `KIND:DIR` to evaluate (None: `test`, or else `val`), and the training part if there is one."""
    parts = load_captions(spec)
    wanted = (part,) if part else ("test", "val")
    evaluated = next((name for name in wanted if name in parts), None)
    if evaluated is None:
        allowed = f"one named {' or '.join(wanted)}"
        raise UserError(
            f"--data {spec} has the parts {', '.join(parts)}", allowed=allowed, fix="fix the data, or --part"
        )
    kind, _, value = spec.partition(":")
    name = spec
    if kind == "karpathy":  # named by the images, so that tables show it next to published figures
        images = "coco" if (local_path(value) / "dataset_coco.json").is_file() else "flickr30k"
        name = f"{images}:{value}, Karpathy's splits"
    return CaptionSet(name, kind, evaluated, parts[evaluated], parts.get("train"), cache)


def load_captions(spec: str) -> dict[str, CaptionedImages]:
    """The parts of `KIND:DIR` by name."""
    kind, _, value = spec.partition(":")
    if kind not in CAPTION_KINDS or not value:
        allowed = ", ".join(f"{name}:DIR" for name in CAPTION_KINDS)
        raise UserError(f"--data {spec!r} names no captioned data", allowed=allowed)
    directory = local_path(value)
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", fix="fix the path given to --data")
    return CAPTION_KINDS[kind](directory)


def read_coco(directory: Path) -> dict[str, CaptionedImages]:
    """COCO captions: `train` and `val`, of 2017 or else of 2014."""
    parts = {}
    for part in ("train", "val"):
        file = first_file(directory, *(f"annotations/captions_{part}{year}.json" for year in (2017, 2014)))
        if file is None:
            continue
        content, name = _read_json(file), file.stem.removeprefix("captions_")
        captions: dict[int, list[str]] = {}
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        folders = (directory / name, directory / "images" / name)
        folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        images = [
            (image["file_name"], captions.get(image["id"], []), folder / image["file_name"])
            for image in content["images"]
        ]
        parts[part] = _captioned(directory, images)
    if not parts:
        raise missing("COCO captions", directory, "annotations/captions_{train,val}{2014,2017}.json")
    return parts


def read_karpathy(directory: Path) -> dict[str, CaptionedImages]:
    """Karpathy's splits of COCO or Flickr30k: `train`, `val` and `test`."""
    file = first_file(directory, "dataset_coco.json", "dataset_flickr30k.json")
    if file is None:
        raise missing("a data set with Karpathy's splits", directory, "dataset_coco.json or dataset_flickr30k.json")
    folder = next(directory / name for name in _IMAGE_FOLDERS if (directory / name).is_dir())
    parts: dict[str, list[tuple[str, list[str], Path]]] = {}
    for image in _read_json(file)["images"]:
        # COCO's entries name their folder; Flickr30k has only one.
        path = (directory / image["filepath"] if "filepath" in image else folder) / image["filename"]
        part = "train" if image["split"] == "restval" else str(image["split"])
        captions = [sentence["raw"].strip() for sentence in image["sentences"]]
        parts.setdefault(part, []).append((image["filename"], captions, path))
    return {part: _captioned(directory, images) for part, images in parts.items()}


def read_pairs(directory: Path) -> dict[str, CaptionedImages]:
    """Tars of image-text pairs, one folder a part."""
    parts = {}
    for part in ("train", "val", "test"):
        samples = []
        for path in list_tars(directory / part):
            for tar, key, fields in tar_members(path):
                text = tar.extractfile(fields["txt"]) if "txt" in fields else None
                if text is None:
                    raise UserError(f"{path}: the sample {key!r} has no txt", allowed="<key>.jpg with <key>.txt")
                caption = text.read().decode("utf8", "replace").strip()
                samples.append((f"{path.name}/{key}", [caption], image_member(path, key, fields)))
        if samples:
            parts[part] = CaptionedImages.of(directory / part, samples)
    if not parts:
        allowed = "DIR/{train,val,test}/*.tar with <key>.jpg and <key>.txt"
        raise UserError(f"{directory} holds no pairs", allowed=allowed)
    return parts


def _captioned(directory: Path, images: list[tuple[str, list[str], Path]]) -> CaptionedImages:
    """From (name, captions, file) of every image."""
    absent = [path for _, _, path in images if not path.is_file()]
    if absent:
        problem = f"{len(absent)} of {len(images)} images are missing, the first: {absent[0]}"
        raise UserError(problem, fix=f"unpack the images into {directory}")
    bare = [name for name, captions, _ in images if not captions]
    if bare:
        problem = f"{len(bare)} of {len(images)} images of {directory} have no caption, the first: {bare[0]}"
        raise UserError(problem, fix="remove these images, or add captions")
    return CaptionedImages.of(directory, [(name, captions, FileSpan.of_file(path)) for name, captions, path in images])


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON: {error}", fix="fetch it again") from None


CAPTION_KINDS: dict[str, Callable[[Path], dict[str, CaptionedImages]]] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "flickr30k": read_karpathy,
    "pairs": read_pairs,
}
