"""Labelled images in both layouts: what is found, what is refused, and how an image becomes pixels."""

import gzip
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fuzz_images import Input, fuzz_images
from image_folders import encoded, sample, write_folders, write_tar
from labels.settings import Features
from labels.storage import UserError
from tar_parts import BLOCK, END, SPARSE_KINDS, head, member, sparse
from train.encoders.load import load_encoder
from train.evals import features
from train.evals.data.sets import load_data, load_pair
from train.evals.features import DECODE_FAULTS, Extractor, decode, decode_crop


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "test", {"cat": 1}, start=100)


def refusal(train_dir: Path, held_out: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_pair(train_dir, held_out)
    return str(caught.value)


def test_folders_are_classes_sorted_by_name(tmp_path: Path, held_out: Path) -> None:
    train_dir = write_folders(tmp_path / "train", {"dog": 2, "cat": 1})
    (train_dir / "dog" / "notes.txt").write_text("no image")
    (train_dir / ".hidden").mkdir()
    (train_dir / "dog" / "deep").mkdir()
    (train_dir / "dog" / "deep" / "x.PNG").write_bytes(encoded((0, 0, 9)))
    data = load_pair(train_dir, held_out)
    train, test = data.train, data.test
    assert train.classes == test.classes == ("cat", "dog")
    assert train.keys == ["cat/0.png", "dog/0.png", "dog/1.png", "dog/deep/x.PNG"]
    assert train.targets.tolist() == [0, 1, 1, 1] and train.targets.dtype == np.int64
    assert train.encoded[3].read() == encoded((0, 0, 9))
    assert train.describe()["samples_per_class"] == {"cat": 1, "dog": 3}


@pytest.mark.parametrize("below", [".", "shards"])
def test_shards_hold_the_class_in_the_json(tmp_path: Path, held_out: Path, below: str) -> None:
    images = [encoded((shade, 0, 0), "JPEG") for shade in (0, 100, 200)]
    write_tar(tmp_path / "train" / below / "00001.tar", sample("000000007", 5, images[2]))
    write_tar(
        tmp_path / "train" / below / "00000.tar",
        [*sample("a.b/1", "cat", images[0]), ("a.b/1.seg.png", b"no image of ours")],
    )
    write_tar(tmp_path / "train" / below / "00002.tar", sample("k", "dog", images[1]))
    train = load_pair(tmp_path / "train", held_out).train
    assert train.keys == ["00000.tar/a.b/1", "00001.tar/000000007", "00002.tar/k"]
    assert train.classes == ("5", "cat", "dog") and train.targets.tolist() == [1, 0, 2]
    assert [place.read() for place in train.encoded] == [images[0], images[2], images[1]]


def test_fingerprint_is_of_the_content_not_the_path(tmp_path: Path, held_out: Path) -> None:
    prints = []
    for name, counts in (("a", {"cat": 2, "dog": 1}), ("b", {"cat": 2, "dog": 1}), ("c", {"cat": 1, "dog": 2})):
        prints.append(load_pair(write_folders(tmp_path / name, counts), held_out).train.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_missing_and_empty_directories(tmp_path: Path, held_out: Path) -> None:
    assert f"no directory at {tmp_path / 'gone'}" in refusal(tmp_path / "gone", held_out)
    (tmp_path / "empty").mkdir()
    text = refusal(tmp_path / "empty", held_out)
    assert (
        "holds no labelled image" in text and "shards/*.tar" in text and "images directly in DIR have no class" in text
    )


def test_classes_that_cannot_be_probed(tmp_path: Path, held_out: Path) -> None:
    one = write_folders(tmp_path / "one", {"cat": 2})
    assert "holds one class only: 'cat'" in refusal(one, held_out)
    train_dir = write_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    other = write_folders(tmp_path / "other", {"cat": 1, "newt": 1, "emu": 1}, start=50)
    text = refusal(train_dir, other)
    assert (
        "has 2 classes that" in text and "emu, newt" in text and "the 2 classes of the training part: cat, dog" in text
    )
    text = refusal(train_dir, train_dir)
    assert "2 of 2 test images are training images too" in text and "remove them from one of the two parts" in text


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("1.jpg", b"x")], "the sample '1' has no json"),
        (
            [("1.jpg", b"x"), ("1.json", b'{"caption": "c"}')],
            "no class in its json: `class` is None, the json holds ['caption']",
        ),
        ([("1.jpg", b"x"), ("1.json", b'{"class": true}')], "`class` is True"),
        ([("1.jpg", b"x"), ("1.json", b"[1]")], "the json holds list"),
        ([("1.jpg", b"x"), ("1.json", b'{"cl')], "has a json that cannot be read"),
        ([("1.txt", b"x"), ("1.json", b'{"class": "a"}')], "has 0 images (members: txt, json)"),
        ([("1.jpg", b"x"), ("1.png", b"x"), ("1.json", b'{"class": "a"}')], "has 2 images"),
        ([*sample("1", "a"), ("1.jpg", b"x")], "the sample '1' has two members .jpg"),
        (sample("1", "a") + sample("2", "a") + sample("1", "a"), "has the key 't.tar/1' 2 times"),
    ],
)
def test_faulty_samples_are_named(
    tmp_path: Path, held_out: Path, members: list[tuple[str, bytes]], expected: str
) -> None:
    write_tar(tmp_path / "train" / "t.tar", members)
    text = refusal(tmp_path / "train", held_out)
    assert expected in text and ("t.tar" in text)


