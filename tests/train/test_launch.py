"""What starts a run: the launcher's variables, whole, missing or wrong; and one process alone in a run folder."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from image_folders import colours
from labels.config import load_pipeline
from labels.locks import only_writer
from labels.settings import Runtime
from labels.storage import UserError
from loop_factory import settings
from train import cli
from train.distributed import World, distributed_world, launched, only_run
from train.trainer import synthetic_run, train_model, train_run
from trainer_factory import small_config, small_out
from trainer_process import assert_ranks_succeed

ALONE = World(0, 1, torch.device("cpu"))
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_variables(**variables: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": ""}, (0, 1, 0)),
        ({"WORLD_SIZE": " 1 "}, (0, 1, 0)),
        ({"RANK": "3"}, (0, 1, 0)),
        ({"RANK": "x", "LOCAL_RANK": "7"}, (0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "3"}, (0, 1, 0)),
        (MEETING, (0, 1, 0)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}, (0, 1, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", **MEETING}, (3, 4, 1)),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "", **MEETING}, (1, 2, 0)),
    ],
)
def test_variables_count_only_with_a_world_size(
    environment: Callable[..., None], variables: dict[str, str], expected: tuple[int, int, int]
) -> None:
    environment(**variables)
    assert launched() == expected


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "", **MEETING}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "0"}, "the variable WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-1"}, "the variable WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "2.0"}, "the variable WORLD_SIZE is '2.0'"),
        ({"WORLD_SIZE": "two"}, "the variable WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "the variable RANK is '2'\n  allowed: 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "first", **MEETING}, "the variable RANK is 'first'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "9", **MEETING}, "the variable LOCAL_RANK is '9'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "x"}, "the variable MASTER_PORT is 'x'"),
    ],
)
def test_a_wrong_variable_is_named_before_anything_waits_for_it(
    environment: Callable[..., None], variables: dict[str, str], problem: str
) -> None:
    environment(**variables)
    start = "fix: start all ranks with torchrun; for one process alone, `unset WORLD_SIZE`"
    with pytest.raises(UserError, match=re.escape(problem)) as caught, distributed_world(Runtime(device="cpu")):
        pass
    assert start in str(caught.value)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_without_a_launcher_changes_no_evaluator(
    environment: Callable[..., None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(**{name: "3"})
    colours(tmp_path / "data", ("red", "blue"))
    arguments = ["knn", "--data", f"folders:{tmp_path / 'data'}", "--encoder", "pixels:8", "--set", "knn.k=[1]"]
    cli.cli([*arguments, "--out", str(tmp_path / "result.json")], standalone_mode=False)
    assert (tmp_path / "result.json").is_file() and "1-nn" in capsys.readouterr().out


class _Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.head(images).mean() + 0 * targets.sum()


def start_run(run: Path, folder: Path) -> bool:
    return train_run(small_out(folder), run, load_pipeline(small_config(folder), ["train.samples=112"]))


def start_synthetic(run: Path, folder: Path) -> bool:
    return synthetic_run(run, load_pipeline(small_config(folder), ["train.samples=112"]), 31, 8)


def start_model(run: Path, _: Path) -> bool:
    def batches(first: int, steps: int) -> Iterable[Any]:
        return (_Batch(torch.ones(16, 3), torch.ones(16)) for _ in range(first, steps))

    inputs = lambda batch: (batch.x, batch.y)  # noqa: E731
    return train_model(_Mean(), batches, inputs, settings(), run, "identity", ALONE, lambda: False)


class _Batch:
    bad = 0

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y


@pytest.mark.parametrize("start", [start_run, start_synthetic, start_model])
def test_a_second_start_of_a_run_is_refused_and_changes_nothing(
    start: Callable[[Path, Path], bool], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with only_writer(run / ".lock"):
        problem = f"another process is writing to {run} (host "
        with pytest.raises(UserError, match=re.escape(problem) + rf".*process {os.getpid()}\)"):
            start(run, tmp_path)
        assert [path.name for path in run.iterdir()] == [".lock"]
    assert start(run, tmp_path), "a lock that is released, or whose holder was killed, blocks nobody"


def all_ranks_of_a_run(rank: int, folder: Path) -> None:
    with distributed_world(Runtime(device="cpu", threads=1)) as world:
        with only_run(folder / "free", world):
            assert (folder / "free" / ".lock").is_file()
        problem = "another process is writing" if rank == 0 else "the first rank cannot take the lock"
        with pytest.raises(UserError, match=problem), only_run(folder / "held", world):
            pass


def test_the_ranks_of_a_launch_are_one_run_and_are_refused_together(tmp_path: Path) -> None:
    with only_writer(tmp_path / "held" / ".lock"):
        assert_ranks_succeed(all_ranks_of_a_run, tmp_path, ranks=2)
