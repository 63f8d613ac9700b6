"""The memory of a step: the count on fake tensors against a real step, what fits, and the error of a full device."""

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from labels.config import load_pipeline
from labels.settings import TextTower, Train
from labels.storage import UserError
from train import trainer
from train.cli import cli
from train.costs.flops import Costs, model_costs
from train.costs.memory import (
    LiveBytes,
    Memory,
    Planned,
    activation_bytes,
    as_options,
    fitting,
    most_samples,
    out_of_memory,
    step_memory,
    usable,
    verdict,
)
from train.distributed import World
from train.losses.contrastive import contrastive_loss
from train.trainer import make_train_state

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLASSES = 500
VIT = ["model.trunk=vit_s16", "model.trunk_args={depth: 3, embed_dim: 64, num_heads: 1}", "model.image_size=64"]
CONVOLUTIONS = ["model.trunk=resnet18", "model.image_size=64"]
NEXT = ["model.trunk=convnext_atto", "model.image_size=64"]


def settings_of(*keys: str) -> Train:
    return load_pipeline(overrides=[f"train.{key}" for key in ("runtime.precision=fp32", *keys)]).train


def planned_for(settings: Train, ranks: int = 1, device: torch.device = CPU) -> Planned:
    return Planned(model_costs(settings.model, CLASSES), ranks, device)


def changed(settings: Train, overrides: list[str]) -> Train:
    keys = [
        f"train.model.trunk={settings.model.trunk}",
        f"train.model.trunk_args={settings.model.trunk_args}",
        f"train.model.image_size={settings.model.image_size}",
        f"train.batch_size={settings.batch_size}",
        f"train.loss.name={settings.loss.name}",
        f"train.runtime.precision={settings.runtime.precision}",
    ]
    return load_pipeline(overrides=[*keys, *overrides]).train


@pytest.mark.parametrize("trunk", [VIT, CONVOLUTIONS, NEXT], ids=["vit", "resnet", "convnext"])
@pytest.mark.parametrize("more", [[], ["model.grad_checkpointing=true"], ["runtime.precision=bf16"]])
def test_the_estimate_is_what_a_real_step_takes(trunk: list[str], more: list[str]) -> None:
    settings = settings_of(*trunk, "batch_size=64", "runtime.accumulation=2", *more)
    expected = step_memory(settings, planned_for(settings))
    assert expected.samples == 32
    state = make_train_state(settings, torch.ones(CLASSES), World(0, 1, CPU))
    size = settings.model.image_size
    dtype = torch.bfloat16 if settings.runtime.precision == "bf16" else None

    def step() -> None:
        images, label_ids = torch.zeros(32, 3, size, size), torch.arange(64).view(32, 2)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = state.model(images, label_ids)
        loss.backward()

    step()  # the gradients of the first part
    with LiveBytes([state.model]) as live:
        step()
        state.optimizer.step()
    parameters = sum(weight.numel() for weight in state.model.parameters())
    moments = [tensor for moment in state.optimizer.state.values() for tensor in moment.values() if tensor.dim()]
    assert expected.states == 4 * (2 * parameters + sum(map(torch.numel, moments)))
    gpu_only = (32 << 20) if dtype else 0  # a block of logits in float32
    counted = expected.activations + expected.loss - gpu_only
    assert 0.98 * live.peak <= counted <= 1.15 * live.peak, (counted, live.peak)


def test_activations_grow_with_depth_and_samples_and_shrink_with_checkpointing_and_bf16() -> None:
    def held(depth: int, *keys: str, samples: int = 256, device: torch.device = CPU) -> int:
        small = f"model.trunk_args={{depth: {depth}, embed_dim: 64, num_heads: 1}}"
        return activation_bytes(
            settings_of("model.trunk=vit_b16", small, "model.image_size=32", *keys), device, samples
        )

    two, four, eight = held(2), held(4), held(8)
    assert eight - four == pytest.approx(2 * (four - two), rel=0.01)
    # A block keeps at least its input, both norms' outputs, query, key, value, attention's output and the MLP's two
    # widths of four.
    assert (four - two) / 2 >= 256 * 4 * 5 * 64 * (1 + 2 + 3 + 1 + 8)
    assert held(4, samples=512) == pytest.approx(2 * four, rel=0.05)
    assert held(8, "model.grad_checkpointing=true") < eight / 2
    assert held(4, "runtime.precision=bf16") < 0.8 * four
    assert held(4, "model.compile=true") == four


def test_a_gpu_normalizes_in_float32_under_autocast() -> None:
    keys = settings_of(*NEXT, "runtime.precision=bf16")
    assert activation_bytes(keys, GPU, 16) > 1.05 * activation_bytes(keys, CPU, 16)
    exact = settings_of(*NEXT)
    assert activation_bytes(exact, GPU, 16) == activation_bytes(exact, CPU, 16)


