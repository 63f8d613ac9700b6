"""Muon for the trunk's matrices, AdamW for all else: equal to torch's own on one device and on ranks, skipped steps,
checkpoints.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from labels.config import load_pipeline
from labels.settings import Model, Optimizer, Runtime, Train
from labels.storage import UserError
from loop_factory import STEPS, VOCABULARY, batches, settings, train_in_this_process
from train.checkpoint import checkpoint_folders
from train.distributed import World, distributed_world
from train.loop import _update
from train.losses.head import HeadLoss
from train.model import Classifier, build_trunk
from train.optim import learning_rate, make_optimizer, muon_matrices
from train.trainer import make_train_state, train_run
from trainer_factory import assert_same_run, lines, small_config, small_out
from trainer_process import assert_ranks_succeed

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))
MUON = ["optimizer.name=muon", "optimizer.muon_lr=2e-3"]
MATRICES = {f"trunk.blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("attn.qkv", "attn.proj")}
MATRICES |= {f"trunk.blocks.{block}.mlp.{layer}.weight" for block in (0, 1) for layer in ("fc1", "fc2")}
CASES = {"plain": [], "clipped": ["optimizer.clip_norm=0.05", "optimizer.ema_decay=0.9"]}
CASES["parts"] = ["runtime.accumulation=2"]
WAYS = {"ddp": [], "ddp-split": ["loss.split_vocabulary=true"], "fsdp": ["runtime.parallel=fsdp"]}


def test_the_loop_is_torchs_muon_and_adamw(tmp_path: Path) -> None:
    train = settings(*MUON, "optimizer.weight_decay=0.1")
    train_state, _ = train_in_this_process(tmp_path, train, ALONE)
    model = make_train_state(train, torch.linspace(0.5, 3.0, VOCABULARY), ALONE).model
    named = dict(model.named_parameters())
    muon = torch.optim.Muon(
        [named[name] for name in sorted(MATRICES)], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    others = {name: parameter for name, parameter in named.items() if name not in MATRICES}
    decayed = [parameter for parameter in others.values() if sum(side > 1 for side in parameter.shape) >= 2]
    exempt = [parameter for parameter in others.values() if sum(side > 1 for side in parameter.shape) < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-3, fused=True)
    for step, batch in enumerate(batches(ALONE)):
        model.zero_grad()
        model(batch.images, batch.label_ids).backward()
        rate = learning_rate(step, STEPS, 2, 1.0)
        for optimizer, peak in ((muon, 2e-3), (adamw, 1e-3)):
            for group in optimizer.param_groups:
                group["lr"] = rate * peak
            optimizer.step()
    for name, parameter in train_state.model.named_parameters():
        assert torch.allclose(parameter, named[name], atol=1e-5), name


def test_what_muon_trains() -> None:
    model = Classifier(build_trunk(settings().model), HeadLoss(Train().loss, torch.ones(5)))
    assert set(muon_matrices(model)) == MATRICES, "not the head, tokens, positions, patch convolution, norms, biases"
    named = dict(model.named_parameters())
    states = make_optimizer(model, Optimizer(name="muon")).state
    assert {name for name in named if "momentum_buffer" in states[named[name]]} == MATRICES
    assert all(("exp_avg" in states[named[name]]) == (name not in MATRICES) for name in named)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    convolutions = Classifier(
        build_trunk(Model(trunk="resnet18", image_size=32)), HeadLoss(Train().loss, torch.ones(5))
    )
    with pytest.raises(UserError, match="the trunk has no linear layer that is trained"):
        make_optimizer(convolutions, Optimizer(name="muon"))
    with pytest.raises(ValueError, match=r"optimizer\.name adamw; allowed: null"):
        Train(optimizer=Optimizer(muon_lr=0.1))
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="has no Muon") as caught:
        make_optimizer(convolutions, Optimizer(name="muon"))
    assert "torch 2.9 or newer" in str(caught.value.allowed)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(on_device: bool, number: float) -> None:
    """`on_device`: as on a GPU, where the step is taken back instead of left out."""
    train_state = make_train_state(settings(*MUON), torch.linspace(0.5, 3.0, VOCABULARY), ALONE)
    batch = batches(ALONE)[0]
    train_state.model(batch.images, batch.label_ids).backward()
    parameters = dict(train_state.model.named_parameters())
    optimizer = train_state.optimizer

    def step(norm: float) -> float:
        loss, norm_ = torch.tensor(1.0), torch.tensor(norm, dtype=torch.float64)
        if not on_device:
            return float(_update(train_state, 0, 1e-3, loss, norm_, 0.5)[1])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * group.get("lr_scale", 1.0)
        skipped = 1.0 - torch.tensor(math.isfinite(norm)).float()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(max(norm / 0.5, 1.0)), skipped  # type: ignore[attr-defined]
        optimizer.step()
        return float(skipped)

    def copies() -> list[torch.Tensor]:
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [tensor.detach().clone() for tensor in (*parameters.values(), *moments)]

    before = copies()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}  # type: ignore[union-attr]
    for parameter in parameters.values():
        parameter.grad[..., 0] = number  # type: ignore[index]
    assert step(math.inf) == 1.0
    assert all(torch.equal(one, other) for one, other in zip(before, copies(), strict=True))
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    assert step(2.0) == 0.0
    changed = [not torch.equal(one, other) for one, other in zip(before, copies(), strict=True)]
    assert all(changed[: len(parameters)])


@contextmanager
def in_float32() -> Iterator[None]:
    """Muon orthogonalises in bf16, where gradients summed in another order differ by 0.4% here and there, and it
    enlarges what is small in them. In float32 the difference between ranks is that of the sums alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        yield


