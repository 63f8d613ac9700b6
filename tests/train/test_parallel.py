"""Ranks over gloo are one rank with the same global batch: DDP and FSDP2, a split head, every loss, in parts, clipped,
averaged.
"""

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from labels.settings import Loss, Runtime
from loop_factory import settings, train_in_this_process
from train.distributed import World, distributed_world, spread
from trainer_factory import lines
from trainer_process import assert_ranks_succeed

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = get_args(Loss.model_fields["name"].annotation)
PARALLEL = ["ddp", "fsdp"]
WAYS = {way: [f"runtime.parallel={way}"] for way in PARALLEL}
WAYS |= {f"{way}-split": [f"runtime.parallel={way}", "loss.split_vocabulary=true"] for way in PARALLEL}
CASES = {f"{loss}-1": [f"loss.name={loss}"] for loss in LOSSES}
CASES |= {f"{loss}-4": [f"loss.name={loss}", "runtime.accumulation=4"] for loss in LOSSES if loss != "two_way"}
CASES["clipped"] = ["optimizer.clip_norm=0.05", "optimizer.ema_decay=0.9"]
CASES["in chunks"] = ["loss.memory=300", "loss.split_vocabulary=true"]
CASES["checkpointed"] = ["model.grad_checkpointing=true", "runtime.accumulation=2"]
# FSDP adds nothing to how a split head's gradients are added up in parts: DDP's cases show it.
RUNS = [(way, name) for way in WAYS for name in CASES if way != "fsdp-split" or not name.endswith("-4")]


def run_cases(rank: int, folder: Path) -> None:
    """In a process of its own: all cases one after the other; the first rank writes down the weights."""
    with distributed_world(Runtime(device="cpu", threads=1)) as world:
        assert world.rank == rank
        for way, name in RUNS:
            run = folder / way / name
            _, tensors = train_in_this_process(run, settings(*CASES[name], *WAYS[way]), world)
            if world.is_first:
                save_file(
                    {f"{file}.{key}": tensor for file, named in tensors.items() for key, tensor in named.items()},
                    run / "all.safetensors",
                )
            assert bool(tensors) == world.is_first


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    assert_ranks_succeed(run_cases, folder, ranks=2)
    alone = World(0, 1, torch.device("cpu"))
    for name, overrides in CASES.items():
        _, tensors = train_in_this_process(folder / "one" / name, settings(*overrides), alone)
        save_file(
            {f"{file}.{key}": tensor for file, named in tensors.items() for key, tensor in named.items()},
            folder / "one" / name / "all.safetensors",
        )
    return folder


@pytest.mark.parametrize(("way", "name"), RUNS)
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
    with distributed_world(Runtime(device="cpu", threads=1)) as world:
        for way, keys in WAYS.items():
            _, tensors = train_in_this_process(folder / way, settings(*keys), world, spoil={2: math.inf})
            if world.is_first:
                assert {tensor.item() for name, tensor in tensors["optimizer"].items() if name.startswith("step.")} == {
                    5.0
                }
                assert all(tensor.isfinite().all() for named in tensors.values() for tensor in named.values())


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    assert_ranks_succeed(broken_on_one_rank, tmp_path, ranks=2)  # the spoilt image is the second rank's
    for way in WAYS:
        assert [bool(line.get("skipped")) for line in lines(tmp_path / way)[:6]] == [
            False,
            False,
            True,
            False,
            False,
            False,
        ]


def look_at_parts(rank: int) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from train.trainer import make_train_state

    with distributed_world(Runtime(device="cpu", threads=1)) as world:
        train_state = make_train_state(
            settings("runtime.parallel=fsdp", "optimizer.ema_decay=0.9"), torch.ones(31), world
        )
        assert all(isinstance(parameter, DTensor) for parameter in train_state.model.parameters())
        assert all(isinstance(block, FSDPModule) for block in train_state.model.trunk.blocks)  # type: ignore[union-attr]
        head, moments = train_state.model.head[1].weight, train_state.optimizer.state[train_state.model.head[1].weight]  # type: ignore[index]
        for tensor in (head, moments["exp_avg"], train_state.ema.average["head.1.weight"]):  # type: ignore[union-attr]
            assert isinstance(tensor, DTensor) and tensor.to_local().shape == ((16, 24) if rank == 0 else (15, 24))


def look_at_a_split_head(rank: int) -> None:
    from torch.distributed.tensor import DTensor

    from train.trainer import make_train_state

    with distributed_world(Runtime(device="cpu", threads=1)) as world:
        train_state = make_train_state(
            settings("loss.split_vocabulary=true", "optimizer.ema_decay=0.9"), torch.ones(31), world
        )
        split = {name for name, parameter in train_state.model.named_parameters() if isinstance(parameter, DTensor)}
        assert split == {"head.1.weight", "head.1.bias"}
        linear = train_state.model.head[1]  # type: ignore[index]
        moments, average = train_state.optimizer.state[linear.weight], train_state.ema.average["head.1.weight"]  # type: ignore[union-attr]
        for tensor in (linear.weight, moments["exp_avg"], average):
            assert isinstance(tensor, DTensor) and tensor.to_local().shape == ((16, 24) if rank == 0 else (15, 24))
        sent = []
        train_state.ddp_model.register_comm_hook(None, lambda _, bucket: _note(sent, bucket))  # type: ignore[operator]
        images, label_ids = torch.zeros(2, 3, 16, 16), torch.tensor([[3, 30], [1, -1]])
        train_state.ddp_model(images, label_ids).backward()
        trunk = sum(parameter.numel() for name, parameter in train_state.model.named_parameters() if name not in split)
        assert sum(sent) == trunk, "DDP sends the gradients of all but the split layer"
        assert linear.weight.grad.to_local().shape == linear.weight.to_local().shape


def _note(sent: list[int], bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    sent.append(bucket.buffer().numel())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_a_split_heads_weights_moments_averages_and_gradients_stay_apart() -> None:
    assert_ranks_succeed(look_at_a_split_head, ranks=2)


def test_fsdp_splits_weights_moments_and_averages() -> None:
    assert_ranks_succeed(look_at_parts, ranks=2)


def test_one_rank_is_left_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    assert spread(model, "fsdp", World(0, 1, torch.device("cpu"))) is model
