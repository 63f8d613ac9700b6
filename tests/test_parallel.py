"""Two ranks over gloo are one rank with the same global batch: DDP and FSDP2, every loss, in parts, clipped, averaged."""

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from loop_factory import settings, train_here
from safetensors.torch import load_file, save_file
from trainer_factory import lines
from trainer_process import together

from labels.settings import Loss, Runtime
from train.distributed import World, world
from train.parallel import spread

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = get_args(Loss.model_fields["name"].annotation)
WAYS = ["ddp", "fsdp"]
CASES = {f"{loss}-1": [f"loss.name={loss}"] for loss in LOSSES}
CASES |= {f"{loss}-4": [f"loss.name={loss}", "runtime.accumulation=4"] for loss in LOSSES if loss != "two_way"}
CASES["clipped"] = ["optimizer.clip_norm=0.05", "optimizer.ema_decay=0.9"]
CASES["checkpointed"] = ["model.grad_checkpointing=true", "runtime.accumulation=2"]


def run_cases(rank: int, folder: Path, ways: list[str]) -> None:
    """In a process of its own: all cases one after the other; the first rank writes down the weights."""
    with world(Runtime(device="cpu", threads=1)) as here:
        assert here.rank == rank
        for way in ways:
            for name, overrides in CASES.items():
                run = folder / way / name
                _, tensors = train_here(run, settings(*overrides, f"runtime.parallel={way}"), here)
                if here.is_first:
                    save_file(
                        {f"{file}.{key}": tensor for file, named in tensors.items() for key, tensor in named.items()},
                        run / "all.safetensors",
                    )
                assert bool(tensors) == here.is_first


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    together(run_cases, folder, WAYS, ranks=2)
    alone = World(0, 1, torch.device("cpu"))
    for name, overrides in CASES.items():
        _, tensors = train_here(folder / "one" / name, settings(*overrides), alone)
        save_file(
            {f"{file}.{key}": tensor for file, named in tensors.items() for key, tensor in named.items()},
            folder / "one" / name / "all.safetensors",
        )
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(runs: Path, way: str, name: str) -> None:
    one, two = lines(runs / "one" / name), lines(runs / way / name)
    assert len(one) == len(two) == 7
    for line, other in zip(one[:6], two[:6], strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(line[key], other[key], rel_tol=1e-5), (key, line, other)
    tensors, others = (load_file(runs / kind / name / "all.safetensors") for kind in ("one", way))
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert torch.allclose(tensor, others[key], rtol=1e-4, atol=1e-5), key


def broken_on_one_rank(rank: int, folder: Path) -> None:
    with world(Runtime(device="cpu", threads=1)) as here:
        for way in WAYS:
            _, tensors = train_here(folder / way, settings(f"runtime.parallel={way}"), here, spoil={2: math.inf})
            if here.is_first:
                assert {tensor.item() for name, tensor in tensors["optimizer"].items() if name.startswith("step.")} == {5.0}
                assert all(tensor.isfinite().all() for named in tensors.values() for tensor in named.values())


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    together(broken_on_one_rank, tmp_path, ranks=2)  # the spoilt image is the second rank's
    for way in WAYS:
        assert [bool(line.get("skipped")) for line in lines(tmp_path / way)[:6]] == [False, False, True, False, False, False]


def look_at_parts(rank: int) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from train.run import make_learner

    with world(Runtime(device="cpu", threads=1)) as here:
        learner = make_learner(settings("runtime.parallel=fsdp", "optimizer.ema_decay=0.9"), torch.ones(31), here)
        assert all(isinstance(parameter, DTensor) for parameter in learner.model.parameters())
        assert all(isinstance(block, FSDPModule) for block in learner.model.trunk.blocks)  # type: ignore[union-attr]
        head, moments = learner.model.head[1].weight, learner.optimizer.state[learner.model.head[1].weight]  # type: ignore[index]
        for tensor in (head, moments["exp_avg"], learner.ema.average["head.1.weight"]):  # type: ignore[union-attr]
            assert isinstance(tensor, DTensor) and tensor.to_local().shape == ((16, 24) if rank == 0 else (15, 24))


def test_fsdp_splits_weights_moments_and_averages() -> None:
    together(look_at_parts, ranks=2)


def test_one_rank_is_left_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    assert spread(model, "fsdp", World(0, 1, torch.device("cpu"))) is model
