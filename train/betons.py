"""Many betons as one set: memory-mapped, opened by file and not by sample, checked against the manifest.

OUT/manifest.json -> BetonSet(OUT) -> tables of addresses that train/decode.py reads samples with
"""

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labels import beton
from labels.errors import UserError
from labels.files import sha256_file
from labels.idf import read_idf
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, read_manifest


class Tables(NamedTuple):
    """What compiled code needs, one entry a beton [M]: addresses in memory, lengths in bytes, first sample numbers."""

    addresses: np.ndarray
    bytes: np.ndarray
    allocations: np.ndarray
    first_samples: np.ndarray


class BetonSet:
    """All betons of one OUT.

    Attributes:
        samples: N, in all betons together.
        label_limit: K.
        vocabulary: V.
        idf: float32 [V].
        manifest: of the build.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.manifest = read_manifest(out)
        layout = Layout(out)
        rebuild = f"run `preprocess build-labels DATA --out {out}`"
        if not self.manifest.betons:
            raise UserError(f"{out} holds labels but no betons (it was built with --no-beton)", mend=f"{rebuild} without --no-beton")
        if self.manifest.samples == 0:
            raise UserError(f"the betons of {out} hold no samples: every image was quarantined", mend="see quarantine.parquet")
        self.idf = _checked_idf(layout, self.manifest, rebuild)
        self.vocabulary, self.label_limit = len(self.idf), self.manifest.label_limit
        self.samples = self.manifest.samples
        self.paths = [layout.beton_file(part.number) for part in self.manifest.betons]
        self._maps = [_map(path, part, self.label_limit, rebuild) for path, part in zip(self.paths, self.manifest.betons, strict=True)]
        views = [np.frombuffer(data, np.uint8) for data in self._maps]
        counts = np.array([part.samples for part in self.manifest.betons], np.int64)
        self.tables = Tables(
            addresses=np.array([view.ctypes.data for view in views], np.uint64),
            bytes=np.array([len(view) for view in views], np.int64),
            allocations=np.array([_header(view)["alloc_table_ptr"] for view in views], np.int64),
            first_samples=np.concatenate([[0], np.cumsum(counts)]),
        )

    def name(self, sample: int) -> str:
        """Where sample number `sample` lies, for messages."""
        number = int(np.searchsorted(self.tables.first_samples, sample, side="right")) - 1
        return f"{self.paths[number]}, sample {sample - self.tables.first_samples[number]}"


def _checked_idf(layout: Layout, manifest: Manifest, rebuild: str) -> np.ndarray:
    idf = read_idf(layout.idf_parquet)
    if len(idf) != manifest.tokenizer.vocabulary:
        raise UserError(f"{layout.idf_parquet} has {len(idf)} tokens, the manifest {manifest.tokenizer.vocabulary}", mend=rebuild)
    found = sha256_file(layout.idf_parquet)
    if found != manifest.idf_sha256:
        raise UserError(
            f"{layout.idf_parquet} is not the table that the betons were built with: SHA-256 {found[:16]}..., "
            f"in the manifest {manifest.idf_sha256[:16]}...",
            mend=rebuild,
        )
    return idf


def _header(view: np.ndarray) -> np.void:
    return view[: beton.HEADER.itemsize].view(beton.HEADER)[0]


def _map(path: Path, part: BetonPart, label_limit: int, rebuild: str) -> mmap.mmap:
    """Map one beton read-only after checking size, version, fields and counts: cost by file, not by sample."""
    if not path.is_file():
        raise UserError(f"{path} is missing", mend=rebuild)
    size = path.stat().st_size
    if size != part.bytes:
        raise UserError(f"{path} has {size} bytes, in the manifest {part.bytes}: it was cut or replaced", mend=rebuild)
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(data, np.uint8)
    header = _header(view)
    if header["version"] != beton.VERSION:
        raise UserError(f"{path} is of beton version {header['version']}", allowed=str(beton.VERSION), mend=rebuild)
    fields = view[beton.HEADER.itemsize : beton.METADATA_OFFSET].view(beton.FIELD)
    names = tuple(field["name"].tobytes().rstrip(b"\0").decode("utf8", "replace") for field in fields)
    if header["num_fields"] != len(fields) or names != beton.FIELD_NAMES or tuple(fields["type_id"]) != beton.FIELD_TYPES:
        raise UserError(f"{path} has the fields {', '.join(names)}", allowed=", ".join(beton.FIELD_NAMES), mend=rebuild)
    if header["num_samples"] != part.samples or beton.label_limit_of(fields) != label_limit:
        raise UserError(
            f"{path} holds {header['num_samples']} samples of {beton.label_limit_of(fields)} labels; in the manifest "
            f"{part.samples} of {label_limit}",
            mend=rebuild,
        )
    table_end = int(header["alloc_table_ptr"]) + 2 * part.samples * beton.ALLOCATION.itemsize
    if table_end != size:
        raise UserError(f"{path}: its allocation table ends at byte {table_end}, the file at {size}", mend=rebuild)
    return data
