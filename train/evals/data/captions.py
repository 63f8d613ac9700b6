"""Captioned data sets, `KIND:DIR`, as a `CaptionSet`.

coco:DIR       annotations/captions_{train,val}{2014,2017}.json, images in DIR/<part>/ or DIR/images/<part>/
karpathy:DIR   dataset_coco.json, images in DIR/{train,val}2014/; or dataset_flickr30k.json, images below DIR
flickr30k:DIR  dataset_flickr30k.json (Karpathy's splits), images in flickr30k-images/ or flickr30k_images/ or images/
pairs:DIR      DIR/{train,val,test}/*.tar: <key>.jpg with <key>.txt

BLIP's lists of Karpathy's splits, {coco_karpathy,flickr30k}_{train,val,test}.json, are taken as well, also in a file of
COCO's name. A part is `train`, `val` or `test`; Karpathy's `restval` belongs to `train`, as usual. The images
of a part are looked for when the part is needed: a copy with the test images alone is enough for retrieval.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from labels.storage import UserError, local_path, printable
from train.evals.data.images import CaptionedImages, FileSpan, check_overlap, image_member, list_tars, read_tar
from train.evals.data.sets import first_file, missing

_IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", ".")
_PUBLISHED = ("coco", "karpathy", "flickr30k")
_PART_NAMES = {"train": "training"}
Parts = dict[str, Callable[[], CaptionedImages]]
"""What gives each part, by name. UserError: images are missing or have no caption."""
_Entry = tuple[str, list[str], Path]  # key, captions, file of an image


@dataclass(frozen=True)
class CaptionSet:
    """A captioned data set. The test part is for the final score alone: nothing is chosen on it."""

    name: str  # as results name it
    kind: str  # the word before the colon
    part: str  # which part `test` is
    test: CaptionedImages
    train: CaptionedImages | None  # None where the data have no such part, or not its images
    cache: Path | None = None  # a folder that keeps the comparison of the parts
    train_fault: UserError | None = None  # why there is no training part although the data name one

    @property
    def trained(self) -> CaptionedImages:
        """The training part; an error if there is none."""
        if self.train is None:
            problem = f"{self.name} has no training part"
            error = UserError(problem, allowed="data with a part `train`", fix="give the whole data set")
            raise self.train_fault or error
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
        name = f"{_karpathy_files(local_path(value))[0]}:{value}, Karpathy's splits"
    test, train, fault = parts[evaluated](), None, None
    try:
        train = parts["train"]() if "train" in parts else None
    except UserError as error:  # retrieval does without
        fault = error
    return CaptionSet(printable(name), kind, evaluated, test, train, cache, fault)


def load_captions(spec: str) -> Parts:
    """The parts of `KIND:DIR`."""
    kind, _, value = spec.partition(":")
    if kind not in CAPTION_KINDS or not value:
        allowed = ", ".join(f"{name}:DIR" for name in CAPTION_KINDS)
        raise UserError(f"--data {spec!r} names no captioned data", allowed=allowed)
    directory = local_path(value)
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", fix="fix the path given to --data")
    return CAPTION_KINDS[kind](directory)


def read_coco(directory: Path) -> Parts:
    """COCO captions: `train` and `val`, of 2017 or else of 2014."""
    parts: Parts = {}
    for part in ("train", "val"):
        file = first_file(directory, *(f"annotations/captions_{part}{year}.json" for year in (2017, 2014)))
        if file is None:
            continue
        content, name = _read_json(file), file.stem.removeprefix("captions_")
        folders = (directory / name, directory / "images" / name)
        folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        entries = _blip_entries if isinstance(content, list) else _coco_entries
        parts[part] = partial(_captioned, directory, part, entries(file, content, folder))
    if not parts:
        raise missing("COCO captions", directory, "annotations/captions_{train,val}{2014,2017}.json")
    return parts


def read_karpathy(directory: Path) -> Parts:
    """Karpathy's splits of COCO or Flickr30k: `train`, `val` and `test`, in his file or in BLIP's lists."""
    folder = next(directory / name for name in _IMAGE_FOLDERS if (directory / name).is_dir())
    _, file, lists = _karpathy_files(directory)
    if file is not None:
        entries = _karpathy_entries(file, directory, folder)
    else:
        entries = {part: _blip_entries(blip, _read_json(blip), folder) for part, blip in lists.items()}
    if not entries:
        raise missing("a data set with Karpathy's splits", directory, "dataset_coco.json or dataset_flickr30k.json")
    return {part: partial(_captioned, directory, part, of_part) for part, of_part in entries.items()}


def read_pairs(directory: Path) -> Parts:
    """Tars of image-text pairs, one folder a part."""
    names = (part for part in ("train", "val", "test") if list_tars(directory / part))
    parts: Parts = {part: partial(_pairs, directory, part) for part in names}
    if not parts:
        allowed = "DIR/{train,val,test}/*.tar with <key>.jpg and <key>.txt"
        raise UserError(f"{directory} holds no pairs", allowed=allowed)
    return parts


def _pairs(directory: Path, part: str) -> CaptionedImages:
    samples = []
    for path in list_tars(directory / part):
        for key, fields in read_tar(path):
            if "txt" not in fields:
                raise UserError(f"{path}: the sample {key!r} has no txt", allowed="<key>.jpg with <key>.txt")
            caption = fields["txt"].read().decode("utf-8-sig", "replace").strip()
            samples.append((f"{path.name}/{key}", [caption], image_member(path, key, fields)))
    return CaptionedImages.of(directory / part, _PART_NAMES.get(part, part), samples)


def _captioned(directory: Path, part: str, entries: list[_Entry]) -> CaptionedImages:
    absent = [path for _, _, path in entries if not path.is_file()]
    if absent:
        problem = f"{len(absent)} of {len(entries)} images of the part {part} are missing, the first: {absent[0]}"
        raise UserError(problem, fix=f"unpack the images into {directory}")
    bare = [name for name, captions, _ in entries if not captions]
    if bare:
        where = f"{len(bare)} of {len(entries)} images of the part {part} of {directory}"
        raise UserError(f"{where} have no caption, the first: {bare[0]}", fix="remove these images, or add captions")
    samples = [(name, captions, FileSpan.of_file(path)) for name, captions, path in entries]
    return CaptionedImages.of(directory, _PART_NAMES.get(part, part), samples)


# -- the json files


def _karpathy_files(directory: Path) -> tuple[str, Path | None, dict[str, Path]]:
    """`coco` or `flickr30k`, Karpathy's file of it, and without that BLIP's lists by part."""
    for images in ("coco", "flickr30k"):
        if (file := first_file(directory, f"dataset_{images}.json")) is not None:
            return images, file, {}
    for images, stem in (("coco", "coco_karpathy"), ("flickr30k", "flickr30k")):
        names = {part: f"{stem}_{part}.json" for part in ("train", "val", "test")}
        files = {part: first_file(directory, name, f"annotations/{name}") for part, name in names.items()}
        if any(files.values()):
            return images, None, {part: file for part, file in files.items() if file is not None}
    return "coco", None, {}


def _coco_entries(file: Path, content: Any, folder: Path) -> list[_Entry]:
    """From {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, captions ordered by `id`."""
    images: list[tuple[str, str]] = []  # id, file
    for n, image in enumerate(_field(file, "it", content, "images", list)):
        where = f"images[{n}]"
        images.append((str(_field(file, where, image, "id", str | int)), _field(file, where, image, "file_name", str)))
    captions: dict[str, list[tuple[int, str]]] = {number: [] for number, _ in images}
    for n, annotation in enumerate(_field(file, "it", content, "annotations", list)):
        where = f"annotations[{n}]"
        number = str(_field(file, where, annotation, "image_id", str | int))
        if number not in captions:
            problem = f"{file}: {where} is of the image {number}, which `images` does not list"
            raise UserError(problem, fix="add the image to `images`, or remove its annotations")
        order = annotation["id"] if isinstance(annotation.get("id"), int) else n
        captions[number].append((order, _field(file, where, annotation, "caption", str).strip()))
    return [
        (name, [text for _, text in sorted(captions[number], key=itemgetter(0))], folder / name)
        for number, name in images
    ]


def _karpathy_entries(file: Path, directory: Path, folder: Path) -> dict[str, list[_Entry]]:
    """From {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, by part."""
    content = _read_json(file)
    if isinstance(content, list):
        raise UserError(
            f"{file} holds a list, without the parts of its images",
            allowed='{"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}]}]}',
            fix=f"give BLIP's lists as {directory}/coco_karpathy_{{train,val,test}}.json, one for each part",
        )
    parts: dict[str, list[_Entry]] = {}
    for n, image in enumerate(_field(file, "it", content, "images", list)):
        where = f"images[{n}]"
        name, split = (_field(file, where, image, key, str) for key in ("filename", "split"))
        # COCO's entries name their folder; Flickr30k has only one.
        above = directory / image["filepath"] if isinstance(image.get("filepath"), str) else folder
        captions = [
            sentence if isinstance(sentence, str) else _field(file, f"{where}.sentences[{m}]", sentence, "raw", str)
            for m, sentence in enumerate(_field(file, where, image, "sentences", list))
        ]
        part = parts.setdefault("train" if split == "restval" else split, [])
        part.append((name, [caption.strip() for caption in captions], above / name))
    return parts


def _blip_entries(file: Path, content: Any, folder: Path) -> list[_Entry]:
    """From BLIP's [{"image": "val2014/x.jpg", "caption": "..." or [...]}]; an image may come several times."""
    if not isinstance(content, list):
        raise UserError(f"{file} holds no list", allowed='[{"image": "val2014/x.jpg", "caption": [...]}]')
    captions: dict[str, list[str]] = {}
    for n, entry in enumerate(content):
        name, texts = _field(file, f"[{n}]", entry, "image", str), _field(file, f"[{n}]", entry, "caption", str | list)
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise UserError(f"{file}: a caption of [{n}] is {text!r}", allowed="text", fix="fix or remove it")
            captions.setdefault(name, []).append(text.strip())
    # Names begin with the folder of the images, or with the data set's: `coco/val2014/x.jpg`.
    roots = (folder, folder.parent, folder.parent / "images", folder.parent.parent)
    root = next((root for root in roots if (root / next(iter(captions), "")).is_file()), folder)
    return [(name, texts, root / name) for name, texts in captions.items()]


def _field(file: Path, where: str, entry: Any, key: str, kind: Any) -> Any:
    """`entry[key]`, which is of the type `kind`. UserError: it is missing, or another type."""
    if isinstance(entry, dict) and isinstance(entry.get(key), kind) and not isinstance(entry[key], bool):
        return entry[key]
    if not isinstance(entry, dict):
        problem = f"{where} is no mapping, but {_shown(entry)}"
    elif key in entry:
        problem = f"`{key}` of {where} is {_shown(entry[key])}"
    else:
        problem = f"{where} has no `{key}`; it has {', '.join(map(str, entry)) or 'nothing'}"
    words = {list: "a list", str: "text", str | int: "a number or text", str | list: "text or a list of texts"}
    raise UserError(
        f"{file}: {problem}", allowed=f"`{key}`: {words[kind]}", fix="fix or remove it, or fetch the file again"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:79] + "…"


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not readable as JSON: {error}", fix="fetch it again") from None


CAPTION_KINDS: dict[str, Callable[[Path], Parts]] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "flickr30k": read_karpathy,
    "pairs": read_pairs,
}
