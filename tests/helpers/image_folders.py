"""What several tests share: image folders."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def encoded(colour: tuple[int, ...] | int = (255, 0, 0), kind: str = "PNG", mode: str = "RGB", size=(12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_folders(directory: Path, counts: dict[str, int], start: int = 0) -> Path:
    for label, count in counts.items():
        (directory / label).mkdir(parents=True)
        for index in range(start, start + count):
            (directory / label / f"{index}.png").write_bytes(encoded((index % 256, *label.ljust(2).encode()[:2])))
    return directory


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, label, image: bytes | None = None) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", image or encoded(kind="JPEG")),
        (f"{key}.json", json.dumps({"class": label}).encode()),
        (f"{key}.txt", b"x"),
    ]