def test_a_cut_tar_is_never_taken_for_whole(tmp_path: Path, held_out: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", sample("1", "cat") + sample("2", "dog"))
    with tarfile.open(whole) as tar:
        members = tar.getmembers()
    content = whole.read_bytes()
    after_last = members[-1].offset_data + 512
    # in a header, in a member's data, and at the clean border between two members, which tarfile itself passes over
    for cut in (members[1].offset + 100, members[3].offset_data + 10, members[3].offset, after_last):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / "cut.tar").write_bytes(content[:cut])
        text = refusal(tmp_path / "train", held_out)
        assert "cut.tar" in text and "fetch or write this shard again" in text, cut


def test_joined_tars_and_hard_links_are_read_and_stray_members_ignored(tmp_path: Path, held_out: Path) -> None:
    first = write_tar(tmp_path / "a.tar", [*sample("1", "cat"), ("README", b"x"), ("._2.jpg", b"Mac OS X")])
    linked = head("2.jpg", 0, tarfile.LNKTYPE, "1.jpg") + member("2.cls", b"dog")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(first.read_bytes() + linked + END)
    train = load_pair(tmp_path / "train", held_out).train
    assert train.keys == ["0.tar/1", "0.tar/2"] and train.classes == ("cat", "dog")
    assert train.encoded[0].read() == train.encoded[1].read() == sample("1", "cat")[0][1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *[
            (
                sparse("1.jpg", bytes(4 * BLOCK) + b"x" * BLOCK, [(4 * BLOCK, BLOCK)], kind)
                + member("1.cls", b"cat")
                + END,
                ["sparse member: 1.jpg is stored without its holes", "fix: unpack the tar, and write it again without"],
            )
            for kind in SPARSE_KINDS
        ],
        (
            head("1.jpg", 0, tarfile.SYMTYPE, "/x.jpg") + member("1.cls", b"cat") + END,
            ["link: 1.jpg is a symbolic link to /x.jpg", "fix: write the tar again with --dereference"],
        ),
        (
            member("1.jpg", b"x") + member("1.cls", b"cat") + END + b"<html>",
            ["6 bytes after the end mark", "truncate -s"],
        ),
        (gzip.compress(member("1.jpg", b"x") + END), ["compressed tar: it is gzip-compressed", "fix: unpack it: mv"]),
        (
            member("1.jpg", b"x") + member("2.jpg", b"x") + member("1.cls", b"a") + member("2.cls", b"b") + END,
            ["members of the sample '1' are apart: jpg; cls", "next to each other", "fix: sort it: "],
        ),
    ],
    ids=[*SPARSE_KINDS, "symbolic link", "bytes after the end", "gzip", "members apart"],
)
def test_a_tar_that_cannot_be_read_in_place_is_refused(
    tmp_path: Path, held_out: Path, content: bytes, expected: list[str]
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "t.tar").write_bytes(content)
    text = refusal(tmp_path / "train", held_out)
    assert "t.tar" in text and all(part in text for part in expected), text


