"""Small finished label datasets, made by the real label stage from tars written in code."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from labels.config import load_pipeline
from labels.storage import Layout
from preprocess.build import complete, make_build
from preprocess.readers.shards import find_shards
from preprocess.stage import BuildInputs, check_same_options, write_inputs

WORDS = ["red", "green", "blue", "cat", "dog", "house", "tree", "car", "boat", "sun", "moon", "star", "bird", "fish"]


def photo(seed: int, width: int, height: int, quality: int = 92) -> bytes:
    """A smooth random picture as JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_shards(folder: Path, counts: list[int]) -> Path:
    """A tar for each count; image sizes and captions vary with the sample's number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:08d}.tar", "w") as tar:
            for _ in range(count):
                rng = np.random.default_rng(number)
                caption = " ".join(rng.choice(WORDS, 4))
                image = photo(number, 40 + number % 50, 40 + number * 7 % 60)
                meta = {"uid": f"{number:032x}", "class": WORDS[number % 3]}
                for suffix, data in (("jpg", image), ("txt", caption.encode()), ("json", json.dumps(meta).encode())):
                    info = tarfile.TarInfo(f"{number:012d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return folder


def build_out(folder: Path, counts: list[int], *overrides: str) -> Path:
    """A finished label dataset whose betons have `counts` samples: a batch each, since one batch is one beton."""
    shards = find_shards([str(write_shards(folder / "shards", counts))]).shards
    out = folder / "out"
    build = make_build(Layout(out), load_pipeline(overrides=["build.workers=1", *overrides]), None)
    check_same_options(build, alone=True)
    inputs = BuildInputs("betons", [[shard] for shard in shards])
    write_inputs(build.layout, inputs)
    assert [part.samples for part in complete(build, inputs).betons] == counts
    return out
