"""Columns of tables by their names: statuses of other programs, and what is said where no column fits."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labels.storage import UserError
from preprocess.readers.base import parse_caption_key
from preprocess.readers.images import table_images, without_images
from preprocess.readers.shards import Shard, find_shards
from preprocess.readers.table import read_table_rows
from shard_factory import build, jpeg, refused, rows


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Shard:
    pq.write_table(pa.table(columns), folder / "t.parquet", **options)
    return find_shards([str(folder / "t.parquet")]).shards[0]


def text_file(folder: Path, content: str | bytes, name: str = "t.csv") -> Shard:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return find_shards([str(folder / name)]).shards[0]


def captions(table: Shard, *keys: str, batch_rows: int = 1000) -> dict[str, str]:
    """Key -> caption."""
    batches = read_table_rows(table, parse_caption_key(keys or ("auto",)), batch_rows)
    return {row["key"]: row["caption"] for batch in batches for row in batch.table.to_pylist()}


FOREIGN = {
    "numbers": [200, 404, 200],
    "truth": [True, False, None],
    "text": ["published", "draft", "published"],
    "text with success": ["success", "ok", "Success"],
    "success alone": ["success", "success", ""],
    "gaps": ["success", None, None],
    "nothing": [None, None, None],
    "lists": [["success"], ["failed_to_download"], []],
    "categories": pa.array(["ok", "failed", "failed"]).dictionary_encode(),
    "not UTF-8": [b"\xff", b"success", b"ok"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_status_of_another_program_drops_no_row(tmp_path: Path, kind: str) -> None:
    images = [jpeg(number) for number in range(3)]
    table = parquet(tmp_path, {"status": FOREIGN[kind], "text": ["a", "b", "c"], "jpg": images}, row_group_size=1)
    for batch_rows in (1, 3):
        assert list(captions(table, batch_rows=batch_rows).values()) == ["a", "b", "c"]
    assert [data for _, data in table_images(table, list(captions(table)))] == images
    statuses = [value for value in FOREIGN[kind] if isinstance(value, str)]
    lines = [f"{status},a {row}" for row, status in enumerate(statuses)]
    assert len(captions(text_file(tmp_path, "\n".join(["status,text", *lines])))) == len(statuses)


@pytest.mark.parametrize("statuses", [["failed_to_download", "ok"], ["published", "success", "failed_to_resize"]])
def test_statuses_of_img2dataset_and_of_another_program_are_refused(tmp_path: Path, statuses: list[str]) -> None:
    table = parquet(tmp_path, {"status": statuses, "text": ["a"] * len(statuses)}, row_group_size=1)
    for batch_rows in (1, 9):
        with pytest.raises(
            UserError,
            match=r"the column 'status' holds 'failed_to_\w+', as img2dataset writes it .* and '(ok|published)'",
        ) as error:
            captions(table, batch_rows=batch_rows)
        assert error.value.allowed and "rename the column" in str(error.value.fix)


def test_failed_downloads_are_skipped(tmp_path: Path) -> None:
    statuses = ["failed_to_download", "success", None, "failed_to_resize", "success"]
    table = parquet(tmp_path, {"status": statuses, "text": list("abcde")}, row_group_size=2)
    for batch_rows in (1, 2, 9):
        assert list(captions(table, batch_rows=batch_rows).values()) == ["b", "c", "e"]


NO_IMAGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "two columns of bytes": (
        {"caption": ["a"], "front": [b"1"], "back": [b"2"]},
        "several columns of bytes, 'front', 'back', none of them named as images",
        "rename the column of images to `image`",
    ),
    "no column of bytes": (
        {"caption": ["a"], "url": ["http://x"]},
        "no column of bytes, of: 'caption', 'url'",
        "add the images as such a column; or add --no-beton to make labels and IDF alone",
    ),
    "paths": (
        {"caption": ["a"], "image": ["0.jpg"]},
        "paths in the column 'image', which are read from CSV and TSV alone",
        "write it as CSV: python3 -c ",
    ),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_a_parquet_whose_images_are_not_clear_is_refused_with_its_columns(tmp_path: Path, case: str) -> None:
    columns, problem, fix = NO_IMAGES[case]
    error = without_images(parquet(tmp_path, columns))
    assert isinstance(error, UserError) and error.problem.endswith(f"has captions, but {problem}")
    assert error.allowed and fix in str(error.fix)
    assert problem in refused(tmp_path / "t.parquet", tmp_path / "out")


def test_the_fix_for_a_parquet_with_paths_works(tmp_path: Path) -> None:
    (tmp_path / "it's").mkdir()
    columns = {"caption": ['a, "b"', "c"], "path": ["0.jpg", "1.jpg"], "tags": [["x"], ["y"]]}
    error = without_images(parquet(tmp_path / "it's", columns))
    for row in range(2):
        (tmp_path / "it's" / f"{row}.jpg").write_bytes(jpeg(row))
    command = str(error and error.fix).partition("write it as CSV: python3 ")[2].partition("; or add ")[0]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    build(tmp_path / "it's" / "t.csv", tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 2


def test_a_csv_without_paths_is_refused_with_its_columns(tmp_path: Path) -> None:
    text_file(tmp_path, "photo|caption\n0.jpg|a\n")
    said = refused(tmp_path / "t.csv", tmp_path / "out")
    assert "has captions, but no column of image paths, of: 'photo|caption'" in said
    assert "separators: comma, tab or semicolon" in said and "rename the column of paths" in said


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_semicolons_separate_the_columns_of_a_spreadsheet(tmp_path: Path, mark: str, end: str) -> None:
    lines = [f"{mark}path;caption", "0.jpg;a, b", '1.jpg;"c; d"']
    table = text_file(tmp_path, end.join([*lines, ""]))
    assert list(captions(table).values()) == ["a, b", "c; d"] and without_images(table) is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_utf16_is_refused_and_the_fix_works(tmp_path: Path, encoding: str, name: str) -> None:
    text = "path,caption\n0.jpg,a cat\n".replace(",", "\t" if name == "t.tsv" else ",")
    table = text_file(tmp_path, text.encode(encoding), name)
    said = refused(Path(table.path), tmp_path / "out")
    assert f"is {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')} text" in said and "allowed: UTF-8" in said
    subprocess.run(said.partition("convert it: ")[2], shell=True, check=True, cwd=tmp_path)
    assert list(captions(find_shards([str(tmp_path / f"utf8{name[1:]}")]).shards[0]).values()) == ["a cat"]


def test_another_column_is_named_of_all_that_hold_text(tmp_path: Path) -> None:
    table = parquet(tmp_path, {"caption": [1], "alt": ["a"], "n": [2], "tags": [["b"]], "score": [0.5]})
    with pytest.raises(UserError, match=r"the column 'caption' of build\.caption_key holds int64") as error:
        captions(table)
    assert str(error.value.allowed).endswith("here 'alt', 'tags'") and "--caption-key parquet:COLUMN" in str(
        error.value
    )
    assert list(captions(table, "parquet:alt").values()) == ["a"]
