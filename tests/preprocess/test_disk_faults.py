"""A full disk, a limit on file sizes, lost rights: the error has file, reason and fix; no partial file stays."""

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from labels import storage
from labels.storage import (
    TEMPORARY_SUFFIX,
    Layout,
    UserError,
    atomic_write,
    disk_errors,
    own_partials,
    remove_partials,
    write_json,
)
from preprocess.betons.write import DirectFile
from preprocess.stage import remove_leftovers
from shard_factory import Built, build, contents, jpeg, preprocess, refused, sample, write_shards, write_tar

NUMBERS = np.random.default_rng(0).integers(0, 1 << 60, 200_000)


def by_python(path: Path) -> None:
    path.write_bytes(NUMBERS.tobytes())


def by_numpy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, NUMBERS)


def by_arrow(path: Path) -> None:
    pq.write_table(pa.table({"number": NUMBERS}), path)


def by_duckdb(path: Path) -> None:
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{path}' AS made")
        con.execute("CREATE TABLE made.t AS SELECT hash(range) AS number FROM range(300_000)")


def by_duckdb_copy(path: Path) -> None:
    with duckdb.connect() as con:
        con.execute(f"COPY (SELECT hash(range) AS number FROM range(300_000)) TO '{path}' (FORMAT parquet)")


def by_beton_writer(path: Path) -> None:
    with DirectFile(path) as file:
        file.write(NUMBERS.view(np.uint8))


def by_safetensors(path: Path) -> None:
    save_file({"numbers": NUMBERS}, path)


WRITERS = [by_python, by_beton_writer, by_numpy, by_arrow, by_duckdb, by_duckdb_copy, by_safetensors]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB of one's own."""
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def size_limit() -> Iterator[None]:
    """No file of this process may grow beyond 512 KiB."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_reported_by_every_writer(small_disk: Path, write: Callable[[Path], None]) -> None:
    (small_disk / "kept").write_text("kept")
    with (
        pytest.raises(UserError, match=r"made cannot be written: No space left on device \(\d+ MiB free\)") as caught,
        atomic_write(small_disk / "made") as partial,
    ):
        write(partial)
    assert "fix: free space there, then run the same command again: what is finished is kept" in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["kept"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_limit_on_file_sizes_is_reported_by_every_writer(
    tmp_path: Path, size_limit: None, write: Callable[[Path], None]
) -> None:
    with (
        pytest.raises(UserError, match=r"made cannot be written: (File too large|No space left)"),
        atomic_write(tmp_path / "made") as partial,
    ):
        write(partial)
    assert not list(tmp_path.iterdir())


def test_duckdb_that_spills_to_a_full_disk(small_disk: Path) -> None:
    spill = small_disk / "spill.partial"
    with (
        duckdb.connect(config={"temp_directory": str(spill), "memory_limit": "20MB", "threads": 1}) as con,
        pytest.raises(UserError, match=r"spill.partial cannot be written: No space left on device"),
        disk_errors(spill),
    ):
        con.execute("SELECT count(*) FROM (SELECT DISTINCT hash(range) FROM range(3_000_000))").fetchall()


def test_a_build_on_a_full_disk_resumes_when_there_is_space(tmp_path: Path, small_disk: Path) -> None:
    """Betons are written over holes: the disk fills up while pages are filled, which must be an error and no SIGBUS."""
    data = write_shards(tmp_path / "data", 2, 4)
    write_tar(
        data / "big.tar",
        [member for number in range(9) for member in sample(str(number), "words", jpeg(number, 256, 256))],
    )
    build(data, tmp_path / "expected")
    found = refused(data, small_disk / "out")
    assert "cannot be written: No space left on device" in found and "fix: free space there" in found
    out = small_disk / "out"
    assert (
        list(out.rglob("*.parquet"))
        and not list(out.rglob(f"*{TEMPORARY_SUFFIX}"))
        and not (out / "manifest.json").exists()
    )
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    build(data, out)
    assert contents(out) == contents(tmp_path / "expected")
    assert preprocess("verify", out).code == 0


@pytest.mark.parametrize(
    ("number", "reported"),
    [
        (errno.ENOSPC, "free space there"),
        (errno.EDQUOT, "have the quota raised"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "give this user the right to write there"),
        (errno.EPERM, "give this user the right to write there"),
        (errno.EROFS, "mount it writable"),
    ],
)
@pytest.mark.parametrize("where", ["mkdir", "write", "fsync", "rename"])
def test_every_reason_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reported: str, where: str
) -> None:
    path = tmp_path / "folder" / "made.json"

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    name = {"mkdir": "mkdir", "write": "write_text"}.get(where)
    with monkeypatch.context() as patched:
        if name:
            patched.setattr(Path, name, fail)
        else:
            patched.setattr(storage.os, {"fsync": "fsync", "rename": "replace"}[where], fail)
        with pytest.raises(UserError, match="made.json cannot be written: " + os.strerror(number)) as caught:
            write_json(path, {})
    assert reported in (caught.value.fix or "") and "run the same command again" in (caught.value.fix or "")
    assert not [left for left in tmp_path.rglob("*") if left.is_file()]
    write_json(path, {})


def test_rights_lost_in_the_middle_of_a_build(finished: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root no right is ever lost: injected at the third rename."""
    renames = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal renames
        renames += 1
        if renames > 3:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(storage.os, "replace", replace)
        found = refused(finished.data, tmp_path / "out")
    assert "cannot be written: Permission denied" in found and str(tmp_path / "out") in found
    assert not list((tmp_path / "out").rglob(f"*{TEMPORARY_SUFFIX}"))
    build(finished.data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished.out)


