"""README.md: short, with a picture and a reading tour of files that exist. Its commands: test_docs.py; SQL:
test_cookbook.py.
"""

import re
from pathlib import Path

from PIL import Image

from doc_commands import blocks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120
    [first, *_] = blocks(ROOT / "README.md")
    assert re.findall(r"^make (\w+)", first.text, re.MULTILINE) == ["demo", "test"]


def test_the_picture_is_small_and_a_make_target_makes_it() -> None:
    [name] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert (ROOT / name).stat().st_size < 100_000
    with Image.open(ROOT / name) as picture:
        picture.verify()
    assert name in (ROOT / "Makefile").read_text().split("\npicture:")[1]


def test_the_reading_tour_is_the_core_path() -> None:
    files = re.findall(r"^\| \[(\S+)\]\(\1\) \|", README, re.MULTILINE)
    assert len(files) == 13
    lines = sum(len((ROOT / name).read_text("utf8").splitlines()) for name in files)
    [stated] = re.findall(r"13 files, about ([0-9,]+) lines", README)
    assert abs(int(stated.replace(",", "")) - lines) < 0.1 * lines, lines