def run_cases(rank: int, folder: Path) -> None:
    with distributed_world(Runtime(device="cpu", threads=1)) as world:
        for way, keys in WAYS.items():
            train_in_this_process(folder / way / "bf16", settings(*MUON, *keys), world)
    with in_float32(), distributed_world(Runtime(device="cpu", threads=1)) as world:
        for way, keys in WAYS.items():
            for name, overrides in CASES.items():
                run = folder / way / name
                _, tensors = train_in_this_process(run, settings(*MUON, *overrides, *keys), world)
                if world.is_first:
                    named = {f"{file}.{key}": tensor for file, part in tensors.items() for key, tensor in part.items()}
                    save_file(named, run / "all.safetensors")


def test_two_ranks_are_one(tmp_path: Path) -> None:
    assert_ranks_succeed(run_cases, tmp_path, ranks=2)
    for name, overrides in CASES.items():
        with in_float32():
            _, tensors = train_in_this_process(tmp_path / "one" / name, settings(*MUON, *overrides), ALONE)
        one = {f"{file}.{key}": tensor for file, part in tensors.items() for key, tensor in part.items()}
        assert "optimizer.momentum_buffer.trunk.blocks.0.attn.qkv.weight" in one
        for way in WAYS:
            other = load_file(tmp_path / way / name / "all.safetensors")
            assert one.keys() == other.keys()
            for key, tensor in one.items():
                assert torch.allclose(tensor, other[key], rtol=1e-4, atol=1e-5), (way, name, key)
            for line, same in zip(lines(tmp_path / "one" / name), lines(tmp_path / way / name), strict=True):
                assert "loss" not in line or math.isclose(line["loss"], same["loss"], rel_tol=1e-4), (way, name)
    train_in_this_process(tmp_path / "one" / "bf16", settings(*MUON), ALONE)
    for way in WAYS:
        for line, same in zip(lines(tmp_path / "one" / "bf16"), lines(tmp_path / way / "bf16"), strict=True):
            assert "loss" not in line or math.isclose(line["loss"], same["loss"], rel_tol=1e-3), way


def test_a_run_resumes_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, config = small_out(tmp_path), small_config(tmp_path)
    keys = [
        "train.optimizer.name=muon",
        "train.samples=480",
        "train.checkpoint.keep=100",
        "train.optimizer.schedule=wsd",
    ]
    keys += ["train.optimizer.ema_decay=0.9"]
    assert train_run(out, tmp_path / "run", load_pipeline(config, keys))
    assert "; Muon on 4 matrices (0.0M numbers), AdamW on all else" in capsys.readouterr().out
    for kept in (1, 4):
        copy = tmp_path / f"copy{kept}"
        shutil.copytree(tmp_path / "run", copy)
        for folder in checkpoint_folders(copy)[kept:]:
            shutil.rmtree(folder)
        assert train_run(out, copy, load_pipeline(config, keys))
        assert_same_run(tmp_path / "run", copy)
    with pytest.raises(UserError, match="name was 'muon', is now 'adamw'"):
        train_run(out, copy, load_pipeline(config, [*keys, "train.optimizer.name=adamw"]))
