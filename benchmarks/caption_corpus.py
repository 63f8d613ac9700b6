"""Captions for the benchmarks: real web captions recombined into any number of rows, with a growing vocabulary.

A row is the first half of one caption and the second half of another; one row in 20 ends in a new, made-up word.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

ROWS_AT_ONCE = 1 << 18
NEW_WORD_EVERY = 20
_SYLLABLES = pa.array([first + second for first in "bdfgklmnprstvz" for second in "aeiou"], pa.large_string())


def recombined(captions: list[str], rows: int, seed: int = 0) -> Iterator[pa.LargeStringArray]:
    """`rows` captions in arrays of at most ROWS_AT_ONCE."""
    draw = np.random.default_rng(seed)
    words = [text.split(" ") for text in captions]
    first = pa.array([" ".join(line[: len(line) // 2]) for line in words], pa.large_string())
    second = pa.array([" ".join(line[len(line) // 2 :]) for line in words], pa.large_string())
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        ends = pa.array([""], pa.large_string()).take(pa.array(np.zeros(count, np.int64)))
        made_up = [_SYLLABLES.take(pa.array(draw.integers(0, len(_SYLLABLES), count))) for _ in range(4)]
        new = pc.binary_join_element_wise(pa.scalar(" ", pa.large_string()), *made_up, pa.scalar("", pa.large_string()))
        ends = pc.if_else(pa.array(np.arange(count) % NEW_WORD_EVERY == 0), new, ends)
        halves = [half.take(pa.array(draw.integers(0, len(captions), count))) for half in (first, second)]
        text = pc.binary_join_element_wise(*halves, pa.scalar(" ", pa.large_string()))
        yield pc.binary_join_element_wise(text, ends, pa.scalar("", pa.large_string()))


def write_tables(folder: Path, captions: list[str], rows: int, files: int) -> None:
    """`files` Parquet files as DataComp's metadata: uid and text."""
    folder.mkdir(parents=True, exist_ok=True)
    each = rows // files
    for number in range(files):
        draw = np.random.default_rng(number)
        with pq.ParquetWriter(
            folder / f"{number:08d}.parquet", pa.schema([("uid", pa.string()), ("text", pa.string())])
        ) as writer:
            for text in recombined(captions, each, seed=number):
                raw = draw.bytes(16 * len(text)).hex()
                buffers = [
                    None,
                    pa.py_buffer(np.arange(0, 32 * len(text) + 1, 32, dtype=np.int32)),
                    pa.py_buffer(raw.encode()),
                ]
                uids = pa.StringArray.from_buffers(len(text), buffers[1], buffers[2])
                writer.write_table(pa.table({"uid": uids, "text": text.cast(pa.string())}))


def write_tars(folder: Path, captions: list[str], shards: int, samples: int, image_bytes: int) -> None:
    """Tars as img2dataset writes them: jpg, txt, json, every member with a PAX header; the images are noise of about
    that size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    side = 64
    while True:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(
            buffer, "JPEG", quality=85
        )
        if buffer.tell() >= image_bytes:
            break
        side += 16
    image = buffer.getvalue()
    for shard in range(shards):
        [texts] = recombined(captions, samples, seed=1000 + shard)
        with tarfile.open(folder / f"{shard:08d}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for number, text in enumerate(texts.to_pylist()):
                key = f"{shard:05d}{number:04d}"
                about = {
                    "uid": f"{shard * samples + number:032x}",
                    "url": f"http://example.org/images/{key}.jpg",
                    "caption": text,
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": side,
                    "height": side,
                    "original_width": 640,
                    "original_height": 480,
                    "exif": "{}",
                    "sha256": "0" * 64,
                    "face_bboxes": [],
                }
                members = {"jpg": image, "json": json.dumps(about, indent=4).encode(), "txt": text.encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mtime = len(data), 1700000000.25  # type: ignore[assignment]
                    archive.addfile(info, io.BytesIO(data))
