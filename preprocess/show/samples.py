"""Single samples of an OUT: found by key or uid, or picked all over it; their label rows and their images.

KEY|UID -> labels/*.parquet -> Sample -> the beton that holds its row -> JPEG bytes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from labels import beton
from labels.errors import UserError
from labels.files import is_remote, local_copy
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, ShardPart
from labels.places import Source, open_places, read_sources
from preprocess.counts import quoted
from preprocess.query import open_tables

_MATCHES_TOLD = 5


@dataclass(frozen=True)
class Sample:
    """One label row. `row` counts within its shard, `index` through all of OUT; `repeats`: further rows of the same sample."""

    shard: ShardPart
    row: int
    key: str
    uid: str | None
    width: int | None
    height: int | None
    token_ids: list[int]
    label_ids: list[int]
    repeats: int = 0

    @property
    def index(self) -> int:
        return self.shard.first_index + self.row


def find_sample(out: Path, manifest: Manifest, name: str, shard: str | None = None) -> Sample:
    """The sample with this key or uid.

    Args:
        out: a finished OUT.
        manifest: its manifest.
        name: key or uid.
        shard: look in this shard alone.

    Raises:
        UserError: there is none (if it was quarantined, that is told), or it stands in several shards.
    """
    by_name = {part.name: part for part in manifest.shards}
    if shard is not None and shard not in by_name:
        raise UserError(f"{out} has no shard {shard!r}", allowed=_some(list(by_name)), mend="mend --shard")
    layout = Layout(out if is_remote(out) else out.resolve())
    files = quoted(layout.labels / (f"{shard}.parquet" if shard else "*.parquet"))
    query = f"SELECT filename, file_row_number FROM read_parquet({files}, filename = true, file_row_number = true)"
    with open_tables(out) as con:
        found = [
            (Path(file).stem, int(row)) for file, row in con.execute(f"{query} WHERE key = $1 OR uid = $1 ORDER BY ALL", [name]).fetchall()
        ]
    if not found:
        raise UserError(_why_missing(layout, name, out), mend="look for it with preprocess sql, e.g. SELECT key, uid FROM labels LIMIT 5")
    shards = sorted({file for file, _ in found})
    if len(shards) > 1:
        raise UserError(
            f"{name!r} stands in {len(shards)} shards", allowed=_some(shards), mend="say which one with --shard NAME, or give a uid"
        )
    return read_samples(layout, by_name[shards[0]], [found[0][1]], repeats=len(found) - 1)[0]


def read_samples(layout: Layout, shard: ShardPart, rows: Sequence[int], repeats: int = 0) -> list[Sample]:
    """The label rows of one shard with these numbers, ascending."""
    with local_copy(layout.label_file(shard.name)) as file:
        table = pq.read_table(file).take(list(rows))
    return [Sample(shard=shard, row=row, repeats=repeats, **values) for row, values in zip(rows, table.to_pylist(), strict=True)]


def spread_samples(layout: Layout, manifest: Manifest, count: int) -> list[Sample]:
    """So many samples (or all, if there are fewer), at even distances through OUT, from few shards at a time."""
    count = min(count, manifest.captions)
    indices = (2 * np.arange(count, dtype=np.int64) + 1) * manifest.captions // (2 * max(count, 1))
    firsts = np.array([part.first_index for part in manifest.shards])
    places = np.searchsorted(firsts, indices, side="right") - 1
    samples: list[Sample] = []
    for place in np.unique(places):
        shard = manifest.shards[int(place)]
        samples += read_samples(layout, shard, (indices[places == place] - shard.first_index).tolist())
    return samples


def read_image(layout: Layout, manifest: Manifest, sample: Sample) -> bytes | None:
    """The sample's JPEG bytes from the beton that holds it, or from its tar where OUT has places; None if neither has it."""
    for part in manifest.betons:
        if sample.shard.name in part.shards:
            with local_copy(layout.beton_file(part.number)) as file:
                data = _from_beton(file, part, sample.index)
            if data is not None:
                return data
    for part in manifest.places:
        if sample.shard.name in part.shards:
            with local_copy(layout.place_file(part.number)) as file:
                found = open_places(file)
                found = found[found["index"] == sample.index]
            if len(found):
                return _from_tar(read_sources(layout)[sample.shard.name], int(found[0]["offset"]), int(found[0]["bytes"]))
    return None


def _from_tar(source: Source, offset: int, size: int) -> bytes | None:
    """A member's bytes; None if the tar is no longer there, or another one."""
    tar = Path(source.path)
    if not tar.is_file() or tar.stat().st_size != source.bytes:
        return None
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _from_beton(file: Path, part: BetonPart, index: int) -> bytes | None:
    data = np.memmap(file, np.uint8, mode="r")
    header = data[: beton.HEADER.itemsize].view(beton.HEADER)[0]
    metadata = data[beton.METADATA_OFFSET : beton.METADATA_OFFSET + part.samples * beton.METADATA.itemsize].view(beton.METADATA)
    found = np.flatnonzero(metadata["index"] == index)
    if not len(found):
        return None
    table_at = int(header["alloc_table_ptr"])
    # Two rows a sample, image then labels, in sample order.
    row = data[table_at + 2 * int(found[0]) * beton.ALLOCATION.itemsize :][: beton.ALLOCATION.itemsize].view(beton.ALLOCATION)[0]
    return bytes(data[int(row["ptr"]) : int(row["ptr"] + row["size"])])


def quarantined(layout: Layout, key: str, shard: str | None = None) -> list[tuple[str, str, str, str]]:
    """Shard, stage, reason and detail of what was left out under this key."""
    with local_copy(layout.quarantine) as file:
        rows = pq.read_table(file, filters=[("key", "==", key)]).to_pylist()
    return [(row["shard"], row["stage"], row["reason"], row["detail"]) for row in rows if shard in (None, row["shard"])]


def _why_missing(layout: Layout, name: str, out: Path) -> str:
    left_out = [f"{reason} ({detail}), in shard {shard}" for shard, stage, reason, detail in quarantined(layout, name) if stage == "labels"]
    told = f": it was left out, {'; '.join(left_out[:_MATCHES_TOLD])}" if left_out else " as key or uid"
    return f"{out} has no label row {name!r}{told}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MATCHES_TOLD} more" if len(names) > _MATCHES_TOLD else ""
    return ", ".join(names[:_MATCHES_TOLD]) + more
