"""Tiny webdataset shards made in code, the command run in this process, and a label dataset as comparable values."""

import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duckdb
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from labels.storage import UserError, library_path
from preprocess.cli import main

Member = tuple[str, bytes]
CAPTIONS = (
    "a red cat",
    "two dogs, a cat and the sea",
    "Ünïcode &amp;amp; “quotes”",
    "犬と猫",
    "the the the",
    "a boat 🛶 on a lake at 10:30",
)


@dataclass(frozen=True)
class Built:
    """A folder of shards and the output folder built from it."""

    data: Path
    out: Path


def pixels(seed: int, width: int = 32, height: int = 32) -> np.ndarray:
    """Noise, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """The file's bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, width: int = 32, height: int = 32) -> bytes:
    """A plain RGB JPEG."""
    return encode(Image.fromarray(pixels(seed, width, height)), quality=90)


def sample(
    key: str, text: str | bytes | None = "a cat", image: bytes | None = None, /, **metadata: Any
) -> list[Member]:
    """The members of one sample; no txt if `text` is None, no json without metadata."""
    members = [(f"{key}.jpg", jpeg() if image is None else image)]
    if text is not None:
        members.append((f"{key}.txt", text.encode() if isinstance(text, str) else text))
    if metadata:
        members.append((f"{key}.json", json.dumps(metadata).encode()))
    return members


def healthy(count: int, first: int = 0, side: int = 32) -> list[Member]:
    """`count` good samples in img2dataset's form, all different."""
    return [
        member
        for number in range(first, first + count)
        for member in sample(
            f"{number:09d}",
            f"{CAPTIONS[number % len(CAPTIONS)]} {number % 17}",
            jpeg(number, side, side),
            uid=f"{number:032x}",
            width=side,
            height=side,
            key=f"{number:09d}",
        )
    ]


def tar_bytes(members: Iterable[Member]) -> bytes:
    """A whole tar, with its end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    """Write one shard, with its folder; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def write_shards(folder: Path, shards: int, samples: int) -> Path:
    """Shards 00000000.tar, ... of healthy samples; the folder."""
    for shard in range(shards):
        write_tar(folder / f"{shard:08d}.tar", healthy(samples, first=shard * samples))
    return folder


@dataclass(frozen=True)
class Said:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def preprocess(*arguments: object) -> Said:
    """`preprocess ARGUMENTS` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["preprocess", *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())


def build(data: Path | Sequence[Path | str], out: Path, *options: object, workers: int = 1) -> None:
    """`preprocess build-labels` that has to succeed."""
    sources = [data] if isinstance(data, Path) else data
    said = preprocess("build-labels", *sources, "--out", out, "--workers", workers, *options)
    assert said.code == 0, said.err


def refused(data: Path | Sequence[Path | str], out: Path, *options: object) -> str:
    """The message of a `preprocess build-labels` that has to fail as a user's error."""
    sources = [data] if isinstance(data, Path) else data
    said = preprocess("build-labels", *sources, "--out", out, "--workers", 1, *options)
    assert said.code == 2, said.out
    return said.err[said.err.index("error: ") :]


def rows(out: Path) -> list[dict[str, Any]]:
    """All label rows, through the label files in file-name order."""
    files = sorted((library_path(out) / "labels").glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def quarantined(out: Path) -> list[tuple[str, str, str, str]]:
    """Shard, key, stage and reason of every rejected sample."""
    return [
        (row["shard"], row["key"], row["stage"], row["reason"])
        for row in pq.read_table(out / "quarantine.parquet").to_pylist()
    ]


def contents(out: Path) -> dict[str, Any]:
    """Every file of a label dataset: its bytes, or for idf.duckdb the rows of its tables."""
    files: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }
    with duckdb.connect(str(out / "idf.duckdb"), read_only=True) as con:
        files["idf.duckdb"] = [con.execute(f"FROM {table}").fetchall() for table in ("tokens", "corpus", "shards")]
    return files


def flip_bit(path: Path, share: float = 0.5) -> None:
    """Flip one bit at that share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 1
    path.write_bytes(data)


def leave_pid_and_sleep(folder: str) -> None:
    """A task for a worker process: write its process id, then sleep longer than any test."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def end_without_a_word(how: str) -> str:
    """A task that ends its worker process: `exit`, `kill`, or not at all."""
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise UserError("this task is the user's mistake", allowed="another", fix="fix it")
    return how
