"""Captioned data of other shapes: what is unambiguous is taken, all else is named; unneeded parts may be missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_folders import encoded, write_tar
from labels.storage import UserError
from train.evals.data.captions import load_caption_set, load_captions
from train.evals.kinds.caption import Caption, Captioning


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(encoded((len(str(folder)), ord(name[0]), 3), "JPEG"))


def coco(folder: Path, content: Any, part: str = "val2014") -> str:
    write_images(folder / part, "a.jpg", "b.jpg")
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
    return f"coco:{folder}"


IMAGES = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
CAPTIONS = [{"id": 5, "image_id": 1, "caption": "one "}, {"id": 4, "image_id": 2, "caption": "two"}]
WHOLE = {"images": IMAGES, "annotations": CAPTIONS}


def other(change: Callable[[Any], Any]) -> Any:
    content = json.loads(json.dumps(WHOLE))
    return change(content) or content


def without(key: str) -> Callable[[Any], None]:
    return lambda content: content["annotations"][1].pop(key) and None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"images": IMAGES}, "it has no `annotations`; it has images"),
        ({"annotations": CAPTIONS}, "it has no `images`; it has annotations"),
        ({"images": None, "annotations": []}, "`images` of it is null"),
        ({"images": [], "annotations": []}, "holds no image"),
        (other(without("caption")), "annotations[1] has no `caption`; it has id, image_id"),
        (other(without("image_id")), "annotations[1] has no `image_id`"),
        (other(lambda it: it["annotations"][0].update(caption=None)), "`caption` of annotations[0] is null"),
        (other(lambda it: it["annotations"][0].update(image_id=9)), "annotations[0] is of the image 9, which `images`"),
        (other(lambda it: it["images"][0].pop("file_name") and None), "images[0] has no `file_name`; it has id"),
        (other(lambda it: it["images"].append("c.jpg")), 'images[2] is no mapping, but "c.jpg"'),
        (other(lambda it: it["images"].append(IMAGES[0])), "has the key 'a.jpg' 2 times"),
        ("text", 'it is no mapping, but "text"'),
        (None, "it is no mapping, but null"),
        ([{"image": "a.jpg"}], "[0] has no `caption`; it has image"),
        ([{"caption": "x"}], "[0] has no `image`"),
        ([{"image": "a.jpg", "caption": ["x", 3]}], "a caption of [0] is 3"),
        (["a.jpg"], '[0] is no mapping, but "a.jpg"'),
        ([], "holds no image"),
    ],
)
def test_coco_of_another_shape_is_named(tmp_path: Path, content: Any, expected: str) -> None:
    text = refusal(lambda: load_captions(coco(tmp_path, content))["val"]())
    assert expected in text and ("captions_val2014.json" in text or str(tmp_path) in text)


def test_coco_without_ids_of_annotations_keeps_the_files_order(tmp_path: Path) -> None:
    content = {
        "images": IMAGES,
        "annotations": [{"image_id": n, "caption": text} for n, text in ((1, "b"), (2, "c"), (1, "a"))],
    }
    assert load_captions(coco(tmp_path, content))["val"]().captions == [["b", "a"], ["c"]]
    text = [{**entry, "image_id": str(entry["image_id"])} for entry in CAPTIONS]  # ids as text
    assert load_captions(coco(tmp_path, {"images": IMAGES, "annotations": text}))["val"]().captions == [
        ["one"],
        ["two"],
    ]


@pytest.mark.parametrize("prefix", ["", "val2014/", "x/val2014/"])
def test_blips_list_in_cocos_file(tmp_path: Path, prefix: str) -> None:
    """BLIP has one entry an image with all captions to test, and one entry a caption to train."""
    folder = tmp_path / "x"
    entries = [("a.jpg", ["one ", "uno"]), ("b.jpg", "two"), ("a.jpg", "ein")]
    content = [{"image": prefix + name, "caption": caption, "image_id": "coco_1"} for name, caption in entries]
    val = load_captions(coco(folder, content))["val"]()
    assert val.captions == [["one", "uno", "ein"], ["two"]]
    assert [image.path for image in val.encoded] == [folder / "val2014" / name for name in ("a.jpg", "b.jpg")]


def karpathy(folder: Path, content: Any, images: str = "coco") -> str:
    write_images(folder / "val2014", "a.jpg", "b.jpg")
    (folder / f"dataset_{images}.json").write_text(json.dumps(content))
    return f"karpathy:{folder}"


ENTRY = {"filepath": "val2014", "filename": "a.jpg", "split": "test", "sentences": [{"raw": "x"}, "y "]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "it has no `images`; it has nothing"),
        ([{"image": "a.jpg", "caption": ["x"]}], "holds a list, without the parts of its images"),
        ({"images": {}}, "`images` of it is {}"),
        ({"images": [{**ENTRY, "split": None}]}, "`split` of images[0] is null"),
        ({"images": [{"filename": "a.jpg", "split": "test"}]}, "images[0] has no `sentences`; it has filename, split"),
        (
            {"images": [{**ENTRY, "sentences": [{"tokens": ["x"]}]}]},
            "images[0].sentences[0] has no `raw`; it has tokens",
        ),
        ({"images": [{**ENTRY, "sentences": None}]}, "`sentences` of images[0] is null"),
        ({"images": [{**ENTRY, "sentences": []}]}, "1 of 1 images of the part test"),
        ({"images": [7]}, "images[0] is no mapping, but 7"),
    ],
)
def test_karpathys_file_of_another_shape_is_named(tmp_path: Path, content: Any, expected: str) -> None:
    text = refusal(lambda: load_captions(karpathy(tmp_path, content))["test"]())
    assert expected in text and str(tmp_path) in text


def test_what_karpathys_file_may_have(tmp_path: Path) -> None:
    entry = {**ENTRY, "filename": "b.jpg", "filepath": None}
    write_images(tmp_path / "images", "b.jpg")
    test = load_captions(karpathy(tmp_path, {"images": [ENTRY, entry]}))["test"]()
    assert test.captions == [["x", "y"]] * 2
    assert [image.path.parent.name for image in test.encoded] == ["val2014", "images"]


@pytest.mark.parametrize("below", [".", "annotations"])
def test_blips_lists_of_karpathys_splits(tmp_path: Path, below: str) -> None:
    write_images(tmp_path / "val2014", "a.jpg", "b.jpg")
    (tmp_path / below).mkdir(exist_ok=True)
    for part, name in (("train", "a.jpg"), ("test", "b.jpg")):
        file = tmp_path / below / f"coco_karpathy_{part}.json"
        file.write_text(json.dumps([{"image": f"val2014/{name}", "caption": part}]))
    data = load_caption_set(f"karpathy:{tmp_path}")
    assert (data.name, data.trained.captions, data.test.captions) == (
        f"coco:{tmp_path}, Karpathy's splits",
        [["train"]],
        [["test"]],
    )


def test_the_images_of_the_part_that_is_evaluated_are_enough(tmp_path: Path) -> None:
    train = {**ENTRY, "filepath": "train2014", "filename": "t.jpg", "split": "train"}
    data = load_caption_set(karpathy(tmp_path, {"images": [ENTRY, train, {**train, "split": "val"}]}))
    assert len(data.test) == 1 and data.train is None and "train" not in data.describe()
    text = refusal(Captioning().check, data, Caption())
    assert "1 of 1 images of the part train are missing, the first" in text and "t.jpg" in text
    shutil.rmtree(tmp_path / "val2014")
    assert "1 of 1 images of the part test are missing" in refusal(load_caption_set, f"karpathy:{tmp_path}")


def test_captions_with_marks_of_their_encoding(tmp_path: Path) -> None:
    image = encoded(kind="JPEG")
    write_tar(tmp_path / "test" / "0.tar", [("k.jpg", image), ("k.txt", b"\xef\xbb\xbfred cat\r\n")])
    assert load_captions(f"pairs:{tmp_path}")["test"]().captions == [["red cat"]]
    lone = {"images": [{**ENTRY, "sentences": [{"raw": "a \ud83d cat"}]}]}
    assert load_captions(karpathy(tmp_path, lone))["test"]().captions == [[r"a \ud83d cat"]]


@pytest.mark.parametrize(
    ("captions", "images"), [(["a red cat"], "one image"), (["A cat."] * 3, "3 images with equal")]
)
def test_captions_that_cider_cannot_score_are_refused(tmp_path: Path, captions: list[str], images: str) -> None:
    for part, texts in (("train", ["x", "y"]), ("test", captions)):
        members = []
        for number, text in enumerate(texts):
            image = encoded((number * 30, len(part) * 9, 1), "JPEG")
            members += [(f"{number}.jpg", image), (f"{number}.txt", text.encode())]
        write_tar(tmp_path / part / "0.tar", members)
    text = refusal(Captioning().check, load_caption_set(f"pairs:{tmp_path}"), Caption())
    assert f"has {images}" in text and "CIDEr-D would be 0 for any caption" in text and "caption more images" in text
