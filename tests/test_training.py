"""The trainer as a user runs it: schedule, checkpoints, resume after kills, ranks, and mistakes it refuses."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from beton_factory import build_out
from safetensors.torch import load_file, save_file

from labels.config import load_pipeline
from labels.errors import UserError
from labels.settings import Loss, Model, Optimizer
from train.checkpoint import checkpoint_folders
from train.losses.head_loss import HeadLoss
from train.model import Classifier, build_trunk
from train.optim import learning_rate, make_optimizer
from train.run import STOPPED_EXIT_CODE, train_run

CONFIG = """
train:
  samples: 480
  batch_size: 16
  model: {trunk: vit_tiny_patch16_224, trunk_args: {patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}, image_size: 16}
  data: {threads: 2, flip: true, crop_scale: [0.5, 1.0]}
  optimizer: {lr: 2e-3, warmup_samples: 48, weight_decay: 0.1}
  runtime: {device: cpu, precision: fp32, threads: 1}
  checkpoint: {every_samples: 64, keep: 2}
  log: {every_seconds: 0.05, tensorboard: false}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_out(tmp_path_factory.mktemp("training"), [40, 23, 37])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def reference(out: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("reference") / "run"
    result = subprocess.run([*command(out, run, config)], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return run


def command(out: Path, run: Path, config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "train", "run", "--beton", str(out), "--out", str(run), "--config", str(config), *more]


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint_folders(run)[-1]
    return {f"{path.stem}.{name}": tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_run_learns_and_writes_what_it_promises(reference: Path) -> None:
    found = losses(reference)
    assert [step for step, _, _ in found] == list(range(1, 31))
    assert found[-1][1] < found[0][1] - 1.0
    folders = checkpoint_folders(reference)
    assert [folder.name for folder in folders] == ["samples-000000000448", "samples-000000000480"]
    assert sorted(path.name for path in folders[-1].iterdir()) == [
        "head.safetensors", "optimizer.safetensors", "state.json", "trunk.safetensors",
    ]  # fmt: skip
    resolved = load_pipeline(reference / "config.yaml")
    assert (resolved.train.batch_size, resolved.train.optimizer.lr) == (16, 2e-3)
    throughput = [json.loads(text) for text in (reference / "metrics.jsonl").read_text().splitlines() if "samples_per_s" in text]
    assert throughput[-1]["samples"] == 480
    assert 0 <= throughput[-1]["data_wait"] <= 1


def test_trunk_keys_are_timms_own(reference: Path) -> None:
    saved = load_file(checkpoint_folders(reference)[-1] / "trunk.safetensors")
    model = load_pipeline(reference / "config.yaml").train.model
    build_trunk(model).load_state_dict(saved)
    assert "blocks.0.attn.qkv.weight" in saved


def test_killed_at_ten_random_moments_the_losses_are_the_same_floats(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    run, dice, kills = tmp_path / "run", random.Random(0), 0
    while True:
        process = subprocess.Popen(command(out, run, config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if kills < 10:
            # From the moment training begins, so that the kills fall into steps, log lines and checkpoints.
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step"):
                    break
            time.sleep(dice.uniform(0, 0.4))
            process.kill()
            kills += 1
            process.communicate()
            continue
        output, _ = process.communicate()
        assert process.returncode == 0, output
        break
    assert_same_run(reference, run)
    assert list((run / "checkpoints").glob("*.partial")) == []


def test_sigterm_saves_and_leaves_with_its_own_code(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(out, run, config, "--set", "train.checkpoint.every_samples=10M"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == STOPPED_EXIT_CODE, output
    assert "stopped and saved" in output
    stopped_at = int(checkpoint_folders(run)[-1].name.removeprefix("samples-"))
    assert 0 < stopped_at < 480
    again = subprocess.run(command(out, run, config), capture_output=True, text=True, check=False, timeout=300)
    assert f"resumed at step {stopped_at // 16}" in again.stdout
    assert_same_run(reference, run)


def test_a_finished_run_says_so(out: Path, config: Path, reference: Path) -> None:
    result = subprocess.run(command(out, reference, config), capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0
    assert "is finished: 480 samples seen" in result.stdout


def test_two_ranks_under_torchrun_equal_one(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
    ]
    result = subprocess.run(
        [*launcher, *command(out, run, config)[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout
    for (step, loss, lr), (other_step, other_loss, other_lr) in zip(losses(reference), losses(run), strict=True):
        assert (step, lr) == (other_step, other_lr)
        assert math.isclose(loss, other_loss, rel_tol=1e-4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused(out: Path, run: Path, config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        train_run(out, run, load_pipeline(config, overrides))
    return str(caught.value)


def test_another_configuration_or_other_labels_are_not_mixed_into_a_run(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    text = refused(out, reference, config, "train.optimizer.lr=5e-3")
    assert "was begun with another configuration: was `lr: 0.002`, is now `lr: 0.005`" in text
    assert "config.yaml, or another --out" in text
    other = build_out(tmp_path, [30])
    assert "was trained with other labels: fingerprint" in refused(other, reference, config)


def test_damaged_or_foreign_checkpoints_are_named_and_run_no_code(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(reference, run)
    newest = checkpoint_folders(run)[-1]
    shutil.rmtree(newest)  # so that there is something left to train
    folder = checkpoint_folders(run)[-1]
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    (folder / "head.safetensors").write_bytes(whole["head.safetensors"][:1000])
    assert "head.safetensors cannot be read as weights" in refused(out, run, config)
    (folder / "head.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")  # a pickle's beginning
    assert "head.safetensors cannot be read as weights" in refused(out, run, config)
    (folder / "head.safetensors").write_bytes(whole["head.safetensors"])

    trunk = load_file(folder / "trunk.safetensors")
    trunk["pos_embed"] = torch.zeros(1, 2, 24)
    save_file(trunk, folder / "trunk.safetensors")
    assert "other shape (1): pos_embed is [1, 2, 24], wanted [1, 5, 24]" in refused(out, run, config)
    (folder / "trunk.safetensors").write_bytes(whole["trunk.safetensors"])

    (folder / "state.json").write_text("{")
    assert "state.json is not readable" in refused(out, run, config)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(out: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = refused(out, run, config, "train.optimizer.lr=1e30", "train.optimizer.warmup_samples=0", "train.log.every_seconds=100")
    assert "the loss of step 2 is nan" in text
    assert "lower train.optimizer.lr" in text
    assert checkpoint_folders(run) == []


def test_a_batch_that_ranks_cannot_share_is_refused(out: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.run
    from train.distributed import World

    class Pretended:
        def __enter__(self) -> World:
            return World(0, 3, torch.device("cpu"))

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(train.run, "world", lambda _: Pretended())
    assert "train.batch_size is 16, the number of ranks 3" in refused(out, tmp_path / "run", config)


def test_cuda_that_is_not_there_and_unknown_trunks(out: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in refused(out, tmp_path / "a", config, "train.runtime.device=cuda")
    assert "timm has no model named 'vit_huuge'" in refused(out, tmp_path / "b", config, "train.model.trunk=vit_huuge")
    assert "timm cannot build" in refused(out, tmp_path / "c", config, "train.model.trunk_args={depht: 3}")


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert rates[10] == 1.0
    assert math.isclose(rates[55], 0.5)
    assert 0 < rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_pool_is_the_mean_of_patch_tokens_and_vectors_are_not_decayed() -> None:
    trunk = build_trunk(Model(trunk="vit_base_patch16_clip_224", trunk_args={"depth": 1, "embed_dim": 24, "num_heads": 2}, image_size=32))
    model = Classifier(trunk, HeadLoss(Loss(), torch.ones(50)))
    images = torch.randn(2, 3, 32, 32)
    tokens = trunk.forward_features(images)  # type: ignore[operator]  # [B, 1 + patches, W], after the final norm
    assert torch.allclose(trunk(images), tokens[:, 1:].mean(dim=1), atol=1e-6)
    assert model.head(trunk(images)).shape == (2, 50)
    assert model(images, torch.tensor([[1, 2], [3, -1]])).shape == ()
    decayed, exempt = make_optimizer(model, Optimizer()).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter] for parameter in exempt["params"]} >= {"trunk.cls_token", "trunk.norm.weight", "head.0.bias", "head.1.bias"}
    assert {names[parameter] for parameter in decayed["params"]} >= {"trunk.pos_embed", "head.1.weight", "trunk.patch_embed.proj.weight"}
    assert exempt["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.2


def test_beton_without_a_path_takes_the_one_in_the_configuration(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    text = config.read_text() + f"paths: {{out: {out}, run: {reference}}}\n"
    (tmp_path / "pipeline.yaml").write_text(text)
    result = subprocess.run(
        [sys.executable, "-m", "train", "run", "--beton"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "is finished" in result.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "train", "run", "--beton", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"error: {tmp_path} has no manifest.json")
    assert "Traceback" not in wrong.stderr
