"""The loop by itself: against a naive one, in parts, with numbers that are not finite, in fp16, clipped, averaged."""

import math
from pathlib import Path

import pytest
import torch

from labels.storage import UserError
from loop_factory import STEPS, VOCABULARY, batches, settings, train_in_this_process
from train.distributed import World
from train.loop import micro_batches
from train.optim import LossScale, learning_rate, make_optimizer
from train.trainer import make_train_state
from trainer_factory import lines, losses

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))


def close(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]], atol: float) -> bool:
    return all(
        torch.allclose(one[file][name], other[file][name], atol=atol, rtol=0) for file in one for name in one[file]
    )


def test_the_loop_is_the_naive_loop(tmp_path: Path) -> None:
    train = settings()
    train_state, found = train_in_this_process(tmp_path, train, ALONE)
    naive = make_train_state(train, torch.linspace(0.5, 3.0, VOCABULARY), ALONE).model
    decayed = [parameter for parameter in naive.parameters() if parameter.squeeze().ndim > 1]
    others = [parameter for parameter in naive.parameters() if parameter.squeeze().ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0}], betas=(0.9, 0.98), eps=1e-3
    )
    for step, batch in enumerate(batches(ALONE)):
        loss = naive(batch.images, batch.label_ids)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(
            sum(parameter.grad.square().sum().item() for parameter in naive.parameters() if parameter.grad is not None)
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, 2, 1e-3)
        optimizer.step()
        reported = [line for line in lines(tmp_path) if "loss" in line][step]
        assert math.isclose(reported["loss"], loss.item(), rel_tol=1e-6)
        assert math.isclose(reported["grad_norm"], norm, rel_tol=1e-5)
    assert close({"all": naive.state_dict()}, {"all": train_state.model.state_dict()}, 1e-6)
    assert found["trunk"].keys() == train_state.model.trunk.state_dict().keys()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_a_batch_in_parts_gives_the_same_steps(tmp_path: Path, parts: int) -> None:
    _, whole = train_in_this_process(tmp_path / "whole", settings(), ALONE)
    _, cut = train_in_this_process(tmp_path / "cut", settings(f"runtime.accumulation={parts}"), ALONE)
    for (_, loss, lr), (_, other, other_lr) in zip(losses(tmp_path / "whole"), losses(tmp_path / "cut"), strict=True):
        assert math.isclose(loss, other, rel_tol=1e-5) and lr == other_lr
    assert close(whole, cut, 2e-5)
    cut_batches = list(micro_batches(batches(ALONE)[0], parts))
    assert len(cut_batches) == parts and torch.equal(
        torch.cat([part.images for part in cut_batches]), batches(ALONE)[0].images
    )


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path: Path, number: float) -> None:
    train = settings("optimizer.ema_decay=0.9")
    # Steps 2 and 3 are spoilt: the run has to be the one that never saw them but moved on in its schedule.
    train_state, found = train_in_this_process(tmp_path, train, ALONE, spoil={2: number, 3: number})
    reported = [line for line in lines(tmp_path) if "loss" in line]
    assert [bool(line.get("skipped")) for line in reported] == [False, False, True, True, False, False]
    assert all((line["loss"] is None or math.isfinite(line["loss"])) for line in reported)
    assert lines(tmp_path)[-1]["skipped_steps"] == 2
    assert {value.item() for name, value in found["optimizer"].items() if name.startswith("step.")} == {4.0}
    naive = make_train_state(train, torch.linspace(0.5, 3.0, VOCABULARY), ALONE)
    for step, batch in enumerate(batches(ALONE)):
        if step in (2, 3):
            continue
        naive.optimizer.zero_grad()
        naive.model(batch.images, batch.label_ids).backward()
        for group in naive.optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, 2, 1e-3)
        naive.optimizer.step()
        naive.ema.update(step, torch.zeros(()))  # type: ignore[union-attr]
    assert close({"all": naive.model.state_dict()}, {"all": train_state.model.state_dict()}, 1e-6)
    assert close({"all": naive.ema.average}, {"all": train_state.ema.average}, 1e-6)  # type: ignore[union-attr]


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    train = settings("runtime.max_skipped_steps=3")
    train_in_this_process(tmp_path / "two", train, ALONE, spoil={1: math.nan, 2: math.nan, 4: math.nan, 5: math.nan})
    with pytest.raises(UserError, match=r"the last 3 steps, up to step 6, were skipped"):
        train_in_this_process(tmp_path / "three", train, ALONE, spoil=dict.fromkeys([1, 3, 4, 5], math.nan))


