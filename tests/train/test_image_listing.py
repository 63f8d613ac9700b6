"""Labelled images with odd names, links and classes; and when what is computed from them counts as theirs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from image_folders import encoded, sample, write_folders, write_tar
from labels.settings import Features, Pipeline
from labels.storage import UserError, library_path
from train.cli import cli
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder
from train.evals.data.images import file_states, list_folders, list_images, list_tars
from train.evals.data.sets import load_data, load_pair
from train.evals.features import Extractor
from train.evals.kinds.fewshot import FewShot
from train.evals.measure import read_results, run_protocol

LATIN = os.fsdecode(b"caf\xe9")


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def relative(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in list_images(folder)]


# -- names that are not UTF-8


def test_names_that_are_not_utf8_are_in_results_and_splits(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"d\xe4ta")
    write_folders(root / "train", {LATIN: 4, "dog": 4})
    write_folders(root / "test", {LATIN: 2, "dog": 2}, start=100)
    (root / "train" / "dog" / "0.png").rename(root / "train" / "dog" / os.fsdecode(b"\xfcber.png"))
    out, cache, data = root / f"{LATIN}.json", root / "cache", load_data(f"folders:{root}")
    pipeline = Pipeline(evaluators={"fewshot": {"shots": [4], "seeds": [0]}})
    extract = Extractor(torch.device("cpu"), Features(threads=1), cache)
    run_protocol(FewShot(), [EncoderSpec("pixels:2")], lambda: data, pipeline, extract, out)
    assert data.classes == (r"caf\xe9", "dog") and data.names == (r"caf\xe9", "dog")
    (row,) = (row for row in read_results([out]) if row.encoder == "pixels:2")
    assert row.metrics["top1"][0] is not None and len(list(cache.glob("*.npy"))) == 2
    splits = pq.read_table(library_path(out.with_suffix(".splits.parquet")))
    assert set(splits["class"].to_pylist()) == {r"caf\xe9", "dog"}
    assert r"dog/\xfcber.png" in splits["key"].to_pylist() and r"caf\xe9/0.png" in splits["key"].to_pylist()


def test_names_in_shards_that_are_not_utf8(tmp_path: Path) -> None:
    for part, shade in (("train", 1), ("test", 90)):
        members = [*sample(f"{LATIN}/1", "cat", encoded((shade, 0, 0))), *sample("2", "\udfff", encoded((0, shade, 0)))]
        write_tar(tmp_path / part / "0.tar", members)
    data = load_data(f"shards:{tmp_path}")
    assert data.classes == ("cat", r"\udfff") and data.test.keys == [r"0.tar/caf\xe9/1", "0.tar/2"]


def test_classes_whose_names_are_spelt_alike_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {LATIN: 1, r"caf\xe9": 1})
    text = refusal(load_pair, tmp_path / "train", tmp_path / "train")
    assert r"1 names stand for several classes" in text and r"caf\xe9" in text


# -- links


def test_images_of_linked_folders_and_files_are_found(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"cat": 2})
    more = write_folders(tmp_path / "more", {"deep": 3}, start=50)
    write_folders(tmp_path / "elsewhere", {"dog": 4})
    (tmp_path / "train" / "cat" / "more").symlink_to(more)
    (tmp_path / "train" / "cat" / "one.png").symlink_to(more / "deep" / "50.png")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    samples = list_folders(tmp_path / "train")
    names = ["0.png", "1.png", *(f"more/deep/{index}.png" for index in (50, 51, 52)), "one.png"]
    assert [one.key for one in samples if one.label == "cat"] == [f"cat/{name}" for name in names]
    assert sum(one.label == "dog" for one in samples) == 4


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    cat, other = write_folders(tmp_path / "train", {"cat": 1}) / "cat", write_folders(tmp_path / "other", {"x": 1})
    (cat / "itself").symlink_to(cat)
    (cat / "above").symlink_to(tmp_path)
    (cat / "other").symlink_to(other)
    (other / "x" / "back").symlink_to(cat)
    (other / "x" / "root").symlink_to("/")
    assert relative(cat) == ["0.png", "other/x/0.png"]
    for number in range(9):  # each links to all others: nine factorial paths
        (other / f"f{number}").mkdir()
    for number in range(81):
        (other / f"f{number // 9}" / f"to{number % 9}").symlink_to(other / f"f{number % 9}")
    assert relative(cat) == ["0.png", "other/x/0.png"]


@pytest.mark.parametrize("name", ["gone.png", "folder", "train"])
def test_links_that_lead_nowhere_are_refused(tmp_path: Path, name: str) -> None:
    write_folders(tmp_path / "train", {"cat": 1})
    where = tmp_path / "train" if name == "train" else tmp_path / "train" / "cat"
    (where / name).symlink_to(tmp_path / "nothing")
    text = refusal(list_folders, tmp_path / "train")
    assert f"{where / name} is a link that leads nowhere" in text and "restore what it leads to" in text


def test_hidden_names_are_ignored_and_empty_classes_refused(tmp_path: Path) -> None:
    train = write_folders(tmp_path / "train", {"cat": 1, "__MACOSX/cat": 1, "cat/.thumbs": 1, ".Trash": 1})
    (train / "cat" / "._0.png").write_bytes(b"attributes")
    (train / "cat" / "b.JFIF").write_bytes(encoded(kind="JPEG"))
    assert [one.key for one in list_folders(train)] == ["cat/0.png", "cat/b.JFIF"]
    (train / "._0.tar").write_bytes(b"attributes")
    assert list_tars(train) == []
    (train / "owl").mkdir()
    (train / "owl" / "a.heic").write_bytes(b"x")
    text = refusal(list_folders, train)
    assert "the class folder" in text and "owl holds no image" in text and "or remove the folder" in text


# -- messages name part and file


def test_an_unknown_class_is_named_with_its_part_and_file(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    write_folders(tmp_path / "test", {"cat": 1, "emu": 2}, start=50)
    text = refusal(load_data, f"folders:{tmp_path}")
    assert "the test part of folders:" in text and "1 classes that its training part lacks: emu" in text
    assert str(tmp_path / "test" / "emu" / "50.png") in text


@pytest.mark.parametrize("part", ["training", "test"])
@pytest.mark.parametrize("layout", ["folders", "shards"])
def test_a_bad_image_is_named_with_its_part_and_file(tmp_path: Path, part: str, layout: str) -> None:
    for name, shade in (("train", 1), ("test", 90)):
        for label in ("a", "b"):
            bad = label == "b" and part.startswith(name)
            image = b"no image" if bad else encoded((shade, ord(label), 3))
            if layout == "shards":
                write_tar(tmp_path / name / f"{label}.tar", sample("k", label, image))
            else:
                (tmp_path / name / label).mkdir(parents=True)
                (tmp_path / name / label / "0.png").write_bytes(image)
    data = load_data(f"{layout}:{tmp_path}")
    images = data.train if part == "training" else data.test
    text = refusal(Extractor(torch.device("cpu"), Features(threads=1)), load_encoder("pixels:2"), images)
    folder = tmp_path / part[:5].removesuffix("i")
    file = folder / ("b.tar/k" if layout == "shards" else "b/0.png")
    assert f"1 of 2 images of the {part} part cannot be decoded: {file} (UnidentifiedImageError" in text


# -- what is kept belongs to the images as they are now


def swap_with_times_kept(first: Path, second: Path) -> None:
    contents, times = first.read_bytes(), [os.stat(file).st_mtime_ns for file in (first, second)]
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)
    for file, time in zip((first, second), times, strict=True):
        os.utime(file, ns=(time, time))


def rename_over(first: Path, second: Path) -> None:
    copy = first.with_suffix(".copy")
    shutil.copy2(first, copy)
    shutil.copystat(second, copy)
    os.replace(copy, second)


def older_shard(first: Path, second: Path) -> None:
    """One file of several is replaced by one that is older than the newest."""
    second.write_bytes(first.read_bytes())
    os.utime(second, (1, 1))


@pytest.mark.parametrize("change", [swap_with_times_kept, rename_over, older_shard])
def test_features_are_computed_again_when_images_change(tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    for part, start in (("train", 0), ("test", 100)):
        for index, label in enumerate(("a", "b")):
            (tmp_path / part / label).mkdir(parents=True)
            (tmp_path / part / label / "x.bmp").write_bytes(encoded((start + 50 * index, 1, 2), "BMP"))
    files = [tmp_path / "test" / label / "x.bmp" for label in ("a", "b")]
    for file in files:
        os.utime(file, (1000, 1000))
    encoder, extract = load_encoder("pixels:1"), Extractor(torch.device("cpu"), Features(threads=1), tmp_path / "cache")
    before = extract(encoder, load_data(f"folders:{tmp_path}").test)
    assert np.array_equal(before, extract(encoder, load_data(f"folders:{tmp_path}").test))
    change(*files)
    fresh = Extractor(torch.device("cpu"), Features(threads=1))(encoder, load_data(f"folders:{tmp_path}").test)
    assert not np.array_equal(fresh, before)
    assert np.array_equal(extract(encoder, load_data(f"folders:{tmp_path}").test), fresh)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_the_state_of_files_is_of_each_of_them_in_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(b"same")
        os.utime(file, (5, 5))
    state = file_states(files)
    assert state == file_states([*files, files[0]]) != file_states(files[::-1])
    files[1].rename(tmp_path / "c")
    shutil.copy2(tmp_path / "c", files[1])
    assert file_states(files) != state


# -- one name for several classes


def test_a_command_refuses_what_it_cannot_tell_apart(tmp_path: Path) -> None:
    for part, shade in (("train", 1), ("test", 60)):
        table = pa.table({"image": [encoded((shade + n, 0, 0)) for n in range(3)], "label": [0, 1, 2]})
        features = {"info": {"features": {"label": {"names": ["crane", "cat", "crane"]}}}}
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / f"{part}.parquet"
        )
    words = ["knn", "--data", f"parquet:{tmp_path}", "--encoder", "pixels:2", "--set", "knn.k=[1]"]
    text = refusal(lambda: CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False))
    assert "1 names stand for several classes" in text and "crane" in text and "`names` in the metadata" in text
