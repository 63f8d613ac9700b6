"""Shards read from S3, and label datasets written to it (a server on this machine): the same content as on disk."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from labels import locks, storage
from labels.locks import Holder, one_of_many, only_writer
from labels.manifest import read_manifest
from labels.storage import (
    Layout,
    UserError,
    atomic_write,
    is_remote,
    local_copy,
    local_path,
    sha256_file,
    user_path,
    write_json,
)
from shard_factory import Built, contents, preprocess, refused, rows, write_shards

pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
moto = pytest.importorskip("moto.server", reason="moto's server is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """An S3 server on a free port of 127.0.0.1, found through the environment as a user's is; the file system."""
    import fsspec

    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    _, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody's")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nobody's")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        filesystem = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        filesystem.mkdir("bucket")
        yield filesystem
    running.stop()


@pytest.fixture
def bucket(server: Any, request: pytest.FixtureRequest) -> str:
    """A prefix of one's own, as a URL."""
    return f"s3://bucket/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"


def build(data: object, out: object, *options: object) -> None:
    said = preprocess("build-labels", data, "--out", out, "--workers", 1, *options)
    assert said.code == 0, said.err


def download(server: Any, url: str, folder: Path) -> Path:
    """All objects below `url` as files in `folder`."""
    for name in server.find(url):
        target = folder / name.partition(url.removeprefix("s3://") + "/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        server.get_file(name, str(target))
    return folder


def test_shards_in_and_out_out(server: Any, bucket: str, finished: Built, tmp_path: Path) -> None:
    server.put(str(finished.data), f"{bucket}/data", recursive=True)
    build(f"{bucket}/data", f"{bucket}/out")
    found, expected = contents(download(server, f"{bucket}/out", tmp_path / "out")), contents(finished.out)
    assert found.keys() == expected.keys() - {".lock"}
    changed = {name for name in found if found[name] != expected[name]}
    # These name the tar they are made from.
    assert all(re.fullmatch(r"done/(labels/.*|beton/.*|inputs)\.json", name) for name in changed), changed
    said = preprocess("verify", f"{bucket}/out")
    assert (said.code, said.out) == (0, f"{bucket}/out: whole and unchanged\n")


def test_a_rerun_skips_and_an_interrupted_build_resumes(
    server: Any, bucket: str, finished: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem: Any = user_path(bucket).fs  # type: ignore[attr-defined]  # a UPath
    put, uploads = filesystem.put_file, 0

    def stop_at_seventh(*arguments: Any, **options: Any) -> None:
        nonlocal uploads
        uploads += 1
        if uploads == 7:
            raise KeyboardInterrupt
        put(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "put_file", stop_at_seventh)
        assert preprocess("build-labels", finished.data, "--out", bucket, "--workers", 1).code != 0
    assert not server.exists(f"{bucket}/manifest.json") and not server.exists(f"{bucket}/.lock")
    build(finished.data, bucket)
    assert {**contents(download(server, bucket, tmp_path / "out")), ".lock": b""} == contents(finished.out)
    before = {name: server.info(name)["LastModified"] for name in server.find(f"{bucket}/labels")}
    build(finished.data, bucket)
    assert {name: server.info(name)["LastModified"] for name in server.find(f"{bucket}/labels")} == before


def test_damage_is_found_and_fixed(server: Any, bucket: str, finished: Built) -> None:
    build(finished.data, bucket)
    for name in ("labels/00000000.parquet", "beton/00000.beton", "idf.duckdb"):
        data = bytearray(server.cat_file(f"{bucket}/{name}"))
        data[len(data) // 2] ^= 1
        server.pipe_file(f"{bucket}/{name}", bytes(data))
        said = preprocess("verify", bucket)
        assert said.code == 1 and f"{bucket}/{name}: " in said.out, said.out
        build(finished.data, bucket)
        assert preprocess("verify", bucket).code == 0
    server.rm_file(f"{bucket}/beton/00000.beton")
    assert f"{bucket}/beton/00000.beton: missing" in preprocess("verify", bucket).out


def test_sql_reads_out_and_nothing_else(server: Any, bucket: str, finished: Built) -> None:
    build(finished.data, f"{bucket}/out", "--no-beton")
    server.pipe_file(f"{bucket}/secret.csv", b"a\n1\n")
    for query in (
        "SELECT count(*) AS n, sum(len(label_ids)) AS labels FROM labels",
        "SELECT sum(document_frequency) AS labels, (SELECT tokens FROM corpus) AS tokens FROM tokens",
        "SELECT shard, rows FROM shards",
    ):
        said = preprocess("sql", f"{bucket}/out", query, "--format", "json")
        assert said.code == 0, said.err
        assert json.loads(said.out) == json.loads(preprocess("sql", finished.out, query, "--format", "json").out)
    for file in (f"{bucket}/secret.csv", f"{bucket}/out/../secret.csv", "/etc/passwd"):
        said = preprocess("sql", f"{bucket}/out", f"FROM read_csv('{file}')")
        assert said.code == 2 and "the query failed" in said.err
    assert "has no idf.duckdb" in preprocess("sql", f"{bucket}/none", "FROM tokens").err


def test_overwrite_removes_only_what_a_build_made(server: Any, bucket: str, finished: Built, tmp_path: Path) -> None:
    server.pipe_file(f"{bucket}/labels/notes.txt", b"mine")
    build(finished.data, bucket, "--no-beton", "--set", "labels.context=5")
    assert "was begun with other options: labels.context was 5, is now 75" in refused(finished.data, bucket)  # type: ignore[arg-type]
    build(finished.data, bucket, "--overwrite")
    assert server.cat_file(f"{bucket}/labels/notes.txt") == b"mine"
    assert rows(download(server, bucket, tmp_path / "out")) == rows(finished.out)


def test_array_jobs_on_one_out(server: Any, bucket: str, tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 5, 3)
    build(data, tmp_path / "expected")
    for share in ("1/2", "0/2"):
        build(data, bucket, "--shard", share, "--no-beton")
    build(data, bucket)
    assert {**contents(download(server, bucket, tmp_path / "out")), ".lock": b""} == contents(tmp_path / "expected")


def test_the_error_of_a_second_writer_names_the_first(server: Any, bucket: str, finished: Built) -> None:
    lock = Layout(user_path(bucket)).lock
    with only_writer(lock):
        found = refused(finished.data, bucket)  # type: ignore[arg-type]  # a URL is text
        assert re.search(
            rf"another process is writing to {bucket} \(host .*, process {os.getpid()}\), for \d+ s", found
        ), found
        with pytest.raises(UserError, match="another process is writing"), one_of_many(lock, 0, 2):
            pass
    with one_of_many(lock, 0, 2), one_of_many(lock, 1, 2):
        for second in (only_writer(lock), one_of_many(lock, 1, 2), one_of_many(lock, 0, 3)):
            with pytest.raises(UserError, match="another process is writing"), second:
                pass
    assert not server.exists(bucket)


def test_a_stale_lock_is_taken_over_with_a_note(
    server: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "REFRESH_S", 0.1)
    lock = Layout(user_path(bucket)).lock
    long_ago = time.time() - 3600
    lock.write_bytes(Holder("gone", 7, long_ago, long_ago, "token").raw)
    with only_writer(lock):
        assert (
            f"{lock} was left by a process that ended without releasing it (host gone, process 7), for 60 min"
            in capsys.readouterr().err
        )
        begun = Holder.read(lock)
        end = time.monotonic() + 60
        while (now := Holder.read(lock)) is None or begun is None or now.refreshed == begun.refreshed:
            assert time.monotonic() < end, "the lock is kept fresh"
            time.sleep(0.02)
    assert not lock.exists()


def test_a_lock_rewritten_while_it_is_read_is_no_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Layout(user_path(bucket)).lock
    holder = Holder("here", 7, 1.0, 2.0, "token")
    lock.write_bytes(holder.raw)
    store = lock.fs  # type: ignore[attr-defined]  # a UPath
    asked = store.info
    monkeypatch.setattr(
        store, "info", lambda *args, **kwargs: {**asked(*args, **kwargs), "ETag": '"of what was there before"'}
    )
    assert Holder.read(lock) == holder


def test_objects_appear_whole(server: Any, bucket: str) -> None:
    path = user_path(bucket) / "made.json"

    def fail() -> None:
        with atomic_write(path) as partial:
            assert isinstance(partial, Path)
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not path.exists()
    write_json(path, {"a": 1})
    assert json.loads(path.read_bytes()) == {"a": 1}
    with local_copy(path) as copy:
        assert (
            isinstance(copy, Path) and copy.read_bytes() == path.read_bytes() and sha256_file(copy) == sha256_file(path)
        )
    assert not copy.exists()


def test_faults_of_a_store_are_reported(server: Any, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = user_path(bucket) / "made.json"

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patched:
        patched.setattr(path.fs, "put_file", denied)  # type: ignore[attr-defined]  # a UPath
        with pytest.raises(UserError, match=f"{path} cannot be written: Permission denied") as caught:
            write_json(path, {})
    assert "give this user the right to write there" in str(caught.value)

    @contextmanager
    def full(*_: object, **__: object) -> Iterator[str]:
        raise OSError(28, "No space left on device", "/tmp/x")
        yield ""

    monkeypatch.setattr(storage.tempfile, "TemporaryDirectory", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_json(path, {})


def test_no_out_is_an_error(server: Any, bucket: str) -> None:
    with pytest.raises(UserError, match="does not exist or is not a folder"):
        read_manifest(user_path(bucket))
    said = preprocess("verify", bucket)
    assert said.code == 2 and f"preprocess build-labels DATA --out {bucket}" in said.err


def test_user_paths() -> None:
    assert (
        user_path("a/b") == Path("a/b") and user_path("file:///a/b") == Path("/a/b") and not is_remote(user_path("/a"))
    )
    remote = user_path("memory://bucket/out/")
    assert is_remote(remote) and str(Layout(remote).label_file("a")) == "memory://bucket/out/labels/a.parquet"
    with pytest.raises(
        UserError, match=r"nosuch://a cannot be opened: .*\n  allowed: a local folder, or a URL that fsspec knows"
    ):
        user_path("nosuch://a")


def test_training_is_refused_with_the_command_that_copies(tmp_path: Path) -> None:
    assert (
        local_path("a/b") == Path("a/b")
        and local_path(Path("/a")) == Path("/a")
        and local_path("file:///a") == Path("/a")
    )
    assert local_path(tmp_path / "s3:") == tmp_path / "s3:"
    for url in ("s3://bucket/my/out/", "s3://bucket/my/out"):
        with pytest.raises(UserError, match=r"s3://bucket/my/out is not on this machine") as caught:
            local_path(url)
        assert caught.value.fix == "aws s3 sync s3://bucket/my/out out; then give out"
    with pytest.raises(UserError, match=r"fix: copy gs://bucket/out to a local folder out; then give out"):
        local_path("gs://bucket/out")


def test_what_is_read_back_is_what_was_written(server: Any, bucket: str, finished: Built) -> None:
    """Any reader reads the Parquet files of a label dataset in S3."""
    build(finished.data, bucket, "--no-beton")
    with server.open(f"{bucket}/labels/00000000.parquet") as file:
        assert pq.read_table(file).equals(pq.read_table(finished.out / "labels" / "00000000.parquet"))
