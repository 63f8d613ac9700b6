"""Tests for examples/scenes: coloured squares stand in for the clip art."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from example_scripts import EXAMPLES, script

scene = script("scene")
words = script("words")
make_scenes = script("make_scenes")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive with a striped square for every drawing."""
    root = tmp_path_factory.mktemp("clipart")
    for number, path in enumerate(path for paths in scene.CATEGORIES.values() for path in paths):
        drawing = Image.new("RGBA", (60, 50), (0, 0, 0, 0))
        ImageDraw.Draw(drawing).rectangle((5, 5, 50, 44), fill=(255, 255, 255, 255))
        ImageDraw.Draw(drawing).rectangle((10, 5, 12 + number % 9, 44), fill=(90, 90, 90, 255))
        (root / "png" / path).parent.mkdir(parents=True, exist_ok=True)
        drawing.save(root / "png" / path)
    return root


def run(tree: Path, out: Path, *more: object) -> str:
    command = [sys.executable, EXAMPLES / "scenes" / "make_scenes.py", "--tree", tree, "--out", out, *more]
    small = ["--train", 1200, "--labelled", 30, "--test", 40, "--workers", 1]
    done = subprocess.run([str(word) for word in [*command, *small]], capture_output=True, text=True, check=True)
    return done.stderr


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def described(tar: Path) -> list[dict[str, Any]]:
    return [json.loads(data) for name, data in members(tar).items() if name.endswith(".json")]


def test_shards_are_a_function_of_the_seed_and_are_made_once(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert "1,270 scenes in 4 shards, 1,270 of them made now" in run(tree, out, "--noise", "0.6")
    shards = {path: path.read_bytes() for path in sorted(out.rglob("*.tar"))}
    assert [str(path.relative_to(out)) for path in shards] == [
        "labelled/00000000.tar",
        "test/00000000.tar",
        "train/00000000.tar",
        "train/00000001.tar",
    ]
    second = out / "train" / "00000001.tar"
    second.write_bytes(b"cut")
    second.with_name("00000001_stats.json").unlink()
    assert "200 of them made now" in run(tree, out, "--noise", "0.6")
    assert {path: path.read_bytes() for path in shards} == shards
    # Other options: all shards of the training split are made again, with the same pictures.
    assert "1,200 of them made now" in run(tree, out, "--noise", "0")
    assert shards[second] != second.read_bytes()
    assert Image.open(io.BytesIO(members(second)["000000001000.jpg"])).size == (scene.SIZE, scene.SIZE)


def test_labels_say_what_is_drawn(tree: Path, tmp_path: Path) -> None:
    """The colour of the first group covers more pixels than any other object's; captions without noise name it."""
    run(tree, tmp_path, "--noise", "0")
    found = described(tmp_path / "test" / "00000000.tar")
    pictures = members(tmp_path / "test" / "00000000.tar")
    assert {one["relation"] for one in found} <= {"none", *scene.RELATIONS}
    assert {one["count"] for one in found} <= {"1", "2", "3", "4"}
    for one in found:
        pixels = np.asarray(Image.open(io.BytesIO(pictures[f"{one['key']}.jpg"])), np.float32)
        near = np.abs(pixels - scene.COLOURS[one["colour"]]).sum(2) < 90
        assert near.mean() > 0.01, one
        assert one["words"].split()[1:3] == [one["colour"], one["class"]]


def test_the_first_group_stands_where_the_relation_says(tree: Path) -> None:
    sprites, random = scene.Sprites(tree / "png"), np.random.default_rng(0)
    for relation, axis, first_is_less in (
        ("left of", 1, True),
        ("right of", 1, False),
        ("above", 0, True),
        ("below", 0, False),
    ):
        pair = scene.Scene((scene.Group("car", "red", 1), scene.Group("tree", "blue", 1)), relation)
        pixels = np.asarray(Image.open(io.BytesIO(sprites.draw(pair, random))), np.float32)
        red, blue = (
            np.mean(np.nonzero(np.abs(pixels - scene.COLOURS[colour]).sum(2) < 100)[axis]) for colour in ("red", "blue")
        )
        assert (red < blue) == first_is_less, relation


def test_the_share_of_noise_words_is_as_asked() -> None:
    random, caption = np.random.default_rng(0), "a red car left of two trees"
    assert words.with_noise(caption, 0.0, random) == caption
    lengths = [len(words.with_noise(caption, 0.6, random).split()) for _ in range(2000)]
    assert 7 / np.mean(lengths) == pytest.approx(0.4, abs=0.02)
    kept = sum(set(caption.split()) <= set(words.with_noise(caption, 0.6, random).split()) for _ in range(1000))
    assert kept / 1000 == pytest.approx(1 - words.MISTYPED * 0.6, abs=0.03)


def test_pictures_do_not_depend_on_the_noise(tree: Path, tmp_path: Path) -> None:
    sprites, tasks = scene.Sprites(tree / "png"), []
    for noise in (0.0, 0.6):
        tasks.append(make_scenes.Task(tmp_path, tree, 3, 0, 5, 50, noise))
    clean, noisy = (list(make_scenes.samples_of(task, sprites)) for task in tasks)
    assert [jpeg for _, jpeg in clean] == [jpeg for _, jpeg in noisy]
    assert [one["words"] for one, _ in clean] == [one["words"] for one, _ in noisy]
    assert [one["caption"] for one, _ in clean] != [one["caption"] for one, _ in noisy]
