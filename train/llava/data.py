"""Image-text pairs in LLaVA's json format, or captioned images told in it.

[{"id": ..., "image": "path below --images", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}]
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from labels.errors import UserError
from train.evals.data.captions import CAPTION_KINDS, load_captions
from train.evals.data.images import FilePlace, Place

IMAGE = "<image>"
ASKED = f"{IMAGE}\nGive a brief description of the image."
"""What is asked of a captioned image: one of the questions of LLaVA's own pre-training data."""
_SHAPE = (
    '[{"id": ..., "image": FILE, "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}, ...]}, ...]'
)


class Record(NamedTuple):
    """One image and what is said of it: human's and gpt's turns, one after the other; the image's mark stands in the first."""

    name: str
    place: Place
    turns: list[str]


def load_records(data: str, images: Path | None) -> list[Record]:
    """The records of a file of LLaVA's json with its folder of images, or of the training part of captioned data (KIND:DIR).

    Raises:
        UserError: see read_records and load_captions.
    """
    if data.partition(":")[0] in CAPTION_KINDS:
        if images is not None:
            raise UserError(f"--images {images} was given with --data {data}", mend="leave --images out: the data have their own")
        parts = load_captions(data)
        if "train" not in parts:
            raise UserError(f"--data {data} has no part 'train'", allowed=f"its parts: {', '.join(parts)}", mend="mend --data")
        part = parts["train"]
        rows = zip(part.keys, part.places, part.captions, strict=True)
        return [Record(key, place, [ASKED, caption]) for key, place, captions in rows for caption in captions]
    return read_records(Path(data), images if images is not None else Path(data).parent)


def read_records(file: Path, images: Path) -> list[Record]:
    """All records that have an image; those without one, which teach a projector nothing, are left out and told.

    Raises:
        UserError: the file or a record has another form, or images are missing.
    """
    if not images.is_dir():
        raise UserError(f"no folder of images at {images}", mend="mend --images")
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no file at {file}", allowed=f"JSON: {_SHAPE}", mend="mend --data") from None
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON: {error}", allowed=_SHAPE) from None
    if not isinstance(content, list):
        raise UserError(f"{file} holds a {type(content).__name__}", allowed=_SHAPE)
    records = [_record(file, number, one, images) for number, one in enumerate(content) if not isinstance(one, dict) or one.get("image")]
    if not records:
        raise UserError(f"{file} holds no record with an image", allowed=_SHAPE)
    if len(records) < len(content):
        print(f"{file}: {len(content) - len(records)} of {len(content)} records have no image and are left out", flush=True)
    gone = [record for record in records if not record.place.path.is_file()]
    if gone:
        raise UserError(
            f"{len(gone)} of {len(records)} images are missing, the first: {gone[0].place.path} of the record {gone[0].name}",
            allowed=f"paths of `image` below {images}",
            mend="unpack the images there, or mend --images",
        )
    return records


def _record(file: Path, number: int, found: Any, images: Path) -> Record:
    name = f"{found.get('id', number)!r}" if isinstance(found, dict) else f"number {number}"
    turns = found.get("conversations") if isinstance(found, dict) else None

    def wrong(what: str) -> UserError:
        return UserError(f"{file}: the record {name} {what}", allowed=_SHAPE, mend="mend or remove this record")

    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise wrong("has no conversations of human and gpt by turns")
    if not isinstance(found["image"], str):
        raise wrong(f"has the image {found['image']!r}: one file is wanted")
    values = []
    for place, turn in enumerate(turns):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker != ("human", "gpt")[place % 2] or not isinstance(value, str):
            raise wrong(f"has in turn {place + 1} `from` {speaker!r}")
        if value.count(IMAGE) != (place == 0):
            raise wrong(f"has the mark {IMAGE} {value.count(IMAGE)} times in turn {place + 1}: once in the first is wanted")
        values.append(value.strip())
    path = images / found["image"]
    return Record(name, FilePlace.of_file(path) if path.is_file() else FilePlace(path, 0, 0), values)
