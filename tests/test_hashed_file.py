"""A file hashed while it is written: the bytes, the hash, and a disk that is full."""

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import direct, hashed_file
from preprocess.hashed_file import HashedFile


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 20_000), max_size=8))
def test_bytes_and_hash_are_those_given(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    path, rng = tmp_path_factory.getbasetemp() / "hashed", np.random.default_rng(0)
    parts = [rng.bytes(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashed_file, "_BLOCK_BYTES", 8192)
        with HashedFile(path) as file:
            for part in parts:
                before = file.size
                file.write(memoryview(part))
                assert file.size == before + len(part)
    assert path.read_bytes() == b"".join(parts)
    assert file.sha256 == hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_write_that_fails_is_told_and_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    before, opened = threading.active_count(), len(os.listdir("/proc/self/fd"))
    file = HashedFile(tmp_path / "file")
    file.write(b"x")
    monkeypatch.setattr(direct.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.close()
    assert file.closed
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (before, opened)
