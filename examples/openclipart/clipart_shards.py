"""Writes samples the way img2dataset and DataComp lay them out.

    SPLIT/shards/00000000.tar            KEY.jpg, KEY.txt, KEY.json of each sample, next to each other
    SPLIT/shards/00000000.parquet        the json's fields, one row a sample
    SPLIT/metadata/00000000.parquet      DataComp's pool metadata, one row a sample
    SPLIT/shards/00000000_stats.json     written last: the shard is complete

The bytes depend on the samples only: no times, owners or host names go in.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipart_pairs import Sample

# As in DataComp: a key is SHARD * 10,000 + index, in 12 digits.
LARGEST_SHARD = 10_000

SIDE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("url", "caption", "uid", "key", "status", "error_message")]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [(name, pa.string()) for name in ("exif", "sha256", "class")]
)
METADATA_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("clip_b32_similarity_score", pa.float32()),
        ("clip_l14_similarity_score", pa.float32()),
        ("face_bboxes", pa.list_(pa.list_(pa.float64()))),
        ("sha256", pa.string()),
    ]
)


def sample_json(sample: Sample, key: str) -> dict[str, object]:
    """The fields img2dataset stores next to an image, and the class label."""
    picture = sample.picture
    return {
        "url": sample.url,
        "caption": sample.caption,
        "uid": sample.uid,
        "face_bboxes": [],
        "key": key,
        "status": "success",
        "error_message": None,
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "exif": "{}",
        "sha256": sample.png_sha256,
        "class": sample.class_name,
    }


def metadata_row(sample: Sample) -> dict[str, object]:
    """A row of DataComp's pool metadata; nobody has computed CLIP scores for clip art."""
    return {
        "uid": sample.uid,
        "url": sample.url,
        "text": sample.caption,
        "original_width": sample.picture.original_width,
        "original_height": sample.picture.original_height,
        "clip_b32_similarity_score": None,
        "clip_l14_similarity_score": None,
        "face_bboxes": [],
        "sha256": sample.png_sha256,
    }


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file; TarInfo's defaults are time 0, owner 0 and mode 0644."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(rows: list[dict[str, object]], schema: pa.Schema, path: Path) -> None:
    """Writes rows; keys that the schema lacks are dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_shard(split_folder: Path, shard: int, samples: Sequence[Sample]) -> None:
    """Writes one shard's four files; its _stats.json comes last."""
    shards = split_folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    name = f"{shard:08d}"
    rows: list[dict[str, object]] = []
    with tarfile.open(shards / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, sample in enumerate(samples):
            key = f"{shard * LARGEST_SHARD + index:012d}"
            row = sample_json(sample, key)
            rows.append(row)
            add_member(tar, f"{key}.jpg", sample.picture.jpeg)
            add_member(tar, f"{key}.txt", sample.caption.encode())
            add_member(tar, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())
    write_parquet(rows, SIDE_SCHEMA, shards / f"{name}.parquet")
    pool_rows = [metadata_row(sample) for sample in samples]
    write_parquet(pool_rows, METADATA_SCHEMA, split_folder / "metadata" / f"{name}.parquet")
    stats = {
        "count": len(samples),
        "successes": len(samples),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0,
        "start_time": 0,
        "end_time": 0,
        "status_dict": {"success": len(samples)},
    }
    (shards / f"{name}_stats.json").write_text(json.dumps(stats, indent=4) + "\n", encoding="utf-8")
