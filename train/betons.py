"""Many betons as one set: memory-mapped, opened by file and not by sample, checked against the manifest.

OUT/manifest.json -> BetonSet(OUT) -> tables of addresses that train/decode.py reads samples with
OTHER_OUT/rows/*.npy (labels made later, for the same rows) --^
"""

import mmap
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labels import beton
from labels.errors import UserError
from labels.files import sha256_file
from labels.idf import read_idf
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, ShardPart, read_manifest
from labels.rows import check_same_rows, open_rows, rows_file, shards_needed

_OTHER_OPEN_FILES = 512


class Tables(NamedTuple):
    """What compiled code needs, one entry a beton [M]: addresses in memory, lengths in bytes, first sample numbers.

    Where label rows come from another OUT, there is one entry a shard [P]: `row_addresses` tells where its array int32 [rows, K]
    lies, `first_indices` and `row_counts` which positions its rows have among all. Else P = 0.
    """

    addresses: np.ndarray
    bytes: np.ndarray
    allocations: np.ndarray
    first_samples: np.ndarray
    row_addresses: np.ndarray
    first_indices: np.ndarray
    row_counts: np.ndarray


class BetonSet:
    """All betons of one OUT, with their own labels or those of another.

    Args:
        out: OUT of the betons.
        labels: OUT of other labels for the same rows, whose arrays are made (train/relabel.py); None takes the betons' own.

    Attributes:
        samples: N, in all betons together.
        label_limit: K.
        vocabulary: V.
        idf: float32 [V].
        manifest: of the betons.
        labels_out, labels: OUT and manifest of the labels.

    Raises:
        UserError: something is missing, damaged, or does not belong together.
    """

    def __init__(self, out: Path, labels: Path | None = None) -> None:
        self.out, self.labels_out = out, labels or out
        self.manifest = read_manifest(out)
        self.labels = read_manifest(labels) if labels else self.manifest
        layout = Layout(out)
        rebuild = f"run `preprocess build-labels DATA --out {out}`"
        if not self.manifest.betons:
            raise UserError(f"{out} holds labels but no betons (it was built with --no-beton)", mend=f"{rebuild} without --no-beton")
        if self.manifest.samples == 0:
            raise UserError(f"the betons of {out} hold no samples: every image was quarantined", mend="see quarantine.parquet")
        check_same_rows(out, self.manifest, self.labels_out, self.labels)
        self.idf = _checked_idf(self.labels_out, self.labels, "labels" if labels else "betons")
        self.vocabulary, self.label_limit = len(self.idf), self.labels.label_limit
        self.samples = self.manifest.samples
        self.paths = [layout.beton_file(part.number) for part in self.manifest.betons]
        self._shards = shards_needed(self.manifest, self.labels)
        _allow_open_files(2 * len(self.paths) + len(self._shards))
        own_limit = self.manifest.label_limit
        self._maps = [_map(path, part, own_limit, rebuild) for path, part in zip(self.paths, self.manifest.betons, strict=True)]
        self._rows = [_map_rows(self.labels_out, part, self.label_limit) for part in self._shards]
        views = [np.frombuffer(data, np.uint8) for data in self._maps]
        counts = np.array([part.samples for part in self.manifest.betons], np.int64)
        self.tables = Tables(
            addresses=np.array([view.ctypes.data for view in views], np.uint64),
            bytes=np.array([len(view) for view in views], np.int64),
            allocations=np.array([_header(view)["alloc_table_ptr"] for view in views], np.int64),
            first_samples=np.concatenate([[0], np.cumsum(counts)]),
            row_addresses=np.array([rows.ctypes.data for rows in self._rows], np.uint64),
            first_indices=np.array([part.first_index for part in self._shards], np.int64),
            row_counts=np.array([part.rows for part in self._shards], np.int64),
        )

    def name(self, sample: int) -> str:
        """Where sample number `sample` lies, for messages."""
        number = self._number(sample)
        return f"{self.paths[number]}, sample {sample - self.tables.first_samples[number]}"

    def label_array(self, sample: int) -> Path | None:
        """The array that the labels of sample number `sample` are read from; None where the beton itself holds them."""
        if not self._shards:
            return None
        number = self._number(sample)
        at = beton.METADATA_OFFSET + (sample - int(self.tables.first_samples[number])) * beton.METADATA.itemsize
        index = np.frombuffer(self._maps[number], beton.METADATA, 1, at)["index"][0]
        found = int(np.searchsorted(self.tables.first_indices, index, side="right")) - 1
        return rows_file(self.labels_out, self._shards[max(found, 0)])

    def _number(self, sample: int) -> int:
        """Which beton a sample is in."""
        return int(np.searchsorted(self.tables.first_samples, sample, side="right")) - 1


def _checked_idf(out: Path, manifest: Manifest, what: str) -> np.ndarray:
    path, rebuild = Layout(out).idf_parquet, f"run `preprocess build-labels DATA --out {out}`"
    idf = read_idf(path)
    if len(idf) != manifest.tokenizer.vocabulary:
        raise UserError(f"{path} has {len(idf)} tokens, the manifest {manifest.tokenizer.vocabulary}", mend=rebuild)
    found = sha256_file(path)
    if found != manifest.idf_sha256:
        raise UserError(
            f"{path} is not the table that the {what} were built with: SHA-256 {found[:16]}..., "
            f"in the manifest {manifest.idf_sha256[:16]}...",
            mend=rebuild,
        )
    return idf


def _allow_open_files(maps: int) -> None:
    """Every memory map keeps a file open: raise this process's own limit, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = maps + _OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"the betons and label arrays are {maps} files to hold open, the system allows this process {hard}",
            allowed=f"a limit of {wanted} open files",
            mend=f"raise the hard limit of open files (`ulimit -Hn {wanted}` as root, or `nofile` in /etc/security/limits.conf)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _map_rows(out: Path, part: ShardPart, label_limit: int) -> np.memmap:
    rows = open_rows(out, part, label_limit)
    if rows is None:
        raise UserError(
            f"{rows_file(out, part)} is missing or not whole",
            allowed="an array of label rows, made from the label file of the same name",
            mend="start `train run --labels` again, which makes it; the folder has to be one that all nodes write to or each node its own",
        )
    return rows


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
