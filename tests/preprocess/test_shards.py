"""Which files are shards: tars with their side Parquet and completion mark, tables, mixtures, and what is refused."""

from pathlib import Path

import fsspec
import pytest

from labels.storage import UserError
from preprocess.readers.shards import Shard, find_shards


def files(folder: Path, *names: str) -> Path:
    """Files of a few bytes; the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
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