def test_ranks_share_what_fsdp_shards_and_the_split_head() -> None:
    def memory(ranks: int, *keys: str) -> Memory:
        settings = settings_of(*VIT, "batch_size=64", *keys)
        return step_memory(settings, planned_for(settings, ranks))

    alone, ddp, fsdp = memory(1), memory(4), memory(4, "runtime.parallel=fsdp")
    assert ddp.states == alone.states and ddp.samples == 16
    assert fsdp.states == pytest.approx(alone.states / 4, rel=0.01)
    assert fsdp.activations > ddp.activations, "gathered weights"
    assert memory(1, "optimizer.ema_decay=0.999").states == alone.states * 20 // 16
    costs = model_costs(settings_of(*VIT).model, CLASSES)
    split = memory(4, "loss.split_vocabulary=true")
    assert split.states == 16 * (costs.trunk + costs.head // 4) and split.total < ddp.total


def test_two_towers() -> None:
    pytest.importorskip("open_clip")
    settings, tower = settings_of(*VIT, "batch_size=32"), TextTower()
    images = activation_bytes(settings, CPU, 32)
    both = activation_bytes(settings, CPU, 32, tower)
    locked = activation_bytes(settings, CPU, 32, tower, frozen=True)
    assert locked < both < locked + images + 1 and both > images
    costs = Costs(trunk=1000, head=2000, flops=1, head_name="text tower", frozen=True)
    memory = step_memory(settings, Planned(costs, 1, CPU, tower, True), samples=512)
    assert memory.states == 4 * 1000 + 16 * 2000
    images, texts = (torch.randn(512, 8, requires_grad=True) for _ in range(2))
    with LiveBytes([]) as live:
        contrastive_loss(images, texts, torch.ones(512, dtype=torch.bool), torch.tensor(1.0), None).backward()
    assert memory.loss == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("trunk", [VIT, CONVOLUTIONS], ids=["vit", "resnet"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_suggestion_fits_and_fewer_parts_do_not(trunk: list[str], ranks: int) -> None:
    settings = settings_of(*trunk, "batch_size=4096")
    planned = planned_for(settings, ranks)
    limit = step_memory(settings, planned).total / 3
    found = fitting(settings, planned, limit)
    assert found is not None
    overrides, memory = found
    better = changed(settings, overrides)
    assert step_memory(better, planned) == memory and memory.total <= limit
    parts = better.runtime.accumulation
    assert overrides == [f"train.runtime.accumulation={parts}"] and parts > 1
    assert step_memory(settings, planned, memory.samples * 2).total > limit


def test_the_number_of_samples_that_fit() -> None:
    settings = settings_of(*VIT, "batch_size=256")
    planned = planned_for(settings)
    limit = 3 * step_memory(settings, planned).total
    most = most_samples(settings, planned, limit)
    assert most > 512 and step_memory(settings, planned, most).total == pytest.approx(limit, rel=0.01)


def test_where_parts_are_refused_the_batch_shrinks() -> None:
    settings = settings_of(*VIT, "batch_size=1024", "loss.name=two_way")
    planned = planned_for(settings)
    least = step_memory(changed(settings, ["train.model.grad_checkpointing=true"]), planned).total
    found = fitting(settings, planned, least)
    assert found is not None and found[0] == ["train.model.grad_checkpointing=true"]
    found = fitting(settings, planned, 0.8 * least)
    assert found is not None
    name, size = found[0][-1].split("=")
    assert name == "train.batch_size" and int(size) < 1024 and found[1].total <= 0.8 * least


def test_a_device_that_is_too_small_for_the_weights() -> None:
    settings = settings_of(*VIT, "batch_size=64")
    assert fitting(settings, planned_for(settings), 1 << 20) is None
    text = verdict(settings, planned_for(settings, 2), 1 << 20)
    assert text.startswith("no: ") and text.endswith("with gradient checkpointing and FSDP")


def test_the_verdict_in_words() -> None:
    settings = settings_of(*VIT, "batch_size=4096")
    planned, gib = planned_for(settings), 2**30
    total = step_memory(settings, planned).total
    roomy, tight = 4 * total, total // 2
    assert verdict(settings, planned, roomy).startswith(
        f"yes: {total / gib:.1f} of {roomy / gib:.1f} GiB, {usable(roomy) / gib:.1f} of which are for the step; at most"
    )
    text = verdict(settings, planned, tight)
    found = fitting(settings, planned, usable(tight))
    assert found is not None and text.startswith("no: ") and text.endswith(as_options(found[0]))
    assert as_options(["a=1", "b=2"]) == "--set a=1 --set b=2"


def test_out_of_memory_is_an_error_with_a_smaller_step() -> None:
    settings = settings_of(*VIT, "batch_size=64")
    error = out_of_memory(settings, model_costs(settings.model, CLASSES), 1, CPU)
    assert error.problem.startswith("cpu is out of memory with 64 samples at a time, peak ")
    assert error.problem.endswith("(train.batch_size 64, 1 ranks, train.runtime.accumulation 1)")
    assert error.fix is not None and error.fix.startswith("--set train.")
    for costs in (None, dataclasses.replace(model_costs(settings.model, CLASSES), width=None)):
        fix = out_of_memory(settings, costs, 1, CPU).fix
        assert fix == "--set train.model.grad_checkpointing=true, or a smaller batch"


def test_a_run_that_is_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer, "run_loop", full)
    keys = [*VIT, "batch_size=64", "samples=640", "optimizer.warmup_samples=0", "runtime.device=cpu"]
    sets = [word for key in (*keys, "log.tensorboard=false") for word in ("--set", f"train.{key}")]
    with pytest.raises(UserError, match="cpu is out of memory with 64 samples at a time") as caught:
        CliRunner().invoke(cli, ["run", "--synthetic", "--out", str(tmp_path), *sets], catch_exceptions=False)
    assert caught.value.fix is not None and caught.value.fix.startswith("--set train.")
