"""manifest.json: what was built, from what, with which options. Written last, so its presence means: OUT is whole.

It holds no times and no paths of the machine: the same input and options give the same bytes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labels.storage import Layout, UserError, write_json

# ---- schema: Explicit Arrow schemas of every table that stage 1 writes; versioned, never inferred.


FORMAT_VERSION = 1
PAD_ID = -1
"""Fills the end of a padded label row; no token has it."""

_VERSION = {b"superclass.format": str(FORMAT_VERSION).encode()}

LABELS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("token_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("label_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
    ],
    metadata=_VERSION,
)
"""One row a sample. `token_ids`: in the caption's order, without specials, at most the context limit.
`label_ids`: sorted, unique. `width`, `height`: pixels, null where neither metadata nor image header told them."""

COUNTS = pa.schema(
    [pa.field("token_id", pa.int32(), nullable=False), pa.field("document_frequency", pa.int64(), nullable=False)],
    metadata=_VERSION,
)
"""One shard's document frequencies: one row a token that occurs, ascending."""

TOKENS = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("document_frequency", pa.int64(), nullable=False),
        pa.field("idf", pa.float64(), nullable=False),
    ],
    metadata=_VERSION,
)
"""One row a vocabulary entry, seen or not, so that row number = token_id = column of the head."""

QUARANTINE = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ],
    metadata=_VERSION,
)
"""One row a sample left out. `stage` is `labels` (no label row) or `images` (label row, but in no beton)."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)


class TokenizerPart(_Part):
    """`fingerprint` covers vocabulary, merges and cleaning; `excluded` are ids that are never labels.

    `path`: `fast`, if captions went through the table of known words, or `plain`; the ids are the same. `vocabulary`
        counts all
    classes, word pairs too.
    """

    name: str
    fingerprint: str
    path: str
    vocabulary: int
    excluded: list[int]


class ShardPart(_Part):
    """`first_index`: position of the shard's first row among all rows; `quarantined`: reason -> samples.

    `keys_sha256`: SHA-256 over the rows' keys in order, each followed by a newline. Equal in two OUTs: the same rows.
    """

    name: str
    source: str
    source_bytes: int
    first_index: int
    rows: int
    labels_sha256: str
    keys_sha256: str
    quarantined: dict[str, int]


class BetonPart(_Part):
    """One file of samples: OUT/beton/<number>.beton, or OUT/places/<number>.npy where images stay in their tars.

    `shards`: names of the shards whose rows stand in it, in order; `samples`: how many rows have an image; `quarantined`: reason ->
    rows of this file whose image does not serve.
    """

    number: int
    shards: list[str]
    samples: int
    bytes: int
    sha256: str
    quarantined: dict[str, int]


class Manifest(_Part):
    """The whole file. `fingerprint` names the label rows: betons and labels with the same one belong together.

    Either `betons` are listed, or the files of the `image_index` (`--no-images`), or neither (`--no-beton`).
    """

    format: int = FORMAT_VERSION
    fingerprint: str
    options: dict[str, Any]
    label_limit: int
    tokenizer: TokenizerPart
    captions: int
    idf_formula: str
    idf_sha256: str
    quarantine_sha256: str
    shards: list[ShardPart]
    betons: list[BetonPart]
    # The manifest's key and the folder keep an older name: "places".
    image_index: list[BetonPart] = Field([], validation_alias="places", serialization_alias="places")

    @property
    def samples(self) -> int:
        """Number of samples in all betons, or in the image index."""
        return sum(part.samples for part in [*self.betons, *self.image_index])


class _Format(BaseModel):
    """The format number alone: another version may have other parts."""

    format: int


def write_manifest(layout: Layout, manifest: Manifest) -> None:
    """Put the manifest in place in one step."""
    write_json(layout.manifest, manifest.model_dump(by_alias=True))


def read_manifest(out: Path) -> Manifest:
    """The manifest of a finished OUT.

    Raises:
        UserError: OUT is missing, unfinished, of another format version, or its manifest is damaged.
    """
    layout = Layout(out)
    fix = f"run `preprocess build-labels DATA --out {out}`"
    if not out.is_dir():
        raise UserError(
            f"{out} does not exist or is not a folder", allowed="the OUT of a finished build-labels", fix=fix
        )
    if not layout.manifest.is_file():
        raise UserError(f"{out} has no manifest.json: the build is unfinished or this is no OUT folder", fix=fix)
    text = layout.manifest.read_bytes()
    try:
        found = _Format.model_validate_json(text).format
        if found != FORMAT_VERSION:
            raise UserError(f"{layout.manifest} is of format {found}", allowed=f"format {FORMAT_VERSION}", fix=fix)
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{layout.manifest} is damaged: {error.error_count()} faults, the first: {error.errors()[0]['msg']}",
            fix=fix,
        ) from None


# ---- The image index: offsets of images that stay in the user's own uncompressed tars (`build-labels --no-images`).
#
# OUT/places/<nnnnn>.npy       IMAGE_SPAN [samples], instead of OUT/beton/<nnnnn>.beton: the same samples in the same order
# OUT/places/sources.json      shard name -> path and bytes of its tar; edit the paths when the tars move


IMAGE_SPAN = np.dtype(
    [
        ("shard", "<u4"),
        ("bytes", "<u4"),
        ("offset", "<u8"),
        ("index", "<u8"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("pad", "<u4"),
    ]
)
"""One sample: number of its shard among the manifest's `shards`; length and offset of its JPEG in that shard's tar, in
bytes; position of its row among all label rows; pixels; zero."""


@dataclass(frozen=True)
class Source:
    """A tar: its absolute path, and its length in bytes when it was read."""

    path: str
    bytes: int


def write_sources(layout: Layout, sources: dict[str, Source]) -> None:
    """Write sources.json: shard name -> its tar."""
    write_json(layout.image_sources, {name: asdict(source) for name, source in sources.items()})


def read_sources(layout: Layout) -> dict[str, Source]:
    """Shard name -> its tar.

    Raises:
        UserError: sources.json is missing or damaged.
    """
    path = layout.image_sources
    try:
        return {
            name: Source(str(value["path"]), int(value["bytes"]))
            for name, value in json.loads(path.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            allowed='{"<shard>": {"path": "<tar>", "bytes": <its length>}, ...}',
            fix=f"run `preprocess build-labels DATA --out {layout.out} --no-images`",
        ) from None


def open_image_index(path: Path) -> np.ndarray:
    """One file of the image index, mapped read-only: IMAGE_SPAN [samples].

    Raises:
        UserError: it is missing, cut, or of another form.
    """
    try:
        spans = np.load(path, mmap_mode="r", allow_pickle=False)
        whole = spans.dtype == IMAGE_SPAN and spans.ndim == 1 and spans.offset + spans.nbytes == path.stat().st_size
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", fix="run `preprocess verify OUT`, then its build-labels command"
        ) from None
    if not whole:
        raise UserError(
            f"{path} holds {spans.dtype} {list(spans.shape)}, or is cut",
            allowed=f"image spans: {IMAGE_SPAN}",
            fix="run `preprocess verify OUT`, then its build-labels command",
        )
    return spans