def test_decode_resizes_the_shorter_side_and_crops_the_centre() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), 16)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert (pixels[:, 2:-2] == [0, 0, 255]).all()


def test_decode_equals_a_plain_resize_of_a_square() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    assert (decode(buffer.getvalue(), 16) == np.asarray(noise.resize((16, 16), Image.Resampling.BICUBIC))).all()


def test_big_jpegs_decode_alike_with_and_without_the_decoders_own_scaling() -> None:
    gradient = np.tile(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], (512, 1, 3))
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(gradient).save(jpeg, "JPEG", quality=95)
    Image.fromarray(gradient).save(png, "PNG")
    difference = decode(jpeg.getvalue(), 32).astype(int) - decode(png.getvalue(), 32)
    assert abs(difference).max() <= 3


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), "PNG", 255),  # transparent black lies on white
        ("LA", (0, 0), "PNG", 255),
        ("L", 40, "PNG", 40),
        ("I;16", 40 * 256, "PNG", 40),  # 16 bit keep the high byte
        ("1", 1, "PNG", 255),
        ("CMYK", (0, 0, 0, 0), "JPEG", 255),
    ],
)
def test_decode_takes_every_mode(mode: str, colour, kind: str, expected: int) -> None:
    assert (abs(decode(encoded(colour, kind, mode), 8).astype(int) - expected) <= 1).all()


@pytest.mark.filterwarnings("ignore:::PIL")
def test_evaluators_decode_images_whatever_their_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(image: Input) -> Counter[str]:
        try:
            found = decode(image.data, 16)
        except DECODE_FAULTS:
            assert not image.whole
            return Counter(refused=1)
        # Pillow turns TIFFs; no other format is turned, as in published results.
        difference = abs(found.astype(int) - decode(image.clean, 16)).max()  # two levels: Pillow for compiled code
        alike = difference <= 2 or (image.form == "TIFF" and image.orientation > 1)
        return Counter(alike=alike, cut=not image.whole, odd=image.whole and not alike)

    monkeypatch.chdir(tmp_path)
    total = fuzz_images(200, 7, check)
    assert total["alike"] > 100 and total["refused"] > 5 and not total["odd"]


def test_test_images_in_the_training_part_are_found_by_their_bytes(tmp_path: Path, held_out: Path) -> None:
    train_dir = write_folders(tmp_path / "train", {"cat": 3, "dog": 3})
    cache = tmp_path / "cache"
    assert load_pair(train_dir, held_out, cache).overlap == 0
    assert len(list(cache.glob("overlap-*.json"))) == 1
    (train_dir / "dog" / "other name.png").write_bytes((held_out / "cat" / "100.png").read_bytes())
    for _ in range(2):  # found, and then known
        with pytest.raises(UserError) as caught:
            load_pair(train_dir, held_out, cache)
        text = str(caught.value)
        assert "1 of 1 test images are training images too, the first: cat/100.png" in text
        assert "dog/other name.png" in text and "remove them from one of the two parts" in text
    assert len(list(cache.glob("overlap-*.json"))) == 2


def test_an_image_of_the_same_size_is_no_overlap(tmp_path: Path) -> None:
    for part, shade in (("train", 0), ("test", 1)):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            (tmp_path / part / label / "x.bmp").write_bytes(encoded((shade, len(label), 3), "BMP"))
    sizes = {file.stat().st_size for file in tmp_path.rglob("*.bmp")}
    (tmp_path / "train" / "b" / "x.bmp").write_bytes(encoded((9, 9, 9), "BMP"))
    assert len(sizes) == 1 and load_data(f"folders:{tmp_path}").overlap == 0


def test_whole_numbers_are_ordered_by_value(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"10": 1, "9": 1, "b": 1, "a": 1})
    write_folders(tmp_path / "val", {"9": 1}, start=50)
    assert load_data(f"folders:{tmp_path}").classes == ("9", "10", "a", "b")


