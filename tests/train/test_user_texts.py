"""Text files that users give to evaluators: byte order marks, encodings, line ends, empty lines, missing fields."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from image_folders import encoded, write_folders
from labels.storage import UserError, read_text
from train.evals.data.sets import Counts, DataSet, load_pair, read_imagenet, read_pets
from train.evals.kinds.zeroshot import class_names, templates

ENCODINGS = [
    ("café\nred bird\n".encode(), "plain"),
    ("\ufeffcafé\nred bird".encode(), "byte order mark"),
    ("café\r\nred bird\r\n".encode(), "line ends of Windows"),
    ("café\rred bird\r".encode(), "line ends of old Macs"),
    ("\ufeff\r\n\r\n café \r\n\r\nred bird\t\r\n\r\n".encode(), "empty lines and spaces"),
    ("\ufeffcafé\r\nred bird\r\n".encode("utf-16-le"), "UTF-16, little"),
    ("\ufeffcafé\nred bird\n".encode("utf-16-be"), "UTF-16, big"),
]
LATIN = "cat\ncafé\nred bird\n".encode("latin1")


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    write_folders(tmp_path / "train", {"a": 1, "b": 1})
    return load_pair(tmp_path / "train", write_folders(tmp_path / "test", {"a": 1, "b": 1}, start=40))


@pytest.mark.parametrize(("content", "name"), ENCODINGS)
def test_names_and_templates_in_any_encoding_with_a_mark(
    tmp_path: Path, data: DataSet, content: bytes, name: str
) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    assert class_names(str(file), data) == ["café", "red bird"]
    text = read_text(file)
    file.write_bytes(text.replace("café", "café {}").replace("bird", "bird {}").encode("utf-8-sig"))
    assert templates(str(file)) == ["café {}", "red bird {}"]


def test_a_line_ends_where_an_editor_ends_it(tmp_path: Path, data: DataSet) -> None:
    file = tmp_path / "names.txt"
    file.write_text("a\u2028b c\nd\x0be\x85f\n", encoding="utf8")
    assert class_names(str(file), data) == ["a\u2028b c", "d\x0be\x85f"]


def test_another_encoding_is_refused_and_the_fix_works(tmp_path: Path, data: DataSet) -> None:
    file = tmp_path / "two words.txt"
    file.write_bytes(LATIN.removeprefix(b"cat\n"))
    for call in (lambda: class_names(str(file), data), lambda: templates(str(file))):
        text = refusal(call)
        assert "is no UTF-8 text: line 1 has the byte 0xe9" in text and "iconv -f latin1 -t utf8" in text
    command = text.partition("fix: if it is Latin-1: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert class_names(str(tmp_path / "two words.utf8.txt"), data) == ["café", "red bird"]


def test_a_class_with_two_names_is_refused(tmp_path: Path, data: DataSet) -> None:
    (tmp_path / "names.txt").write_text("a\tcat\nb\tdog\na\towl\n")
    assert "has 1 classes several times: a" in refusal(class_names, str(tmp_path / "names.txt"), data)


# -- lists of published data sets

WNIDS = ("n01440764", "n01443537")


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for number, wnid in enumerate(WNIDS):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / "x.JPEG").write_bytes(encoded((number, 1, 2), "JPEG"))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded((90, 1, 2), "JPEG"))
    return tmp_path


def test_imagenets_lists_with_a_mark(imagenet: Path) -> None:
    lines = ["\ufeffImageId,PredictionString", f"ILSVRC2012_val_00000001,{WNIDS[1]} 1 2 3 4 ", ""]
    (imagenet / "LOC_val_solution.csv").write_bytes("\r\n".join(lines).encode())
    (imagenet / "LOC_synset_mapping.txt").write_bytes(f"\ufeff{WNIDS[0]} tench, Tinca\r\n".encode())
    parts = read_imagenet(imagenet, Counts(2, 1, 2))
    assert parts.names == ("tench", WNIDS[1]) and [one.label for one in parts.test] == [WNIDS[1]]


@pytest.mark.parametrize(
    "content",
    ["image,wnid\nILSVRC2012_val_00000001,n01440764\n", "ImageId,PredictionString\nILSVRC2012_val_00000001,\n"],
)
def test_a_csv_without_classes_is_named(imagenet: Path, content: str) -> None:
    (imagenet / "LOC_val_solution.csv").write_text(content)
    text = refusal(read_imagenet, imagenet, Counts(2, 1, 2))
    assert "LOC_val_solution.csv: line 2 has no image with a class" in text


@pytest.mark.parametrize(("content", "expected"), [("x\n", "lacks: x"), ("3\n", "lacks: 3"), ("1\n", None)])
def test_the_devkits_numbers(imagenet: Path, content: str, expected: str | None) -> None:
    pairs = list(zip((1, 2), WNIDS, strict=True))
    synsets = np.array(pairs, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(imagenet / "meta.mat", {"synsets": synsets})
    (imagenet / "ILSVRC2012_validation_ground_truth.txt").write_text("\ufeff" + content, encoding="utf8")
    if expected:
        assert expected in refusal(read_imagenet, imagenet, Counts(2, 1, 2))
    else:
        assert [one.label for one in read_imagenet(imagenet, Counts(2, 1, 2)).test] == [WNIDS[0]]


def test_pets_lists_with_a_mark_and_in_latin1(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for number, part in enumerate(("trainval", "test")):
        for breed in ("Cat", "Dog"):
            (tmp_path / "images" / f"{breed}_{number}.jpg").write_bytes(encoded((number, 1, 2), "JPEG"))
        lines = f"\ufeff#Image CLASS-ID\r\n\r\nCat_{number} 1 1 1\r\nDog_{number} 2 2 1\r\n"
        (tmp_path / "annotations" / f"{part}.txt").write_bytes(lines.encode())
    assert read_pets(tmp_path, Counts(2, 2, 2)).classes == ("Cat", "Dog")
    (tmp_path / "annotations" / "test.txt").write_bytes(LATIN)
    assert "annotations/test.txt is no UTF-8 text: line 2" in refusal(read_pets, tmp_path, Counts(2, 2, 2))


def test_a_folder_is_no_text_file(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read: {os.strerror(21)}" in refusal(read_text, tmp_path)