def test_an_input_that_may_not_be_read_is_no_fault_of_the_output(tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/0.tar")
    with pytest.raises(PermissionError, match=r"/data/0\.tar"), atomic_write(tmp_path / "made"):
        raise denied
    with pytest.raises(OSError, match="Input/output error"), atomic_write(tmp_path / "made"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(ValueError, match="No space left on device"), atomic_write(tmp_path / "made"):
        raise ValueError("a caption: No space left on device")
    assert not list(tmp_path.iterdir())


def test_the_first_error_is_reported_if_cleaning_up_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "later")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(ValueError, match="first"), atomic_write(tmp_path / "made"):
        raise ValueError("first")


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """A lost worker that still lives and the one that took its task."""
    with own_partials(), atomic_write(tmp_path / "made") as first:
        first.write_text("same")
        with own_partials(), atomic_write(tmp_path / "made") as second:
            assert second != first
            second.write_text("same")
        assert (tmp_path / "made").read_text() == "same"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    with atomic_write(tmp_path / "made") as partial:
        partial.write_text("new")
        assert partial.name == "made.partial"


def test_what_killed_processes_left_is_removed(built: Built) -> None:
    before = contents(built.out)
    for folder in ("", "labels", "beton", "done", "done/labels", "done/beton"):
        (built.out / folder / "x.0123456789ab.partial").write_text("")
    mine = built.out / "labels" / "mine"
    mine.write_text("")
    remove_leftovers(Layout(built.out))
    mine.unlink()
    assert contents(built.out) == before
    remove_partials(built.out / "not there")
    shutil.rmtree(built.out)
    remove_leftovers(Layout(built.out))


def test_a_folder_that_cannot_be_made_names_the_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "that is not there")
    for name, why in (
        ("file", "file is a file"),
        ("file/deeper", "file is a file"),
        ("link", "link is a link that leads nowhere"),
    ):
        with pytest.raises(UserError) as caught:
            write_json(tmp_path / name / "made.json", {})
        assert f"the folder {tmp_path / name} cannot be made: {tmp_path}/{why}" in str(
            caught.value
        ) and "name another folder" in str(caught.value)
    with pytest.raises(UserError, match="the folder /proc/none cannot be made: the file system refuses it"):
        write_json(Path("/proc/none/made.json"), {})


def test_an_out_that_is_a_dead_link_is_refused(finished: Built, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    assert "out is a link that leads nowhere" in refused(finished.data, tmp_path / "out")
