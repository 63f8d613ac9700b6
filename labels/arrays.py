"""Label files as padded arrays that can be memory-mapped: what lets betons be used with labels made later, in another
OUT.

OUT/labels/<shard>.parquet -> OUT/rows/<shard>-<SHA-256 of that label file, 16 digits>.npy, int32 [rows, K], K = the label limit
                              `label_ids`; or `token_ids`, the caption in its order: .tokens.npy, the same shape

The name says which label file an array belongs to, so a rebuilt label file never meets an old array, at whatever moment
a process was killed. Arrays are a cache: they may be deleted at any time.
"""

from glob import escape
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from labels.manifest import PAD_ID, Manifest, ShardPart
from labels.storage import Layout, UserError, own_partials, sha256_file, write_whole

# ---- sparse: Sparse label sets: a flat id array with offsets, and the padded rows that betons hold.
#
# Shapes: N captions, K label limit, T total number of ids.


def unique_sorted(ids: np.ndarray, offsets: np.ndarray, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label set of every caption: its ids sorted, once each, without the excluded ones.

    Args:
        ids: int32 [T], token ids of all captions one after another.
        offsets: int64 [N + 1], where each caption begins; offsets[0] = 0, offsets[N] = T.
        excluded: int32 [E], ids that are no labels (special tokens).

    Returns:
        ids int32 [T'], offsets int64 [N + 1].
    """
    rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    # One sort of (row, id) as a single integer: both fit, since ids are 31 bits and rows below 2^32.
    packed = np.unique((rows << 31) | ids.astype(np.int64))
    label_ids = (packed & ((1 << 31) - 1)).astype(np.int32)
    keep = ~np.isin(label_ids, excluded)
    kept_rows = (packed >> 31)[keep]
    counts = np.bincount(kept_rows, minlength=len(offsets) - 1)
    return label_ids[keep], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def pad_rows(ids: np.ndarray, offsets: np.ndarray, limit: int) -> np.ndarray:
    """Padded form of sparse rows.

    Args:
        ids: int32 [T].
        offsets: int [N + 1].
        limit: K, the width of a row.

    Returns:
        int32 [N, K], each row ascending as given and filled up with `PAD_ID`.

    Raises:
        ValueError: a row holds more than `limit` ids.
    """
    lengths = np.diff(offsets)
    if lengths.size and lengths.max() > limit:
        raise ValueError(f"a row holds {lengths.max()} labels, more than the limit of {limit}")
    padded = np.full((len(lengths), limit), PAD_ID, dtype=np.int32)
    padded[np.arange(limit) < lengths[:, None]] = ids[offsets[0] : offsets[-1]]
    return padded


def unpad_rows(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `pad_rows`: int32 [N, K] to ids int32 [T] and offsets int64 [N + 1]."""
    valid = padded != PAD_ID
    offsets = np.concatenate([[0], np.cumsum(valid.sum(axis=1))]).astype(np.int64)
    return padded[valid].astype(np.int32), offsets


Column = Literal["label_ids", "token_ids"]
"""Which column of the label files an array holds."""
_ENDINGS: dict[Column, str] = {"label_ids": ".npy", "token_ids": ".tokens.npy"}
_ROWS_AT_ONCE = 8_192
_SHA_DIGITS = 16


def rows_folder(out: Path) -> Path:
    """Where the arrays of an OUT lie."""
    return out / "rows"


def rows_file(out: Path, part: ShardPart, column: Column = "label_ids") -> Path:
    """Where the array of one shard's label file lies."""
    return rows_folder(out) / f"{part.name}-{part.labels_sha256[:_SHA_DIGITS]}{_ENDINGS[column]}"


def check_same_rows(out: Path, manifest: Manifest, other_out: Path, other: Manifest) -> None:
    """Refuse labels of other rows: shards must agree in name, number of rows and keys, in order.

    Args:
        out, manifest: of the betons.
        other_out, other: of the labels.

    Raises:
        UserError: naming the first shard that differs, with both values.
    """
    for part, other_part in zip_longest(manifest.shards, other.shards):
        if part is None or other_part is None or _identity(part) != _identity(other_part):
            raise UserError(
                f"{other_out} holds labels of other rows than {out}. The first shard that differs: "
                f"{_told(other_part)} in {other_out}, {_told(part)} in {out}",
                allowed="the same shards with the same keys, in the same order",
                fix=f"run `preprocess build-labels DATA --out {other_out} --no-beton --overwrite` with the DATA of {out} "
                "and the options that are wanted",
            )


def shards_needed(manifest: Manifest, other: Manifest, column: Column = "label_ids") -> list[ShardPart]:
    """The shards whose arrays are needed to use the images of `manifest` with the labels of `other`, which has the same
    rows.

    Returns:
        The shards that have samples, in the order of their rows; none where the label rows are equal (only the IDF
        differs) and betons hold them, which they do of `label_ids` alone. The array of the sample with position `index`
        is that of the last shard with first_index <= index.
    """
    in_betons = column == "label_ids" and bool(manifest.betons)
    if in_betons and (manifest.fingerprint, manifest.label_limit) == (other.fingerprint, other.label_limit):
        return []
    used = {name for part in [*manifest.betons, *manifest.image_index] for name in part.shards}
    return [part for part in other.shards if part.name in used]


def _identity(part: ShardPart) -> tuple[str, int, str]:
    return part.name, part.rows, part.keys_sha256


def _told(part: ShardPart | None) -> str:
    return (
        f"{part.name} with {part.rows} rows, SHA-256 of the keys {part.keys_sha256[:_SHA_DIGITS]}..."
        if part
        else "no further shard"
    )


def open_rows(out: Path, part: ShardPart, label_limit: int, column: Column = "label_ids") -> np.memmap | None:
    """The array of one shard, mapped read-only: int32 [rows, K]; None if it is not there or not whole.

    Args:
        out: OUT of the labels.
        part: the shard, with at least one row.
        label_limit: K.
        column: of the label file.
    """
    path = rows_file(out, part, column)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = isinstance(rows, np.memmap) and rows.dtype == np.dtype("<i4") and rows.shape == (part.rows, label_limit)
    # Rows follow one another in memory, and nothing follows them in the file.
    whole = fits and rows.flags.c_contiguous and rows.offset + rows.nbytes == path.stat().st_size
    return rows if whole else None


def write_rows(out: Path, part: ShardPart, label_limit: int, column: Column = "label_ids") -> Path:
    """Make the array of one shard from its label file, a few thousand rows in memory at a time; older arrays of it are
    removed.

    Args:
        out: OUT of the labels.
        part: the shard.
        label_limit: K.
        column: of the label file.

    Returns:
        Path of the array.

    Raises:
        UserError: the label file is not the one of the manifest, or OUT cannot be written.
    """
    path, source = rows_file(out, part, column), Layout(out).label_file(part.name)
    fix = f"run `preprocess verify {out}`, then its build-labels command again"
    if not source.is_file():
        raise UserError(f"{source} is missing", fix=fix)
    found = sha256_file(source)
    if found != part.labels_sha256:
        raise UserError(
            f"{source} changed since the build: SHA-256 {found[:_SHA_DIGITS]}..., in the manifest {part.labels_sha256[:_SHA_DIGITS]}...",
            fix=fix,
        )
    try:
        with own_partials():  # several runs may be started with the same labels at the same time
            write_whole(path, lambda partial: _pad_file(source, partial, part.rows, label_limit, column))
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise UserError(f"{source} does not fit its manifest: {error}", fix=fix) from None
    for old in path.parent.glob(f"{escape(part.name)}-{'[0-9a-f]' * _SHA_DIGITS}{_ENDINGS[column]}"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _pad_file(source: Path, target: Path, rows: int, label_limit: int, column: Column) -> None:
    written = 0
    # pre_buffer would keep the whole column of the file in memory.
    with open(target, "wb") as file, pq.ParquetFile(source, pre_buffer=False) as table:
        header = {"descr": "<i4", "fortran_order": False, "shape": (rows, label_limit)}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            lists = batch.column(0)
            file.write(
                pad_rows(lists.values.to_numpy(), lists.offsets.to_numpy(), label_limit).astype("<i4", copy=False).data
            )
            written += len(lists)
    if written != rows:
        raise ValueError(f"it holds {written} rows, in the manifest {rows}")
