"""Which files are shards: tars with their side Parquet and completion mark, tables, mixtures, and what is refused."""

import os
import zipfile
from pathlib import Path

import fsspec
import pytest

from labels.storage import UserError
from preprocess.readers.shards import Shard, find_shards


def files(folder: Path, *names: str) -> Path:
    """Files of a few bytes; the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name))
    return folder


def found(*sources: Path | str) -> dict[str, str]:
    """Name and kind of every shard, in order."""
    return {shard.name: shard.kind for shard in find_shards(list(map(str, sources))).shards}


def refused(source: Path | str) -> str:
    with pytest.raises(UserError) as error:
        find_shards([str(source)])
    return str(error.value)


def sides(source: Path) -> list[str]:
    """Names of the side Parquets that are used."""
    return [Path(shard.side).name for shard in find_shards([str(source)]).shards if shard.side]


def test_datacomp_tars_with_sides_marks_and_gaps(tmp_path: Path) -> None:
    for number in (0, 3, 4):
        files(tmp_path, *(f"shards/{number:08d}{suffix}" for suffix in (".tar", ".parquet", "_stats.json")))
    files(tmp_path, "metadata/a.parquet", "metadata/b.parquet", "shards/notes.csv.gz")
    assert found(tmp_path) == {"00000000": "tar", "00000003": "tar", "00000004": "tar"}
    assert sides(tmp_path) == ["00000000.parquet", "00000003.parquet", "00000004.parquet"]
    assert not find_shards([str(tmp_path)]).notes


@pytest.mark.parametrize("pattern", ["", "*.tar", "*"])
def test_a_shard_without_its_mark_is_skipped_with_a_note(tmp_path: Path, pattern: str) -> None:
    files(
        tmp_path, *(f"{number:08d}.tar" for number in range(5)), *(f"{number:08d}_stats.json" for number in (0, 1, 2))
    )
    files(tmp_path, "00000001.parquet", "00000004.parquet")
    result = find_shards([f"{tmp_path}/{pattern}"])
    assert [shard.name for shard in result.shards] == ["00000000", "00000001", "00000002"]
    assert result.notes == [
        "2 of 5 shards have no _stats.json yet and are skipped: 00000003, 00000004;"
        " run the same command again when the download has ended"
    ]
    assert [bool(shard.side) for shard in result.shards] == [False, True, False]


def test_only_a_few_of_many_incomplete_shards_are_named(tmp_path: Path) -> None:
    files(tmp_path, *(f"{number:02d}.tar" for number in range(20)), "00_stats.json")
    assert "19 of 20 shards" in (note := find_shards([str(tmp_path)]).notes[0])
    assert "09, 10 and 9 more; run" in note


def test_marks_count_in_their_own_folder_only(tmp_path: Path) -> None:
    files(tmp_path, "a/0.tar", "a/0_stats.json", "a/1.tar", "b/0.tar", "b/1.tar", "b/other_stats.json")
    assert list(found(tmp_path)) == ["a--0", "b--0", "b--1"]


def test_none_complete_is_an_error(tmp_path: Path) -> None:
    files(tmp_path, "0.tar", "0_stats.json", "1.tar")
    message = refused(tmp_path / "1.tar")
    assert (
        "1 of 1 shards have no _stats.json" in message
        and "fix: run the same command again when the download has ended" in message
    )


def test_a_side_parquet_without_any_mark_in_the_folder_is_used(tmp_path: Path) -> None:
    files(tmp_path, "0.tar", "0.parquet", "1.tar", "lost.parquet")
    assert sides(tmp_path) == sides(tmp_path / "0.tar") == ["0.parquet"]
    assert found(tmp_path) == {"0": "tar", "1": "tar"}


def test_the_source_of_a_marker_knows_the_side(tmp_path: Path) -> None:
    files(tmp_path, "0.tar", "0.parquet")
    (before,) = find_shards([str(tmp_path)]).shards
    assert before.source["side"] == str(tmp_path / "0.parquet") and before.source["side_bytes"] == len("0.parquet")
    (tmp_path / "0.parquet").write_text("longer than before")
    assert find_shards([str(tmp_path)]).shards[0].source != before.source
    (tmp_path / "0.parquet").unlink()
    (alone,) = find_shards([str(tmp_path)]).shards
    assert set(alone.source) == {"path", "bytes", "modified"}, "markers of tars without a side stay as they were"


def test_a_folder_of_tables(tmp_path: Path) -> None:
    files(tmp_path, "a.parquet", "deep/b.csv", "deep/c.tsv", "deep/d.json", "README.md")
    assert found(tmp_path) == {"a": "parquet", "deep--b": "csv", "deep--c": "csv"}


def test_img2dataset_parquet_has_marks_too(tmp_path: Path) -> None:
    files(tmp_path, "00000.parquet", "00000_stats.json", "00001.parquet", "extra.csv")
    assert list(found(tmp_path)) == ["00000", "extra"], "a CSV is nobody's download"


def test_kinds_may_be_mixed_by_name_and_by_glob(tmp_path: Path) -> None:
    files(tmp_path, "0.tar", "0.parquet", "1.tar", "metadata.parquet", "pairs.csv")
    assert found(tmp_path / "0.tar", tmp_path / "pairs.csv") == {"0": "tar", "pairs": "csv"}
    assert found(f"{tmp_path}/*") == {"0": "tar", "1": "tar", "metadata": "parquet", "pairs": "csv"}, (
        "0.parquet is a side, not a shard"
    )
    assert found(tmp_path / "0.parquet") == {"0": "parquet"}, "by name it is what the user says"


def test_the_same_file_twice_is_one_shard_and_order_is_that_of_label_files(tmp_path: Path) -> None:
    files(tmp_path, "a.tar", "a-b.tar", "b.tar", "a.b.tar")
    names = list(found(tmp_path, tmp_path / "a.tar", f"{tmp_path}/*.tar"))
    assert names == [
        name.removesuffix(".parquet") for name in sorted(f"{name}.parquet" for name in ("a", "a-b", "b", "a.b"))
    ]


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    files(tmp_path, "a.csv", "a.parquet")
    assert "would both be shard a" in refused(tmp_path) and "fix: rename one" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.zst", "a.csv.zip"])
def test_compressed_tables_are_refused(tmp_path: Path, name: str) -> None:
    files(tmp_path, name, "b.csv")
    for source in (tmp_path, tmp_path / name, f"{tmp_path}/*"):
        message = refused(source)
        assert (
            "holds compressed tables (1, the first: " in message and "allowed: plain .csv, .tsv or .parquet" in message
        )


def test_a_source_without_shards_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg", "b.json")
    assert "holds no .tar, .parquet, .csv or .tsv file (2 other files)" in refused(tmp_path)
    assert "allowed: a folder with .tar files" in refused(tmp_path) and "fix: name the folder" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "missing")


def test_a_url_of_fsspec_with_side_and_mark() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("0.tar", "0.parquet", "0_stats.json", "1.tar"):
        memory.pipe_file(f"/test-shards/{name}", name.encode())
    try:
        for source in ("memory://test-shards", "memory://test-shards/*.tar"):
            result = find_shards([source])
            (shard,) = result.shards
            assert (shard.name, shard.path, shard.side) == (
                "0",
                "memory:///test-shards/0.tar",
                "memory:///test-shards/0.parquet",
            )
            assert result.notes[0].startswith("1 of 2 shards")
        with shard.open() as file:
            assert file.read() == b"0.tar"
    finally:
        memory.rm("/test-shards", recursive=True)


def test_a_shard_made_by_hand_is_a_tar() -> None:
    assert Shard("a", "a.tar", 1, "").kind == "tar"


# -- names that look like URLs, lists, braces


@pytest.mark.parametrize("folder", ["run:1", "data:v1", "run::1", "a::b::c", "s3:", "file:", "{x}", "caf\udce9", "a b"])
@pytest.mark.parametrize(
    "name", ["0.tar", "x::1.tar", "run:1.tar", "file:0.tar", "a{b}c.tar", "caf\udce9.tar", "0.TAR"]
)
def test_any_local_name_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    files(tmp_path / folder, name)
    monkeypatch.chdir(tmp_path)
    expected = [str(tmp_path / folder / name)]
    for source in (folder, f"{folder}/", f"./{folder}", f"{folder}/{name}", str(tmp_path / folder), f"{folder}/*"):
        (shard,) = find_shards([source]).shards
        assert [shard.path] == expected
        with shard.open() as file:
            assert file.read() == name.encode("utf8", "surrogateescape")
    monkeypatch.chdir(tmp_path / folder)
    assert [shard.path for shard in find_shards([name]).shards] == expected


def test_a_list_joined_by_colons_names_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path, "a/0.tar", "b/0.tar", "b/1.tar", "x::1.tar", "run::1/2.tar")
    assert list(found("a/0.tar::b/0.tar")) == ["a--0", "b--0"]
    assert list(found("a::b/*.tar")) == ["a--0", "b--0", "b--1"]
    assert list(found("x::1.tar::a/0.tar")) == ["a--0", "x::1"]
    assert list(found("a::run::1/*.tar::b/{0,1}.tar")) == ["a--0", "b--0", "b--1", "run::1--2"]
    assert "b/9.tar (of a::b/9.tar) does not exist" in refused("a::b/9.tar")
    for text in ("a::", "::a", "a::::b"):
        assert "has an empty part" in refused(text)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{00..02}.tar", ["00", "01", "02"]),
        ("{2..0}.tar", ["0", "1", "2"]),
        ("{8..10}.tar", ["10", "8", "9"]),
        ("{008..010}.tar", ["008", "009", "010"]),
        ("{0..4..2}.tar", ["0", "2", "4"]),
        ("{a..c}.tar", ["a", "b", "c"]),
        ("{x,y}/{0..1}.tar", ["x--0", "x--1", "y--0", "y--1"]),
        ("{x,y{0..1}}/0.tar", ["x--0", "y0--0", "y1--0"]),
        ("{x,y}/*.tar", ["x--0", "y--7"]),
    ],
)
def test_braces_as_in_webdataset(tmp_path: Path, pattern: str, names: list[str]) -> None:
    files(tmp_path, *(f"{name.replace('--', '/')}.tar" for name in names))
    assert list(found(tmp_path / pattern)) == names
    (tmp_path / f"{names[-1].replace('--', '/')}.tar").unlink()
    message = refused(tmp_path / pattern)
    assert str(tmp_path / names[-1].partition("--")[0]) in message.splitlines()[0], "what is missing is named"


@pytest.mark.parametrize("name", ["{0..1}.tar", "{a,b}.tar", "{x}.tar", "{}.tar", "{1..b}.tar"])
def test_a_file_whose_name_has_braces(tmp_path: Path, name: str) -> None:
    files(tmp_path, name)
    assert len(found(tmp_path / name)) == 1


def test_urls_in_lists_braces_and_chains(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    files(tmp_path, "0.tar")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("d/7.tar", "in the zip")
    try:
        for name in ("1.tar", "2.tar", "a::b.tar"):
            memory.pipe_file(f"/odd/{name}", name.encode())
        url = "memory://odd"
        assert list(found(f"{url}/{{1..2}}.tar")) == list(found(f"{url}/1.tar::{url}/2.tar")) == ["1", "2"]
        assert len(found(f"{tmp_path}/0.tar::{url}/1.tar")) == 2
        contents = {}
        for source in (url, f"simplecache::{url}/2.tar", f"zip://d/*.tar::{tmp_path}/all.zip"):
            for shard in find_shards([source]).shards:
                with shard.open() as file:
                    contents[shard.path] = file.read().decode()
    finally:
        memory.rm("/odd", recursive=True)
    assert contents == {
        "memory:///odd/1.tar": "1.tar",
        "memory:///odd/2.tar": "2.tar",
        "memory:///odd/a::b.tar": "a::b.tar",
        "simplecache::memory:///odd/2.tar": "2.tar",
        f"zip://d/7.tar::{tmp_path}/all.zip": "in the zip",
    }


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files(tmp_path, "d/0.tar", "d/1.tar")
    for source in ("~", "~/d", "~/d/*.tar", "~/d/{0,1}.tar", "~/d/0.tar::~/d/1.tar"):
        assert len(found(source)) == 2


# -- names of shards


def test_names_of_shards_are_names_of_files(tmp_path: Path) -> None:
    deep = "/".join(["d" * 60] * 5)
    names = [
        "caf\udce9",
        "a[1]",
        "star*",
        "why?",
        "back\\slash",
        "n" * 240,
        f"a/{deep}/0",
        f"b/{deep}/0",
        f"b/{deep}/1",
    ]
    files(tmp_path, *(f"{name}.tar" for name in names))
    shards = find_shards([str(tmp_path)]).shards
    assert {shard.path for shard in shards} == {f"{tmp_path}/{name}.tar" for name in names}
    assert {"caf%E9", "a%5B1]", "star%2A", "why%3F", "back%5Cslash"} < {shard.name for shard in shards}
    assert len({shard.name for shard in shards}) == len(names)
    assert all(len(f"{shard.name}.parquet.0123456789ab.partial".encode()) <= 255 for shard in shards)
    assert [shard.name for shard in find_shards([str(tmp_path)]).shards] == [shard.name for shard in shards]
    assert all(isinstance(value, int) or value.encode() for shard in shards for value in shard.source.values())


# -- what is ignored, and what cannot be read


@pytest.mark.parametrize(
    "odd",
    [
        *[".Trash-0/files/0.tar", "._0.tar", "__MACOSX/0.tar", ".ipynb_checkpoints/0.tar", ".nfs0001.tar", ".0.tar"],
        *["_temporary/0/0.tar", "d/_delta_log/0.tar", "0.tar.part", "0.tar.tmp", "x.partial/0.tar", "lost+found/0.tar"],
        *["0.tar.crdownload", "@eaDir/0.tar", "$RECYCLE.BIN/0.tar"],
    ],
)
def test_hidden_and_temporary_names_are_ignored_with_a_note(tmp_path: Path, odd: str) -> None:
    files(tmp_path, "0.tar", odd, "_SUCCESS", ".DS_Store", "_metadata")
    for source in (tmp_path, f"{tmp_path}/**"):
        result = find_shards([str(source)])
        assert [shard.name for shard in result.shards] == ["0"]
        (note,) = result.notes
        assert "names are ignored: 1 of such files, the first: " in note and note.endswith("name it or its folder")
    if odd.endswith(".tar"):
        assert len(found(tmp_path / odd)) == 1, "by name it is what the user says"
        assert len(found((tmp_path / odd).parent)) >= 1
    (tmp_path / "0.tar").unlink()
    assert "names are ignored" in refused(tmp_path)


def test_a_glob_that_spells_a_hidden_name_reads_it(tmp_path: Path) -> None:
    files(tmp_path, "0.tar", "._1.tar", "_2.tar", "_t/3.tar", ".h/4.tar")
    assert list(found(f"{tmp_path}/*.tar")) == ["0"]
    for pattern, name in (("._*.tar", "._1"), ("_*.tar", "_2"), ("_t/*.tar", "3"), (".h/*", "4"), ("_[s-t]/*", "3")):
        assert list(found(f"{tmp_path}/{pattern}")) == [name]


def test_files_of_an_output_folder_are_no_input(tmp_path: Path) -> None:
    own = [f"{out}{name}" for out in ("out/", "deep/o2/") for name in ("labels/p.parquet", "counts/p.parquet")]
    files(tmp_path, "p.csv", *own, "out/idf.parquet", "out/quarantine.parquet", "labels/mine.parquet")
    files(tmp_path, "out/done/options.json", "deep/o2/done/options.json")
    for source in (tmp_path, f"{tmp_path}/**"):
        result = find_shards([str(source)])
        assert [shard.name for shard in result.shards] == ["labels--mine", "p"]
        assert result.notes == [
            f"files of output folders are no input: 6 are skipped, the first: {tmp_path}/deep/o2/counts/p.parquet"
        ]
    assert list(found(tmp_path / "out/idf.parquet")) == ["idf"]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    files(tmp_path, "data/0.tar", "more/1.tar")
    (tmp_path / "data/more").symlink_to("../more")
    (tmp_path / "data/again").symlink_to(tmp_path / "more")
    (tmp_path / "data/around").symlink_to(".")
    (tmp_path / "data/itself").symlink_to("itself")
    assert list(found(tmp_path / "data")) == ["0", "again--1"]
    assert list(found(tmp_path / "data/more")) == ["1"]
    assert list(found(f"{tmp_path}/data/m*/*.tar")) == ["1"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    files(tmp_path, "0.tar")
    (tmp_path / "1.tar").symlink_to("/nonexistent/1.tar")
    for source in (tmp_path, tmp_path / "1.tar", f"{tmp_path}/*.tar"):
        assert f"{tmp_path}/1.tar is a link that leads nowhere, to /nonexistent/1.tar" in refused(source)
    (tmp_path / "1.tar").unlink()
    os.mkfifo(tmp_path / "1.tar")
    assert "1.tar is a pipe or a device" in refused(tmp_path)
    (tmp_path / "1.tar").unlink()
    (tmp_path / "0.parquet").symlink_to("/nonexistent/0.parquet")
    assert "0.parquet is a link that leads nowhere" in refused(tmp_path), "a side Parquet too"