def test_clipping_shortens_the_gradient_to_the_norm(tmp_path: Path) -> None:
    train = settings("optimizer.clip_norm=0.05")
    train_state, _ = train_in_this_process(tmp_path, train, ALONE)
    naive = make_train_state(train, torch.linspace(0.5, 3.0, VOCABULARY), ALONE)
    for step, batch in enumerate(batches(ALONE)):
        naive.optimizer.zero_grad()
        naive.model(batch.images, batch.label_ids).backward()
        norm = torch.nn.utils.clip_grad_norm_(naive.model.parameters(), 0.05)
        assert norm > 0.05
        assert math.isclose(lines(tmp_path)[step]["grad_norm"], norm.item(), rel_tol=1e-3), (
            "the logged value is the norm before clipping"
        )
        for group in naive.optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, 2, 1e-3)
        naive.optimizer.step()
    assert close({"all": naive.model.state_dict()}, {"all": train_state.model.state_dict()}, 2e-5)
    _, free = train_in_this_process(tmp_path / "free", settings("optimizer.clip_norm=1e6"), ALONE)
    _, plain = train_in_this_process(tmp_path / "plain", settings(), ALONE)
    assert close(free, plain, 1e-7), "a gradient shorter than that is left alone"


def test_fp16_is_scaled_and_close_to_fp32(tmp_path: Path) -> None:
    train_state, found = train_in_this_process(tmp_path / "half", settings("runtime.precision=fp16"), ALONE)
    train_in_this_process(tmp_path / "full", settings(), ALONE)
    assert train_state.scale is not None and train_state.scale.state() == [2.0**16, float(STEPS)]
    for half, full in zip(lines(tmp_path / "half"), lines(tmp_path / "full"), strict=True):
        if "loss" in half:
            assert math.isclose(half["loss"], full["loss"], rel_tol=1e-2)
            assert math.isclose(half["grad_norm"], full["grad_norm"], rel_tol=0.1), (
                "the logged norm is without the scale"
            )
    assert all(tensor.dtype == torch.float32 for tensor in found["trunk"].values())
    # An overflow: the scale is halved, the step skipped.
    train_state, _ = train_in_this_process(
        tmp_path / "spoilt", settings("runtime.precision=fp16"), ALONE, spoil={1: math.inf}
    )
    assert train_state.scale is not None and train_state.scale.state() == [2.0**15, float(STEPS - 2)]


def test_the_loss_scale_grows_again_and_resumes_from_a_checkpoint() -> None:
    scale = LossScale(torch.device("cpu"))
    for _ in range(1999):
        scale.update(torch.tensor(0.0))
    other = LossScale(torch.device("cpu"))
    other.load(scale.state())
    for each in (scale, other):
        each.update(torch.tensor(0.0))
        assert each.state() == [2.0**17, 0.0]
        each.update(torch.tensor(1.0))
        assert each.state() == [2.0**16, 0.0]


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    _, found = train_in_this_process(tmp_path, settings("optimizer.ema_decay=0.5"), ALONE)
    naive = make_train_state(settings(), torch.linspace(0.5, 3.0, VOCABULARY), ALONE)
    average = {name: tensor.clone() for name, tensor in naive.model.state_dict().items()}
    for step, batch in enumerate(batches(ALONE)):
        naive.optimizer.zero_grad()
        naive.model(batch.images, batch.label_ids).backward()
        for group in naive.optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, 2, 1e-3)
        naive.optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        average = {
            name: decay * average[name] + (1 - decay) * tensor for name, tensor in naive.model.state_dict().items()
        }
    saved = {f"trunk.{name}": tensor for name, tensor in found["trunk_ema"].items()}
    saved |= {f"head.{name}": tensor for name, tensor in found["head_ema"].items()}
    assert close({"all": average}, {"all": saved}, 1e-6)


def test_mfu_is_logged_if_the_peak_is_known(tmp_path: Path) -> None:
    train_in_this_process(tmp_path, settings(), ALONE)
    throughput = lines(tmp_path)[-1]
    assert math.isclose(throughput["mfu"], throughput["samples_per_s"] / 1e3), (
        "one operation a sample on a device of 1,000 a second"
    )


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert rates[10] == 1.0
    assert math.isclose(rates[55], 0.5)
    assert 0 < rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_moments_are_there_for_parameters_that_never_get_a_gradient() -> None:
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "unused": torch.nn.Linear(3, 2)})
    optimizer = make_optimizer(model, settings().optimizer)
    model["used"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[model["used"].weight]["step"] == 1 and optimizer.state[model["unused"].weight]["step"] == 0
    assert len(optimizer.state) == 4
