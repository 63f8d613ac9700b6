"""What users name: `~`, names that look like URLs, names that are not UTF-8, names that are too long."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labels.storage import (
    UserError,
    atomic_write,
    fit_name,
    is_remote,
    is_url,
    library_path,
    local_copy,
    local_path,
    printable,
    user_path,
    write_json,
)

LIKE_URLS = ["run:1", "data:v1", "o::4", "out_12:30", "out-12:30", "x::1.tar", "s3:", "sqlite:a", "file:x", "C:"]
LATIN_1 = "caf\udce9"


@pytest.mark.parametrize("text", ["a", "a/b", "../a", "/a/b:c", ".", "a/run:1", "-a", "a b", "ä/日本", "a~", "a=1"])
def test_ordinary_names_stay_as_they_are(text: str) -> None:
    assert user_path(text) == local_path(text) == user_path(Path(text)) == Path(text)


@pytest.mark.parametrize("text", LIKE_URLS)
def test_a_relative_name_that_looks_like_a_url_is_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = user_path(text)
    assert not is_url(text) and path == tmp_path / text == user_path(path) == user_path(f"./{text}")
    table = pa.table({"a": [1]})
    with atomic_write(path / "t.parquet") as partial:  # what Arrow would take for a URL, and then not find
        pq.write_table(table, partial)
    assert pq.read_table(path / "t.parquet") == table


def test_tilde_is_the_home_folder_and_only_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert user_path("~") == Path("/home/me") and user_path("~/o") == local_path("~/o") == Path("/home/me/o")
    assert user_path("a/~/o") == Path("a/~/o")
    literal = user_path("./~/o")
    assert literal == tmp_path / "~/o" == user_path(str(literal)), "it is read again without a change"
    assert user_path("~nobody-of-this-name/o") == tmp_path / "~nobody-of-this-name/o"


@pytest.mark.parametrize("text", ["file:///a/b", "FILE:///a/b", "local:///a/b"])
def test_a_url_of_this_machine_is_a_path(text: str) -> None:
    assert user_path(text) == local_path(text) == Path("/a/b") and not is_url(text)


@pytest.mark.parametrize(
    "text", ["s3://b/o", "gs://b/o", "https://h/0.tar", "simplecache::s3://b/o", "zip://a::/b.zip"]
)
def test_urls_are_refused_where_only_local_files_are_read(text: str) -> None:
    assert is_url(text)
    with pytest.raises(UserError, match="is not on this machine"):
        local_path(text)


def test_a_url_is_a_path_of_its_store() -> None:
    remote = user_path("memory://bucket/out")
    assert is_remote(remote) and str(remote / "a") == "memory://bucket/out/a" and user_path(remote) == remote


@pytest.mark.parametrize("text", ["", "a\0b", "a/" + "b" * 256, "é" * 128])
def test_what_no_file_can_be_named_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is no path|is too long for a file"):
        user_path(text)


@pytest.mark.parametrize("name", [LATIN_1, f"{LATIN_1}/b", f"b/{LATIN_1}", f"{LATIN_1}/{LATIN_1}", "a[1]", "*", "\\b"])
def test_files_below_a_folder_whose_name_is_not_utf8(tmp_path: Path, name: str) -> None:
    path, table = tmp_path / name / "t.parquet", pa.table({"a": [1, 2]})
    with atomic_write(path) as partial:
        pq.write_table(table, partial)
    assert os.listdir(path.parent) == ["t.parquet"]
    assert pq.read_table(library_path(path)) == table
    with local_copy(path) as file:
        assert pq.read_table(file) == table
    path.unlink()
    path.parent.rmdir()
    path.parent.mkdir()  # another folder of that name
    path.write_bytes(b"new")
    assert library_path(path).read_bytes() == b"new"


def test_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path, table = tmp_path / f"{LATIN_1}.parquet", pa.table({"a": [1, 2]})
    with atomic_write(path) as partial:
        pq.write_table(table, partial)
    assert pq.read_table(library_path(path)) == table and list(tmp_path.iterdir()) == [path]
    assert library_path(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(FileNotFoundError), local_copy(tmp_path / f"missing{LATIN_1}"):
        pass


def test_names_that_are_not_utf8_in_json(tmp_path: Path) -> None:
    for value in ({"path": f"/a/{LATIN_1}", "b": "ä"}, {"path": "/a/café"}):
        write_json(tmp_path / "a.json", value)
        assert json.loads((tmp_path / "a.json").read_bytes()) == value
    assert "café" in (tmp_path / "a.json").read_text("utf8"), "an ordinary name is written as before"
    assert printable(LATIN_1) == r"caf\xe9" and printable("café") == "café"


def test_a_name_that_is_too_long_is_cut_and_stays_unique(tmp_path: Path) -> None:
    assert fit_name("a" * 50, 50) == "a" * 50
    names = {fit_name(start + end, 50) for start in ("d" * 60, "é" * 60, "犬" * 60) for end in "ab"}
    assert len(names) == 6 and all(len(name.encode()) <= 50 for name in names)
    longest = tmp_path / ("n" * 250 + ".json")
    write_json(longest, {})
    assert list(tmp_path.iterdir()) == [longest]
