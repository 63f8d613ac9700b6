"""Fixtures of several test files: a finished label dataset, and a copy of it that a test may damage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_factory import Built, build, healthy, sample, write_tar


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Two shards of 12 and 9 good samples; one bad caption and one bad image. Not to be changed: see `built`."""
    folder = tmp_path_factory.mktemp("finished")
    write_tar(folder / "data" / "00000000.tar", [*healthy(12), *sample("000000100", b"\xff\xfe")])
    write_tar(
        folder / "data" / "00000001.tar", [*healthy(9, first=12), *sample("000000101", "a broken image", b"no image")]
    )
    build(folder / "data", folder / "out")
    return Built(folder / "data", folder / "out")


@pytest.fixture
def built(finished: Built, tmp_path: Path) -> Built:
    """A private copy of `finished`: the same data folder, another label dataset."""
    shutil.copytree(finished.out, tmp_path / "out")
    return Built(finished.data, tmp_path / "out")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: at the tests' sizes threads only wait for each other, longer on a busy machine."""
    import torch  # takes a second, which tests of stage 1 have no need of

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
