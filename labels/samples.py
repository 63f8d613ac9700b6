"""Single samples of a label dataset: found by key or uid, or spread over the dataset.

key or uid -> `find_sample`: labels/*.parquet -> Sample -> `read_image`: beton, or image index and tar -> JPEG bytes
Sample.label_ids -> `Vocabulary`: idf.parquet -> Label: name, document frequency, IDF, target weight
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from labels import beton
from labels.idf import target_weights
from labels.manifest import BetonPart, Manifest, ShardPart, Source, open_image_index, read_sources
from labels.storage import Layout, UserError, is_remote, local_copy
from labels.tokenizers.tokenizer import name_of, text_of

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """One label row."""

    shard: ShardPart
    row: int  # number within its shard; `index`: within the dataset
    key: str
    uid: str | None
    width: int | None
    height: int | None
    token_ids: list[int]
    label_ids: list[int]
    repeats: int = 0  # further rows of the same sample

    @property
    def index(self) -> int:
        return self.shard.first_index + self.row


def find_sample(out: Path, manifest: Manifest, name: str, shard: str | None = None) -> Sample:
    """The sample with the key or uid `name`, in any shard or in the given one.

    UserError: there is none (the message says if it was quarantined), or several shards have one.
    """
    parts = {part.name: part for part in manifest.shards if shard in (None, part.name)}
    if not parts:
        allowed = _first_names([part.name for part in manifest.shards])
        raise UserError(f"{out} has no shard {shard!r}", allowed=allowed, fix="correct --shard")
    layout = Layout(out)
    try:
        shards = _shards_with(layout, list(parts), name)
        if len(shards) == 1:
            with local_copy(layout.label_file(shards[0])) as file:
                table = pq.read_table(file, columns=["key", "uid"]).to_pylist()
            rows = [row for row, names in enumerate(table) if name in names.values()]
            return read_samples(layout, parts[shards[0]], rows[:1], repeats=len(rows) - 1)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{layout.labels} cannot be read: {error}", fix=f"run `preprocess verify {out}`") from None
    if not shards:
        example = f'preprocess sql {out} "SELECT key, uid FROM labels LIMIT 5"'
        raise UserError(_why_missing(layout, name, out), fix=f"list samples: {example}")
    fix = "add --shard NAME, or give a uid"
    raise UserError(f"{name!r} is in {len(shards)} shards", allowed=_first_names(shards), fix=fix)


def _shards_with(layout: Layout, shards: list[str], name: str) -> list[str]:
    """The shards that have this key or uid, sorted; the label files are read in parallel."""
    files: list[Any] = [layout.label_file(shard) for shard in shards]
    if is_remote(layout.out):  # UPaths
        dataset = ds.dataset([file.path for file in files], format="parquet", filesystem=files[0].fs)
    else:
        dataset = ds.dataset([str(file) for file in files], format="parquet")
    matches = (ds.field("key") == name) | (ds.field("uid") == name)
    hits = dataset.to_table(columns=["__filename"], filter=matches)
    return sorted({Path(file).stem for file in hits["__filename"].to_pylist()})


def read_samples(layout: Layout, shard: ShardPart, rows: Sequence[int], repeats: int = 0) -> list[Sample]:
    """The label rows of one shard with these numbers, ascending."""
    with local_copy(layout.label_file(shard.name)) as file:
        table = pq.read_table(file).take(list(rows)).to_pylist()
    return [Sample(shard, row, repeats=repeats, **values) for row, values in zip(rows, table, strict=True)]


def spread_samples(layout: Layout, manifest: Manifest, count: int) -> list[Sample]:
    """`count` samples (all, if there are fewer) at even distances through the dataset, read shard by shard."""
    count = min(count, manifest.captions)
    indices = (2 * np.arange(count, dtype=np.int64) + 1) * manifest.captions // (2 * max(count, 1))
    firsts = np.array([part.first_index for part in manifest.shards])
    shard_numbers = np.searchsorted(firsts, indices, side="right") - 1
    samples: list[Sample] = []
    for number in np.unique(shard_numbers):
        shard = manifest.shards[int(number)]
        samples += read_samples(layout, shard, (indices[shard_numbers == number] - shard.first_index).tolist())
    return samples


def read_image(layout: Layout, manifest: Manifest, sample: Sample) -> bytes | None:
    """The sample's JPEG bytes from its beton, or from its tar by the image index; None if neither has it."""
    for part in manifest.betons:
        if sample.shard.name in part.shards:
            with local_copy(layout.beton_file(part.number)) as file:
                data = _from_beton(file, part, sample.index)
            if data is not None:
                return data
    for part in manifest.image_index:
        if sample.shard.name in part.shards:
            with local_copy(layout.image_index_file(part.number)) as file:
                spans = open_image_index(file)
                spans = spans[spans["index"] == sample.index]
            if len(spans):
                return _from_tar(read_sources(layout)[sample.shard.name], spans[0])
    return None


