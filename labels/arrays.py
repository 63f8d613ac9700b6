"""Label rows as padded arrays, memory-mapped, so that betons can be used with labels made later in another folder.

    labels/<shard>.parquet -> rows/<shard>-<SHA-256 of that file, 16 digits>.npy          label_ids, int32 [rows, K]
                           -> rows/<shard>-<SHA-256 of that file, 16 digits>.tokens.npy   token_ids, int32 [rows, K]

The hash in the name ties an array to its label file, so that an array of an older label file is never read. Arrays are
a cache: they may be deleted at any time. Shapes: N captions, K the label limit, T number of ids in all captions.
"""

from glob import escape
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from labels.manifest import PAD_ID, Manifest, ShardPart
from labels.storage import Layout, UserError, library_path, own_partials, sha256_file, write_whole


def unique_sorted(ids: np.ndarray, offsets: np.ndarray, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label set of every caption: its distinct ids, ascending, without the `excluded` ones (special tokens).

    ids int32 [T] of captions that begin at offsets int64 [N + 1] -> ids int32 [T'], offsets int64 [N + 1].
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
    """ids int32 [T] and offsets [N + 1] -> int32 [N, K], filled with `PAD_ID`. ValueError: a row is longer than K."""
    lengths = np.diff(offsets)
    if lengths.size and lengths.max() > limit:
        raise ValueError(f"a row holds {lengths.max()} labels, more than the limit of {limit}")
    padded = np.full((len(lengths), limit), PAD_ID, dtype=np.int32)
    padded[np.arange(limit) < lengths[:, None]] = ids[offsets[0] : offsets[-1]]
    return padded


Column = Literal["label_ids", "token_ids"]
"""The column of the label files that an array holds."""
_ENDINGS: dict[Column, str] = {"label_ids": ".npy", "token_ids": ".tokens.npy"}
_ROWS_AT_ONCE = 8_192
_SHA_DIGITS = 16


def rows_folder(out: Path) -> Path:
    return out / "rows"


def rows_file(out: Path, part: ShardPart, column: Column = "label_ids") -> Path:
    return rows_folder(out) / f"{part.name}-{part.labels_sha256[:_SHA_DIGITS]}{_ENDINGS[column]}"


def check_same_rows(out: Path, manifest: Manifest, other_out: Path, other: Manifest) -> None:
    """Raise a UserError unless betons (`out`, `manifest`) and labels (`other_out`, `other`) have the same rows.

    Shards must agree in name, number of rows and keys, in order; the error names the first that differs.
    """
    for part, other_part in zip_longest(manifest.shards, other.shards):
        if part is None or other_part is None or _identity(part) != _identity(other_part):
            raise UserError(
                f"{other_out} holds labels of other rows than {out}. The first shard that differs: "
                f"{_described(other_part)} in {other_out}, {_described(part)} in {out}",
                allowed="the same shards with the same keys, in the same order",
                fix=f"run `preprocess build-labels DATA --out {other_out} --no-beton --overwrite` with the DATA of "
                f"{out} and the options that are wanted",
            )


def shards_needed(manifest: Manifest, other: Manifest, column: Column = "label_ids") -> list[ShardPart]:
    """The shards whose arrays are needed to train on the images of `manifest` with the labels of `other`, in row order.

    None are needed if the betons already hold the same label rows (only the IDF differs); betons hold `label_ids` only.
    The sample with position `index` is in the array of the last shard with first_index <= index.
    """
    in_betons = column == "label_ids" and bool(manifest.betons)
    if in_betons and (manifest.fingerprint, manifest.label_limit) == (other.fingerprint, other.label_limit):
        return []
    used = {name for part in [*manifest.betons, *manifest.image_index] for name in part.shards}
    return [part for part in other.shards if part.name in used]


def _identity(part: ShardPart) -> tuple[str, int, str]:
    return part.name, part.rows, part.keys_sha256


def _described(part: ShardPart | None) -> str:
    if part is None:
        return "no further shard"
    return f"{part.name} with {part.rows} rows, SHA-256 of the keys {part.keys_sha256[:_SHA_DIGITS]}..."


def open_rows(out: Path, part: ShardPart, label_limit: int, column: Column = "label_ids") -> np.memmap | None:
    """The array of one shard, mapped read-only: int32 [rows, K]; None if it is missing or truncated."""
    path = rows_file(out, part, column)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = isinstance(rows, np.memmap) and rows.dtype == np.dtype("<i4") and rows.shape == (part.rows, label_limit)
    # Rows are contiguous, and nothing follows them in the file.
    complete = fits and rows.flags.c_contiguous and rows.offset + rows.nbytes == path.stat().st_size
    return rows if complete else None


def write_rows(out: Path, part: ShardPart, label_limit: int, column: Column = "label_ids") -> Path:
    """Make the array of one shard from its label file, remove its older arrays, and return its path.

    UserError: the label file is not the one of the manifest, or the output folder cannot be written.
    """
    path, source = rows_file(out, part, column), Layout(out).label_file(part.name)
    fix = f"run `preprocess verify {out}`, then its build-labels command again"
    if not source.is_file():
        raise UserError(f"{source} is missing", fix=fix)
    digest, built = sha256_file(source), part.labels_sha256
    if digest != built:
        digests = f"SHA-256 {digest[:_SHA_DIGITS]}..., in the manifest {built[:_SHA_DIGITS]}..."
        raise UserError(f"{source} changed since the build: {digests}", fix=fix)
    try:
        with own_partials():  # several runs may start with the same labels at the same time
            write_whole(path, lambda partial: _pad_file(library_path(source), partial, part.rows, label_limit, column))
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
            padded = pad_rows(lists.values.to_numpy(), lists.offsets.to_numpy(), label_limit)
            file.write(padded.astype("<i4", copy=False).data)
            written += len(lists)
    if written != rows:
        raise ValueError(f"it holds {written} rows, in the manifest {rows}")
