"""manifest.json: what was built, from what, with which options. Written last, so its presence means: OUT is whole.

It holds no times and no paths of the machine: the same input and options give the same bytes.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from labels.errors import UserError
from labels.layout import Layout
from labels.schema import FORMAT_VERSION
from labels.storage import write_json


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerPart(_Part):
    """`fingerprint` covers vocabulary, merges and cleaning; `excluded` are ids that are never labels.

    `path`: `fast`, if captions went through the table of known words, or `plain`; the ids are the same. `vocabulary` counts all
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

    Either `betons` are listed, or `places` (`--no-images`), or neither (`--no-beton`).
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
    places: list[BetonPart] = []

    @property
    def samples(self) -> int:
        """Number of samples in all betons, or at all places."""
        return sum(part.samples for part in [*self.betons, *self.places])


class _Format(BaseModel):
    """The format number alone: another version may have other parts."""

    format: int


def write_manifest(layout: Layout, manifest: Manifest) -> None:
    """Put the manifest in place in one step."""
    write_json(layout.manifest, manifest.model_dump())


def read_manifest(out: Path) -> Manifest:
    """The manifest of a finished OUT.

    Raises:
        UserError: OUT is missing, unfinished, of another format version, or its manifest is damaged.
    """
    layout = Layout(out)
    mend = f"run `preprocess build-labels DATA --out {out}`"
    if not out.is_dir():
        raise UserError(f"{out} does not exist or is not a folder", allowed="the OUT of a finished build-labels", mend=mend)
    if not layout.manifest.is_file():
        raise UserError(f"{out} has no manifest.json: the build is unfinished or this is no OUT folder", mend=mend)
    text = layout.manifest.read_bytes()
    try:
        found = _Format.model_validate_json(text).format
        if found != FORMAT_VERSION:
            raise UserError(f"{layout.manifest} is of format {found}", allowed=f"format {FORMAT_VERSION}", mend=mend)
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{layout.manifest} is damaged: {error.error_count()} faults, the first: {error.errors()[0]['msg']}", mend=mend
        ) from None