def _from_tar(source: Source, span: np.void) -> bytes | None:
    """The bytes of an IMAGE_SPAN; None if the tar is missing or has another length."""
    tar = Path(source.path)
    if not tar.is_file() or tar.stat().st_size != source.bytes:
        return None
    with tar.open("rb") as file:
        file.seek(int(span["offset"]))
        return file.read(int(span["bytes"]))


def _from_beton(file: Path, part: BetonPart, index: int) -> bytes | None:
    data = np.memmap(file, np.uint8, mode="r")
    header = data[: beton.HEADER.itemsize].view(beton.HEADER)[0]
    table_bytes = part.samples * beton.METADATA.itemsize
    metadata = data[beton.METADATA_OFFSET :][:table_bytes].view(beton.METADATA)
    positions = np.flatnonzero(metadata["index"] == index)
    if not len(positions):
        return None
    # the allocation table has two rows for each sample: image, labels
    offset = int(header["alloc_table_ptr"]) + 2 * int(positions[0]) * beton.ALLOCATION.itemsize
    image = data[offset:][: beton.ALLOCATION.itemsize].view(beton.ALLOCATION)[0]
    return bytes(data[int(image["ptr"]) :][: int(image["size"])])


def thumbnail(data: bytes, side: int) -> bytes | None:
    """The image as a JPEG of at most `side` pixels a side; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (side, side))
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def quarantined(layout: Layout, key: str, shard: str | None = None) -> list[tuple[str, str, str, str]]:
    """Shard, stage, reason and detail of the rejected samples with this key."""
    with local_copy(layout.quarantine) as file:
        rows = pq.read_table(file, filters=[("key", "==", key)]).to_pylist()
    return [(row["shard"], row["stage"], row["reason"], row["detail"]) for row in rows if shard in (None, row["shard"])]


def _why_missing(layout: Layout, name: str, out: Path) -> str:
    rows = [row for row in quarantined(layout, name) if row[1] == "labels"]
    rejected = [f"{reason} ({detail}), in shard {shard}" for shard, _, reason, detail in rows]
    why = f": it was rejected, {'; '.join(rejected[:_NAMES_SHOWN])}" if rejected else " as key or uid"
    return f"{out} has no label row {name!r}{why}"


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


@dataclass(frozen=True)
class Label:
    """One label of a caption."""

    token_id: int
    name: str
    document_frequency: int  # captions
    idf: float  # w_c
    weight: float  # t_c, its share of the loss's target


class Vocabulary:
    """The table of idf.parquet, by token id."""

    def __init__(self, layout: Layout, manifest: Manifest) -> None:
        with local_copy(layout.idf_parquet) as file:
            table = pq.read_table(file)
        self._tokens = table["token"]
        self.frequency: np.ndarray = table["document_frequency"].to_numpy()
        self.idf: np.ndarray = table["idf"].to_numpy()
        self._tokenizer = manifest.tokenizer.name

    def name(self, token_id: int) -> str:
        return name_of(self._tokens[token_id].as_py(), self._tokenizer)

    def text(self, token_ids: list[int]) -> str:
        return text_of([self._tokens[token_id].as_py() for token_id in token_ids], self._tokenizer)

    def labels(self, label_ids: list[int]) -> list[Label]:
        """The labels of one caption, largest weight first."""
        weights = target_weights(self.idf[label_ids]).tolist() if label_ids else []
        pairs = sorted(zip(weights, label_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        return [self.label(token_id, weight) for weight, token_id in pairs]

    def label(self, token_id: int, weight: float) -> Label:
        return Label(token_id, self.name(token_id), int(self.frequency[token_id]), float(self.idf[token_id]), weight)
