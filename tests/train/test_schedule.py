"""Schedule wsd: warm-up, constant, cooldown; runs that are resumed, lengthened and branched."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labels.config import load_pipeline
from labels.settings import Train
from labels.storage import UserError
from train.checkpoint import checkpoint_folders
from train.cli import cli
from train.optim import learning_rate
from train.trainer import train_run
from trainer_factory import assert_same_run, losses, small_config, small_out

WSD = ["train.optimizer.schedule=wsd", "train.checkpoint.keep=100"]
SHORT = [*WSD, "train.samples=480", "train.optimizer.cooldown_samples=160"]
LONG = [*WSD, "train.samples=800", "train.optimizer.cooldown_samples=240"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_out(tmp_path_factory.mktemp("schedule"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def short(out: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("short") / "run"
    assert train_run(out, run, load_pipeline(config, SHORT))
    return run


def rewound(run: Path, copy: Path, samples: int) -> Path:
    """A copy of the run as it was when its checkpoint of `samples` was the newest."""
    shutil.copytree(run, copy)
    for folder in checkpoint_folders(copy):
        if int(folder.name.removeprefix("samples-")) > samples:
            shutil.rmtree(folder)
    return copy


def test_the_rate_is_constant_between_warm_up_and_cooldown() -> None:
    rates = [learning_rate(step, 100, 10, 2.0, 20) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:81] == [2.0] * 71
    assert rates[81:] == pytest.approx([2.0 * (1 - (step / 20) ** 0.5) for step in range(1, 20)])
    assert [learning_rate(step, 100, 10, 2.0, 0) for step in range(10, 100)] == [2.0] * 90, "no cooldown"


@pytest.mark.parametrize(
    ("keys", "cooldown"),
    [
        ({"schedule": "wsd"}, [800, 1000]),
        ({"schedule": "wsd", "cooldown_samples": 0}, [1000, 1000]),
        ({"schedule": "wsd", "cooldown_samples": "0.25k"}, [750, 1000]),
        ({}, None),
    ],
)
def test_where_the_cooldown_is(keys: dict, cooldown: list[int] | None) -> None:
    optimizer = {"warmup_samples": 100, **keys}
    assert Train.model_validate({"samples": 1007, "batch_size": 10, "optimizer": optimizer}).cooldown == cooldown


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"cooldown_samples": 100}, "cooldown_samples is 100, optimizer.schedule cosine; allowed: null"),
        ({"schedule": "wsd", "cooldown_samples": 950}, "warmup_samples is 100, the cooldown begins at 50"),
        ({"schedule": "wsd", "cooldown_samples": 2000}, "warmup_samples is 100, the cooldown begins at 0"),
    ],
)
def test_contradictions_are_refused(keys: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Train.model_validate({"samples": 1000, "batch_size": 10, "optimizer": {"warmup_samples": 100, **keys}})


@pytest.mark.parametrize("samples", [96, 288, 384])
def test_a_resumed_run_is_the_same_before_and_within_the_cooldown(
    out: Path, config: Path, short: Path, tmp_path: Path, samples: int
) -> None:
    run = rewound(short, tmp_path / "run", samples)
    assert train_run(out, run, load_pipeline(config, SHORT))
    assert_same_run(short, run)
    peak = [rate for _, _, rate in losses(run)][6:21]
    assert peak == [4e-3] * 15 and losses(run)[-1][2] == pytest.approx(4e-3 * (1 - 0.9**0.5))


def test_a_run_is_lengthened_before_its_cooldown(
    out: Path, config: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_run(out, tmp_path / "long", load_pipeline(config, LONG))
    run = rewound(short, tmp_path / "run", 288)
    capsys.readouterr()
    assert train_run(out, run, load_pipeline(config, LONG))
    assert "= 50 steps, the last 15 a cooldown; resumed at step 18" in capsys.readouterr().out
    assert_same_run(tmp_path / "long", run)
    assert load_pipeline(run / "config.yaml").train.samples == 800
    assert train_run(out, run, load_pipeline(run / "config.yaml")), "it is finished"


def test_a_run_is_not_lengthened_within_its_cooldown(out: Path, config: Path, short: Path, tmp_path: Path) -> None:
    run = rewound(short, tmp_path / "run", 384)
    with pytest.raises(UserError) as caught:
        train_run(out, run, load_pipeline(config, LONG))
    assert "has seen 384 samples: its cooldown, from 320 to 480, has begun; now it would be from 560 to 800" in (
        caught.value.problem
    )
    kept, _, again = str(caught.value.fix).partition(", or ")
    assert "after samples-000000000288: training goes on from there" in again
    assert train_run(out, rewound(run, tmp_path / "again", 288), load_pipeline(config, LONG))
    keys = re.findall(r"--set (\S+)", kept)
    assert train_run(out, run, load_pipeline(config, [*LONG, *keys]))
    assert_same_run(short, run)


def test_a_cooldown_cannot_begin_in_the_past(out: Path, config: Path, short: Path, tmp_path: Path) -> None:
    run = rewound(short, tmp_path / "run", 288)
    earlier = [*WSD, "train.samples=384", "train.optimizer.cooldown_samples=128"]
    with pytest.raises(UserError) as caught:
        train_run(out, run, load_pipeline(config, earlier))
    assert "has seen 288 samples, but its cooldown would begin at 256" in caught.value.problem
    (key,) = re.findall(r"--set (\S+),", str(caught.value.fix))
    assert train_run(out, run, load_pipeline(config, [*earlier, key]))
    assert losses(run)[-1][0] == 26


EVERY = ["train.checkpoint.every_samples=16"]


def branch(out: Path, spec: str, run: Path, *keys: str) -> None:
    """`train run --branch`, with the configuration of the run that it leaves."""
    given = ["run", "--beton", str(out), "--branch", spec, "--out", str(run)]
    cli.main([*given, *(part for key in keys for part in ("--set", key))], standalone_mode=False)


def tensors(run: Path, samples: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"samples-{samples:012d}"
    files = folder.glob("*.safetensors")
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_a_branch_goes_on_exactly_and_cools_down(out: Path, config: Path, tmp_path: Path) -> None:
    averaged = [*SHORT, *EVERY, "train.optimizer.ema_decay=0.9"]
    parent, new = tmp_path / "parent", tmp_path / "new"
    assert train_run(out, parent, load_pipeline(config, averaged))
    for samples, cooldown in ((192, 96), (320, 80), (96, None)):
        new = tmp_path / f"new{samples}"
        branch(out, f"{parent}@{samples}", new, f"train.optimizer.cooldown_samples={cooldown or 'null'}")
        first = samples // 16
        assert losses(new)[: first + 1] == losses(parent)[: first + 1], "the first step too, and the curve before it"
        one, other = tensors(parent, samples + 16), tensors(new, samples + 16)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        total = samples + (cooldown or 32)  # a quarter of 96 samples is 24: one batch and a half
        same = [*averaged, f"train.samples={total}", f"train.optimizer.cooldown_samples={total - samples}"]
        assert train_run(out, tmp_path / f"whole{samples}", load_pipeline(config, same))
        assert_same_run(tmp_path / f"whole{samples}", new)
        assert json.loads((new / "data.json").read_bytes())["branch"] == {"run": str(parent), "samples": samples}


def test_a_branch_resumes_by_the_same_command_without_the_run_that_it_left(
    out: Path, short: Path, tmp_path: Path
) -> None:
    parent, new = tmp_path / "parent", tmp_path / "new"
    shutil.copytree(short, parent)
    arguments = (out, f"{parent}@192", new, "train.optimizer.cooldown_samples=144", *EVERY)
    branch(*arguments)
    again = rewound(new, tmp_path / "again", 240)
    shutil.rmtree(parent)
    branch(out, f"{parent}@192", again, *arguments[3:])
    assert_same_run(new, again)
    with pytest.raises(UserError, match="holds another run than the branch"):
        branch(out, f"{parent}@96", again)
    resumed = rewound(new, tmp_path / "resumed", 240)
    assert train_run(out, resumed, load_pipeline(new / "config.yaml"))
    assert_same_run(new, resumed)
    assert json.loads((resumed / "data.json").read_bytes())["branch"]["samples"] == 192


def test_what_cannot_be_a_branch_is_refused(out: Path, config: Path, short: Path, tmp_path: Path) -> None:
    cosine = tmp_path / "cosine"
    assert train_run(out, cosine, load_pipeline(config, ["train.samples=192"]))
    for spec, keys, problem in (
        (f"{short}@384", [], "@384: that is in its cooldown"),
        (f"{short}@200", [], "@200: it has no such checkpoint"),
        (f"{short}@x", [], "does not name a run and samples"),
        (f"{tmp_path}@96", [], "has no finished checkpoint"),
        (f"{cosine}@96", [], "was trained with train.optimizer.schedule cosine"),
        (f"{short}@96", ["train.samples=5"], "--set train.samples was given with --branch"),
        (f"{short}@96", ["train.optimizer.lr=1"], "train.optimizer.lr was 0.004, is now 1.0"),
        (f"{short}@96", ["train.optimizer.schedule=cosine", "train.optimizer.cooldown_samples=null"], "is cosine"),
    ):
        with pytest.raises(UserError) as caught:
            branch(out, spec, tmp_path / "new", *keys)
        assert problem in caught.value.problem and not checkpoint_folders(tmp_path / "new")
    with pytest.raises(UserError) as caught:
        branch(out, f"{short}@384", tmp_path / "new")
    assert "96, 192, 288" in str(caught.value.allowed)
    branch(out, str(caught.value.fix).removeprefix("--branch "), tmp_path / "new")
    for options, problem in (
        (["--init", str(short), "--out", "x"], "--branch was given with --init"),
        (["--synthetic", "--out", "x"], "--synthetic was given with --branch"),
        ([], "--branch was given without --out"),
    ):
        with pytest.raises(UserError, match=problem):
            cli.main(["run", "--beton", str(out), "--branch", f"{short}@96", *options], standalone_mode=False)


def test_other_keys_of_the_run_still_may_not_change(out: Path, config: Path, short: Path, tmp_path: Path) -> None:
    run = rewound(short, tmp_path / "run", 288)
    for keys, problem in (
        (["train.optimizer.lr=1e-3"], "train.optimizer.lr was 0.004, is now 0.001"),
        (["train.optimizer.schedule=cosine", "train.optimizer.cooldown_samples=null"], "schedule was 'wsd', is now"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            train_run(out, run, load_pipeline(config, [*LONG, *keys]))
        assert "not set" not in caught.value.problem
