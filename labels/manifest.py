"""The files that stage 1 writes: Arrow schemas, manifest.json, and the image index of `build-labels --no-images`.

manifest.json says what was built, from what, with which options; it is written last, so its presence means that the
label dataset is complete. No file holds a time, a worker number or (but for the image index) a path of the machine, so
the same input gives the same bytes. The one exception is idf.duckdb: DuckDB writes random identifiers into its files;
`verify` compares its content with idf.parquet.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labels.storage import Layout, UserError, write_json

FORMAT_VERSION = 1
PAD_ID = -1
"""Fills the end of a padded label row; no token has this id."""

_VERSION = {b"superclass.format": str(FORMAT_VERSION).encode()}

_IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))


def _schema(nullable: tuple[str, ...] = (), **columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, name in nullable) for name, kind in columns.items()], metadata=_VERSION)


LABELS = _schema(
    key=pa.string(),
    uid=pa.string(),
    width=pa.int32(),
    height=pa.int32(),
    token_ids=_IDS,
    label_ids=_IDS,
    nullable=("uid", "width", "height"),
)
"""One row per sample. `token_ids`: in the caption's order, without specials, at most the context limit.
`label_ids`: sorted, unique. `width`, `height`: pixels, null if neither metadata nor image header has them."""

COUNTS = _schema(token_id=pa.int32(), document_frequency=pa.int64())
"""One shard's document frequencies: one row per token that occurs, ascending."""

TOKENS = _schema(token_id=pa.int32(), token=pa.string(), document_frequency=pa.int64(), idf=pa.float64())
"""One row per vocabulary entry, seen or not: row number = token_id = column of the head."""

QUARANTINE = _schema(shard=pa.string(), key=pa.string(), stage=pa.string(), reason=pa.string(), detail=pa.string())
"""One row per rejected sample. `stage` is `labels` (no label row) or `images` (label row, but in no beton)."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)


class TokenizerPart(_Part):
    name: str
    fingerprint: str  # of vocabulary, merges and cleaning
    path: str  # `fast` (table of known words) or `plain`; the ids are the same
    vocabulary: int  # number of all classes, word pairs too
    excluded: list[int]  # ids that are never labels


class ShardPart(_Part):
    name: str
    source: str
    source_bytes: int
    # A row's position is its identity: first_index + number within the shard, among all rows of the dataset.
    first_index: int
    rows: int
    labels_sha256: str
    # Over the rows' keys in order, each followed by a newline. Equal in two label datasets: the same rows, so that
    # `train run --labels` may combine the labels of one with the betons of the other.
    keys_sha256: str
    quarantined: dict[str, int]  # reason -> samples


class BetonPart(_Part):
    """One file of samples: a beton, or one file of the image index."""

    number: int
    shards: list[str]  # whose rows are in the file, in order
    samples: int  # rows with an image
    bytes: int
    sha256: str
    quarantined: dict[str, int]  # reason -> rows of this file with an unusable image


class Manifest(_Part):
    """The whole file. Betons and labels with the same `fingerprint` belong together.

    Either `betons` are listed, or the files of the `image_index` (`--no-images`), or neither (`--no-beton`).
    """

    format: int = FORMAT_VERSION
    fingerprint: str
    options: dict[str, Any]
    label_limit: int
    tokenizer: TokenizerPart
    captions: int
    unlabelled: int | None = None  # captions without a label; None: not counted, by an earlier version
    idf_formula: str
    idf_sha256: str
    quarantine_sha256: str
    shards: list[ShardPart]
    betons: list[BetonPart]
    # The manifest's key and the folder keep an older name: "places".
    image_index: list[BetonPart] = Field([], validation_alias="places", serialization_alias="places")

    @property
    def samples(self) -> int:
        return sum(part.samples for part in [*self.betons, *self.image_index])


class _Format(BaseModel):
    format: int  # read alone first: another version may have other parts


def write_manifest(layout: Layout, manifest: Manifest) -> None:
    write_json(layout.manifest, manifest.model_dump(by_alias=True))


def read_manifest(out: Path) -> Manifest:
    """The manifest of a finished label dataset. UserError: it is missing, unfinished, damaged or of another format."""
    layout = Layout(out)
    fix = f"run `preprocess build-labels DATA --out {out}`"
    if not out.is_dir():
        allowed = "the output folder of a finished build-labels"
        raise UserError(f"{out} does not exist or is not a folder", allowed=allowed, fix=fix)
    if not layout.manifest.is_file():
        raise UserError(f"{out} has no manifest.json: the build is unfinished or this is no output folder", fix=fix)
    text = layout.manifest.read_bytes()
    try:
        version = _Format.model_validate_json(text).format
        if version != FORMAT_VERSION:
            raise UserError(f"{layout.manifest} is of format {version}", allowed=f"format {FORMAT_VERSION}", fix=fix)
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = f"{error.error_count()} faults, the first: {error.errors()[0]['msg']}"
        raise UserError(f"{layout.manifest} is damaged: {problem}", fix=fix) from None


# The image index: where images are that stay in the user's uncompressed tars (`build-labels --no-images`).
#
#     places/<nnnnn>.npy     IMAGE_SPAN [samples], instead of beton/<nnnnn>.beton: the same samples in the same order
#     places/sources.json    shard name -> path and bytes of its tar; edit the paths when the tars move
IMAGE_SPAN = np.dtype(
    [
        ("shard", "<u4"),  # number of the sample's shard among the manifest's `shards`
        ("bytes", "<u4"),  # length of its JPEG
        ("offset", "<u8"),  # of the JPEG in that shard's tar
        ("index", "<u8"),  # position of its row among all label rows
        ("width", "<u2"),
        ("height", "<u2"),
        ("pad", "<u4"),  # 0
    ]
)


@dataclass(frozen=True)
class Source:
    path: str  # of a tar, absolute
    bytes: int  # its length when it was read


def write_sources(layout: Layout, sources: dict[str, Source]) -> None:
    write_json(layout.image_sources, {name: asdict(source) for name, source in sources.items()})


def read_sources(layout: Layout) -> dict[str, Source]:
    """Shard name -> its tar. UserError: sources.json is missing or damaged."""
    path = layout.image_sources
    try:
        return {
            name: Source(str(tar["path"]), int(tar["bytes"])) for name, tar in json.loads(path.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            allowed='{"<shard>": {"path": "<tar>", "bytes": <its length>}, ...}',
            fix=f"run `preprocess build-labels DATA --out {layout.out} --no-images`",
        ) from None


def open_image_index(path: Path) -> np.ndarray:
    """One file of the image index, mapped read-only: IMAGE_SPAN [samples]. UserError: it is missing or damaged."""
    fix = "run `preprocess verify OUT`, then its build-labels command"
    try:
        spans = np.load(path, mmap_mode="r", allow_pickle=False)
        complete = spans.dtype == IMAGE_SPAN and spans.ndim == 1 and spans.offset + spans.nbytes == path.stat().st_size
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}", fix=fix) from None
    if not complete:
        problem = f"{path} holds {spans.dtype} {list(spans.shape)}, or is truncated"
        raise UserError(problem, allowed=f"image spans: {IMAGE_SPAN}", fix=fix)
    return spans
