"""Inputs that all cells of an ablation share: settings, tokenizers, label sets, and shrunk drawings with their classes.

DATA/{train,test}/**/*.tar -> WORK/settings.yaml  untrained/config.yaml  tokenizers/<set>.json
                              labels/<set>/ (the first one with betons)
                              evaluation/{train,test}.parquet (image: PNG bytes, class: text)
"""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from ablation_grid import EvaluationSet, Grid
from labels.config import dump_yaml, load_pipeline
from labels.storage import UserError, write_json, write_whole

_PARTS = ("train", "test")
_SCHEMA = pa.schema([("image", pa.binary()), ("class", pa.string())])


def write_settings(grid: Grid, work: Path) -> None:
    """Write settings.yaml for all commands, and the full configuration for the untrained trunk.

    Raises:
        UserError: a key that is not allowed.
    """
    text = yaml.safe_dump(grid.settings, sort_keys=False)
    write_whole(work / "settings.yaml", lambda partial: partial.write_text(text, encoding="utf8"))
    dump_yaml(work / "untrained" / "config.yaml", load_pipeline(work / "settings.yaml"), exclude={"recipes": True})


def make_labels(grid: Grid, name: str, data: Path, work: Path) -> None:
    """Build a label set with `preprocess train-tokenizer` and `build-labels`, which are resumable; betons only for the
    first set.

    Raises:
        UserError: a command failed; its output is above.
    """
    labels, words = grid.labels[name], ["--config", str(work / "settings.yaml")]
    overrides = dict(labels.set)
    if labels.tokenizer:
        trained = work / "tokenizers" / f"{name}-{labels.tokenizer.vocab_size}.json"
        options = ["--kind", labels.tokenizer.kind, "--vocab-size", str(labels.tokenizer.vocab_size)]
        if not trained.is_file():
            _preprocess("train-tokenizer", str(data / "train"), *options, "--out", str(trained), *words)
        overrides["tokenizer"] = str(trained)
    for key, value in overrides.items():
        words += ["--set", f"labels.{key}={json.dumps(value)}"]
    if name != grid.first_labels:
        words.append("--no-beton")
    _preprocess("build-labels", str(data / "train"), "--out", str(work / "labels" / name), *words)


def _preprocess(*words: str) -> None:
    print(f"== preprocess {' '.join(words)}", flush=True)
    if subprocess.run([sys.executable, "-m", "preprocess", *words]).returncode:
        raise UserError(f"`preprocess {words[0]}` failed", fix="see its output above")


def make_evaluation_set(settings: EvaluationSet, data: Path, folder: Path) -> None:
    """Write both parts with their classes, each image shrunk to a shorter side of `settings.side` pixels; skipped if it
    exists.

    Excluded: classes with fewer than `settings.least` training drawings, and training drawings that equal a test
        drawing at that size.

    Raises:
        UserError: no shards with classes in DATA/train or DATA/test.
    """
    marker = folder / "evaluation.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf8"))["settings"] == settings.model_dump():
        return
    parts = {part: list(_drawings(data / part, settings.side)) for part in _PARTS}
    counts, tested = Counter(name for _, name in parts["train"]), {image for image, _ in parts["test"]}
    for part, drawings in parts.items():
        used = [
            (image, name)
            for image, name in drawings
            if counts[name] >= settings.least and (part == "test" or image not in tested)
        ]
        if not used:
            raise UserError(
                f"{data / part} has no shards with drawings of classes",
                fix="name the folder that make_shards.py wrote",
            )
        table = pa.table({"image": [image for image, _ in used], "class": [name for _, name in used]}, schema=_SCHEMA)
        write_whole(folder / f"{part}.parquet", lambda partial, table=table: pq.write_table(table, partial))
        parts[part] = used
    found: dict[str, Any] = {
        part: dict(sorted(Counter(name for _, name in drawings).items())) for part, drawings in parts.items()
    }
    write_json(marker, {"settings": settings.model_dump(), **found})


def _drawings(folder: Path, side: int) -> Iterator[tuple[bytes, str]]:
    """PNG bytes and class of every sample, in the order of the shards."""
    for shard in sorted(folder.rglob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar}
            for name in members:
                stem, dot, ending = name.partition(".")
                if ending != "jpg" or (about := members.get(f"{stem}{dot}json")) is None:
                    continue
                label = json.loads(tar.extractfile(about).read())["class"]  # type: ignore[union-attr]  # a plain file
                yield _shrunk(tar.extractfile(members[name]).read(), side), label  # type: ignore[union-attr]


def _shrunk(jpeg: bytes, side: int) -> bytes:
    image, stream = Image.open(io.BytesIO(jpeg)).convert("RGB"), io.BytesIO()
    scale = side / min(image.size)
    size = (max(round(image.width * scale), side), max(round(image.height * scale), side))
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