def test_shards_by_kind_with_cls_members(tmp_path: Path) -> None:
    for part, shades in (("train", (1, 2)), ("test", (3,))):
        members = []
        for shade in shades:
            members += [
                (f"{shade}.jpg", encoded((shade * 60, 0, 0), "JPEG")),
                (f"{shade}.cls", str(shade % 2).encode()),
            ]
        write_tar(tmp_path / part / "0.tar", members)
    data = load_data(f"shards:{tmp_path}")
    assert data.classes == ("0", "1") and data.train.targets.tolist() == [1, 0] and data.test.targets.tolist() == [1]
    (tmp_path / "test" / "0.tar").unlink()
    with pytest.raises(UserError, match="holds no tar"):
        load_data(f"shards:{tmp_path}")


def test_data_that_is_named_wrongly(tmp_path: Path) -> None:
    for spec, expected in (
        (str(tmp_path), "is no known kind of data"),
        ("mnist:x", "imagenet:DIR, pets:DIR, cars:DIR, folders:DIR, shards:DIR, parquet:DIR"),
        (f"folders:{tmp_path}/gone", "no directory at"),
        (f"folders:{tmp_path}", "has no test part"),
    ):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / "0.png").write_bytes(encoded())
        with pytest.raises(UserError) as caught:
            load_data(spec)
        assert expected in str(caught.value)


def test_random_crops_depend_on_seed_epoch_and_row_alone() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    crops = [
        decode_crop(buffer.getvalue(), 16, *draw) for draw in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    assert np.array_equal(crops[0], crops[1]) and all(not np.array_equal(crops[0], other) for other in crops[2:])


def two_tasks(folder: Path) -> Path:
    """Shards of red and blue pictures with one or two things, in DIR/train and DIR/test."""
    for part, first in (("train", 0), ("test", 100)):
        members = []
        for number in range(first, first + 8):
            blue, things = number % 2, 1 + number // 4 % 2
            image = encoded((250 - 200 * blue, number, 50 + 200 * blue), "PNG")
            members += sample(f"{number:03d}", "scene", image, colour="blue" if blue else "red", count=things)
        write_tar(folder / part / "00000.tar", members)
    return folder


def test_each_label_of_a_sample_is_a_task_and_they_share_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = two_tasks(tmp_path / "scenes"), tmp_path / "cache"
    extract = Extractor(torch.device("cpu"), Features(threads=1), cache)
    encoder = load_encoder("pixels:2")
    for load in (
        lambda key: load_data(f"shards:{folder}", cache, key),
        lambda key: load_pair(folder / "train", folder / "test", cache, key),
    ):
        colour, count = load("colour"), load("count")
        assert colour.classes == ("blue", "red") and count.classes == ("1", "2")
        assert colour.train.targets.tolist() == [1, 0] * 4 and count.train.targets.tolist() == [0] * 4 + [1] * 4
        assert colour.describe()["class_key"] == "colour" and colour.name.endswith(", colour")
        assert colour.train.fingerprint != count.train.fingerprint
        first = extract(encoder, colour.train)
        with monkeypatch.context() as once:
            once.setattr(features, "decoded_batches", lambda *_: pytest.fail("extracted again"))
            assert np.array_equal(extract(encoder, count.train), first)
    assert len(list(cache.glob("*.npy"))) == 1 and len(list(cache.glob("overlap-*.json"))) == 1


def test_a_class_key_that_is_not_there(tmp_path: Path, held_out: Path) -> None:
    folder = two_tasks(tmp_path / "scenes")
    with pytest.raises(UserError) as caught:
        load_data(f"shards:{folder}", None, "color")
    text = str(caught.value)
    assert "`color` is None, the json holds ['class', 'colour', 'count']" in text
    assert "this json has class, colour, count" in text and "fix: --class-key colour" in text
    write_tar(tmp_path / "cls" / "0.tar", [("a.jpg", encoded(kind="JPEG")), ("a.cls", b"cat")])
    for load in (
        lambda: load_pair(tmp_path / "cls", held_out, None, "class"),  # a json is asked for, and there is a cls alone
        lambda: load_data(f"pets:{tmp_path}", None, "colour"),
        lambda: load_data(f"parquet:{tmp_path}", None, "colour"),
        lambda: load_pair(held_out, held_out, None, "colour"),  # class folders
    ):
        with pytest.raises(UserError, match=r"has no json|--class-key colour with|has no shards"):
            load()
