"""`train run --init`: trunks and heads of runs, timm and open_clip as the first weights of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed

from beton_factory import build_out
from labels.config import load_pipeline
from labels.storage import UserError
from train.checkpoint import checkpoint_folders, read_weights
from train.cli import cli
from train.encoders.encoder import EncoderSpec
from train.encoders.initial import initialised
from train.trainer import train_run
from trainer_factory import assert_same_run, losses, small_config, small_out

VIT: dict[str, Any] = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
# Nothing is learnt: the checkpoint has the first weights
STILL = ["train.samples=16", "train.optimizer={lr: 1e-30, weight_decay: 0.0, warmup_samples: 0, ema_decay: 0.5}"]
SHORT = ["train.samples=192", "train.optimizer.ema_decay=0.5"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_out(tmp_path_factory.mktemp("initial"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def source(out: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("source") / "run"
    assert train_run(out, run, load_pipeline(config, SHORT))
    return run


def begin(
    out: Path, run: Path, config: Path, spec: str, *keys: str, weights: Path | None = None, head: bool = False
) -> bool:
    requested = EncoderSpec(spec, weights and str(weights))
    return train_run(out, run, load_pipeline(config, keys), method=initialised(requested, run, head=head))


def first_weights(run: Path, part: str = "trunk") -> dict[str, torch.Tensor]:
    return read_weights(checkpoint_folders(run)[0] / f"{part}.safetensors")


def refusal(*arguments: Any, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        begin(*arguments, **options)
    return caught.value


@pytest.mark.parametrize("averaged", [False, True])
def test_a_runs_trunk_and_head_are_taken(out: Path, config: Path, source: Path, tmp_path: Path, averaged: bool) -> None:
    spec, suffix = (f"ema:{source}", "_ema") if averaged else (str(source), "")
    for head in (False, True):
        run = tmp_path / f"{head}"
        assert begin(out, run, config, spec, *STILL, head=head)
        for part in ("trunk", "head"):
            expected = read_weights(checkpoint_folders(source)[-1] / f"{part}{suffix}.safetensors")
            same = all(
                torch.allclose(first_weights(run, part)[name], tensor, atol=1e-12) for name, tensor in expected.items()
            )
            assert same == (head or part == "trunk")
            average = first_weights(run, f"{part}_ema")
            assert all(torch.allclose(average[name], first_weights(run, part)[name], atol=1e-12) for name in average)
        facts = json.loads((run / "data.json").read_bytes())["init"]
        assert facts["spec"] == (f"ema:{source}" if averaged else str(source)) and facts["head"] == head
        assert facts["checkpoint"] == "samples-000000000192" and len(facts["fingerprint"]) == 16


@pytest.mark.parametrize(("size", "patch", "grid"), [(32, 8, 4), (24, 8, 3), (16, 4, 4), (64, 16, 4), (16, 8, 2)])
def test_positions_are_resampled_by_timm(
    out: Path, config: Path, source: Path, tmp_path: Path, size: int, patch: int, grid: int
) -> None:
    arguments = f"train.model.trunk_args={{patch_size: {patch}, depth: 1, embed_dim: 24, num_heads: 2}}"
    begin(out, tmp_path / "run", config, f"run:{source}", *STILL, f"train.model.image_size={size}", arguments)
    before, after = read_weights(checkpoint_folders(source)[-1] / "trunk.safetensors"), first_weights(tmp_path / "run")
    expected = resample_abs_pos_embed(before["pos_embed"], [grid, grid], num_prefix_tokens=1)
    assert torch.allclose(after["pos_embed"], expected, atol=1e-6) and after["pos_embed"].shape[1] == grid**2 + 1
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    assert after["patch_embed.proj.weight"].shape == (24, 3, patch, patch)
    assert torch.equal(after["patch_embed.proj.weight"], before["patch_embed.proj.weight"]) or patch != 8


def test_a_timm_file_with_its_classifier_is_taken(out: Path, config: Path, tmp_path: Path) -> None:
    net = timm.create_model("test_vit", pretrained=False, num_classes=7)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    keys = [*STILL, "train.model={trunk: test_vit, image_size: 32, trunk_args: {global_pool: token}}"]
    headless = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("head.")}
    save_file(headless, tmp_path / "trunk.safetensors")
    for number, file in enumerate(("model.safetensors", "trunk.safetensors")):
        run = tmp_path / f"run{number}"
        assert begin(out, run, config, "timm:test_vit", *keys, weights=tmp_path / file)
        after = first_weights(run)
        for name, tensor in headless.items():
            assert name == "pos_embed" or torch.allclose(after[name], tensor, atol=1e-12), name
    assert (
        "no weight file at"
        in refusal(out, tmp_path / "x", config, "timm:test_vit", *keys, weights=tmp_path / "no").problem
    )
    misfit = refusal(out, tmp_path / "x", config, "timm:test_vit", *STILL, weights=tmp_path / "trunk.safetensors")
    assert "does not fit the architecture" in misfit.problem and not checkpoint_folders(tmp_path / "x")


def test_an_open_clip_file_is_taken(out: Path, config: Path, tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": 1, "width": 24, "head_width": 12, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-init.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-init.json")
    model: Any = open_clip.create_model("tiny-init").eval()
    file = tmp_path / "open_clip_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    trunk = f"trunk: vit_b16, image_size: 32, trunk_args: {json.dumps(VIT | {'global_pool': 'token'})}"
    assert begin(out, tmp_path / "run", config, "open_clip:tiny-init", *STILL, f"train.model={{{trunk}}}", weights=file)
    settings = load_pipeline(tmp_path / "run" / "config.yaml").train
    from train.model import build_trunk

    net = build_trunk(settings.model).eval()
    net.load_state_dict(first_weights(tmp_path / "run"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(net(images) @ model.visual.proj, model.encode_image(images), atol=1e-5)


def test_a_run_with_first_weights_resumes_without_them(out: Path, config: Path, source: Path, tmp_path: Path) -> None:
    again = tmp_path / "copy"
    shutil.copytree(source, again)
    keys = ["train.samples=480", "train.checkpoint.keep=100"]
    assert begin(out, tmp_path / "whole", config, f"run:{again}", *keys, head=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for folder in checkpoint_folders(tmp_path / "resumed")[2:]:
        shutil.rmtree(folder)
    with pytest.raises(UserError) as caught:
        train_run(out, tmp_path / "resumed", load_pipeline(config, keys))
    assert "init.fingerprint was" in caught.value.problem and "is now not set" in caught.value.problem
    assert f"with --init run:{again} --init-head" in str(caught.value.fix)
    other = refusal(out, tmp_path / "resumed", config, f"ema:{again}", *keys, head=True)
    assert "init.fingerprint was" in other.problem and "init.head" not in other.problem
    assert (
        "init.head was True, is now False" in refusal(out, tmp_path / "resumed", config, f"run:{again}", *keys).problem
    )
    shutil.rmtree(again)
    assert begin(out, tmp_path / "resumed", config, f"run:{again}", *keys, head=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert losses(tmp_path / "whole")[0][1] < losses(source)[0][1], "it begins where the other has ended"


def test_the_command(out: Path, config: Path, source: Path, tmp_path: Path) -> None:
    given = ["run", "--beton", str(out), "--out", str(tmp_path / "run"), "--config", str(config)]
    given += ["--set", "train.samples=32", "--set", "train.optimizer.warmup_samples=0"]
    cli.main([*given, "--init", str(source), "--init-head"], standalone_mode=False)
    assert json.loads((tmp_path / "run" / "data.json").read_bytes())["init"]["head"] is True
    for options, problem in (
        (["--init-head"], "--init-head was given without --init"),
        (["--init-weights", "x"], "--init-weights was given without --init"),
        (["--init", str(source), "--synthetic"], "--synthetic was given with --init"),
    ):
        with pytest.raises(UserError, match=problem):
            cli.main([*given, *options], standalone_mode=False)


def test_a_run_without_first_weights_does_not_take_them_later(
    out: Path, config: Path, source: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run)
    assert ", without --init," in str(refusal(out, run, config, f"run:{source}", *SHORT).fix)
    assert "--init" not in str(refusal_without_init(out, run, config).fix)


def refusal_without_init(out: Path, run: Path, config: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        train_run(out, run, load_pipeline(config, [*SHORT, "train.optimizer.lr=1e-2"]))
    return caught.value


def test_what_cannot_be_taken_is_refused(out: Path, config: Path, source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "no folder" in refusal(out, run, config, "run:nowhere", *STILL).problem
    assert "no folder" in refusal(out, run, config, "hf:nowhere", *STILL).problem
    assert "has no weights" in refusal(out, run, config, "timm:test_vit", *STILL).problem
    assert "has no head" in refusal(out, run, config, "timm:test_vit", *STILL, head=True).problem
    assert "--init-weights x was given" in refusal(out, run, config, f"run:{source}", *STILL, weights=Path("x")).problem
    wider = "train.model.trunk_args={patch_size: 8, depth: 1, embed_dim: 48, num_heads: 2}"
    assert "does not fit" in refusal(out, run, config, f"run:{source}", *STILL, wider).problem
    (tmp_path / "clip").mkdir()
    other = build_out(tmp_path / "clip", [30])
    problem = refusal(other, run, config, f"run:{source}", *STILL, head=True).problem
    assert "has 15 classes of" in problem and "49,408 of clip" in problem
    assert begin(other, run, config, f"run:{source}", *STILL), "the trunk alone fits any labels"
