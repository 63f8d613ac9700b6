"""Labelled images for evaluators: folders of classes, tars, and images in shades of one colour."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(colour: tuple[int, ...] | int = (255, 0, 0), kind: str = "PNG", mode: str = "RGB", size=(12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_folders(directory: Path, counts: dict[str, int], start: int = 0) -> Path:
    for label, count in counts.items():
        (directory / label).mkdir(parents=True)
        for index in range(start, start + count):
            (directory / label / f"{index}.png").write_bytes(encoded((index % 256, *os.fsencode(label).ljust(2)[:2])))
    return directory


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, label, image: bytes | None = None, **others) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", image or encoded(kind="JPEG")),
        (f"{key}.json", json.dumps({"class": label, **others}).encode()),
        (f"{key}.txt", b"x"),
    ]


def colours(folder: Path, labels: tuple[str, ...]) -> None:
    """A data set of plain images in shades of their class's colour: 5 of each class to train on, 3 to test."""
    random = np.random.default_rng(len(labels))
    for part, count in (("train", 5), ("test", 3)):
        write_folders(folder / part, dict.fromkeys(labels, count))
        for file in sorted((folder / part).rglob("*.png")):
            shade = random.integers(0, 120, 3) + 120 * np.array(
                [file.parent.name == colour for colour in ("red", "green", "blue")]
            )
            file.write_bytes(encoded(tuple(int(value) for value in shade)))
