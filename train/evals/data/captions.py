"""Images with captions: COCO's own files, Karpathy's splits, Flickr30k, and webdataset tars.

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

from labels.storage import UserError
from train.evals.data.images import CaptionedImages, FileSpan, check_overlap, image_member, list_tars, tar_members
from train.evals.data.sets import missing

_IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", ".")
_PUBLISHED = ("coco", "karpathy", "flickr30k")
_PART_OF: dict[str, str] = {"restval": "train"}


@dataclass(frozen=True)
class CaptionSet:
    """A captioned data set. The test part is for the last figure alone: no choice may look at it.

    name: what results call it. kind: the word before the colon. part: which one `test` is.
    train: for what is trained on it; None where the data have no such part. cache: a folder that keeps what took long
        to find.
    """

    name: str
    kind: str
    part: str
    test: CaptionedImages
    train: CaptionedImages | None
    cache: Path | None = None

    @property
    def trained(self) -> CaptionedImages:
        """The training part, for what needs one.

        Raises:
            UserError: there is none.
        """
        if self.train is None:
            raise UserError(
                f"{self.name} has no training part", allowed="data with a part `train`", fix="give the data whole"
            )
        return self.train

    @cached_property
    def overlap(self) -> int:
        """How many test images the training part holds too; asked for by what is trained on it.

        Raises:
            UserError: some, in data of one's own; or there is no training part.
        """
        return check_overlap(self.name, self.trained, self.test, self.cache, published=self.kind in _PUBLISHED)

    def describe(self) -> dict[str, Any]:
        """What a result JSON says of the data."""
        train = {} if self.train is None else {"train": self.train.describe()}
        return {"data": self.name, "part": self.part, **train, "test": self.test.describe()}


def load_caption_set(spec: str, cache: Path | None = None, part: str | None = None) -> CaptionSet:
    """The part of `KIND:DIR` that is measured, and the training part where there is one.

    Args:
        cache: see CaptionSet.
        part: which one is measured; None: `test` where there is one, else `val`.

    Raises:
        UserError: it has no such part, and all of load_captions.
    """
    parts = load_captions(spec)
    wanted = (part,) if part else ("test", "val")
    found = next((name for name in wanted if name in parts), None)
    if found is None:
        raise UserError(
            f"--data {spec} has the parts {', '.join(parts)}",
            allowed=f"one named {' or '.join(wanted)}",
            fix="fix the data, or --part",
        )
    return CaptionSet(published_name(spec), spec.partition(":")[0], found, parts[found], parts.get("train"), cache)


def load_captions(spec: str) -> dict[str, CaptionedImages]:
    """The parts that `KIND:DIR` has, by name.

    Raises:
        UserError: an unknown kind, a layout that is not there, images without file or caption.
    """
    kind, _, value = spec.partition(":")
    if kind not in CAPTION_KINDS or not value:
        raise UserError(
            f"--data {spec!r} names no captioned data", allowed=", ".join(f"{name}:DIR" for name in CAPTION_KINDS)
        )
    directory = Path(value)
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", fix="fix the path given to --data")
    return CAPTION_KINDS[kind](directory)


def published_name(spec: str) -> str:
    """What results call the data: Karpathy's splits by the images that they divide, so that published figures stand
    beside them.
    """
    kind, _, value = spec.partition(":")
    if kind != "karpathy":
        return spec
    return f"{'coco' if (Path(value) / 'dataset_coco.json').is_file() else 'flickr30k'}:{value}, Karpathy's splits"


def read_coco(directory: Path) -> dict[str, CaptionedImages]:
    """COCO captions: `train` and `val`, of 2017 or else of 2014."""
    parts = {}
    for part in ("train", "val"):
        names = [f"{part}{year}" for year in (2017, 2014)]
        name = next((name for name in names if (directory / "annotations" / f"captions_{name}.json").is_file()), None)
        if name is None:
            continue
        content = _read_json(directory / "annotations" / f"captions_{name}.json")
        captions: dict[int, list[str]] = {}
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        folder = next(
            (directory / place for place in (name, f"images/{name}") if (directory / place).is_dir()), directory / name
        )
        images = [
            (image["file_name"], folder / image["file_name"], captions.get(image["id"], []))
            for image in content["images"]
        ]
        parts[part] = _captioned(directory, images)
    if not parts:
        raise missing("COCO captions", directory, "annotations/captions_{train,val}{2014,2017}.json")
    return parts


def read_karpathy(directory: Path) -> dict[str, CaptionedImages]:
    """Karpathy's splits of COCO or Flickr30k: `train`, `val` and `test`."""
    files = [directory / f"dataset_{name}.json" for name in ("coco", "flickr30k")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise missing("a data set with Karpathy's splits", directory, "dataset_coco.json or dataset_flickr30k.json")
    folder = next(directory / name for name in _IMAGE_FOLDERS if (directory / name).is_dir())
    found: dict[str, list[tuple[str, Path, list[str]]]] = {}
    for image in _read_json(file)["images"]:
        # COCO's entries name the folder, Flickr's lie in one.
        path = directory / image["filepath"] / image["filename"] if "filepath" in image else folder / image["filename"]
        part = _PART_OF.get(str(image["split"]), str(image["split"]))
        found.setdefault(part, []).append(
            (image["filename"], path, [sentence["raw"].strip() for sentence in image["sentences"]])
        )
    return {part: _captioned(directory, images) for part, images in found.items()}


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
                samples.append((f"{path.name}/{key}", image_member(path, key, fields), [caption]))
        if samples:
            parts[part] = CaptionedImages.of(directory / part, samples)
    if not parts:
        raise UserError(
            f"{directory} holds no pairs", allowed="DIR/{train,val,test}/*.tar with <key>.jpg and <key>.txt"
        )
    return parts


def _captioned(directory: Path, images: list[tuple[str, Path, list[str]]]) -> CaptionedImages:
    gone = [path for _, path, _ in images if not path.is_file()]
    if gone:
        raise UserError(
            f"{len(gone)} of {len(images)} images are missing, the first: {gone[0]}",
            fix=f"unpack the images into {directory}",
        )
    bare = [name for name, _, captions in images if not captions]
    if bare:
        raise UserError(f"{len(bare)} of {len(images)} images of {directory} have no caption, the first: {bare[0]}")
    return CaptionedImages.of(directory, [(name, FileSpan.of_file(path), captions) for name, path, captions in images])


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
