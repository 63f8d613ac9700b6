"""ViTs with MAE's and DINOv2's architecture and random local weights through every protocol, by one command."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from timm import create_model
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from image_folders import colours
from run_factory import write_run
from train.cli import cli

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}


def build(arguments: dict[str, Any], **own: Any) -> VisionTransformer:
    """timm's class with what `create_model` hands on, and the configuration that timm's own entry points add."""
    given = {
        name: value for name, value in arguments.items() if name in inspect.signature(VisionTransformer).parameters
    }
    net = VisionTransformer(**SMALL, **own, **given)
    net.pretrained_cfg = {"input_size": (3, 28, 28), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classifier": "head"}  # type: ignore[assignment]
    return net


@register_model
def tiny_mae(pretrained: bool = False, **arguments) -> VisionTransformer:
    """vit_base_patch16_224.mae, but small: a class token, no layer scale."""
    return build(arguments)


@register_model
def tiny_dinov2(pretrained: bool = False, **arguments) -> VisionTransformer:
    """vit_small_patch14_reg4_dinov2, but small: layer scale, registers, no position for the class token."""
    return build(arguments, init_values=1e-5, reg_tokens=4, no_embed_class=True)


def test_the_small_ones_are_built_as_timms_own() -> None:
    for small, own in ((tiny_mae(), "vit_base_patch16_224.mae"), (tiny_dinov2(), "vit_small_patch14_reg4_dinov2")):
        with torch.device("meta"):
            large = create_model(own)
        names = {name for name in large.state_dict() if not name.startswith("blocks.") or name.split(".")[1] in "01"}
        assert names == {name for name in small.state_dict() if not name.startswith("head.")}


@pytest.fixture(scope="module")
def suite_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vits")
    colours(folder / "data", ("blue", "red"))
    write_run(folder / "run", 3)
    encoders = []
    for name in ("tiny_mae", "tiny_dinov2"):
        torch.manual_seed(1)
        weights = folder / f"{name}.safetensors"
        save_file(create_model(name, num_classes=0).state_dict(), weights)
        encoders += [
            {"encoder": f"timm:{name}", "weights": str(weights)},
            {"encoder": f"timm:{name}", "weights": str(weights), "layer": -1, "pool": "avg"},
        ]
    content = {
        "encoders": [*encoders, "pixels:2"],
        "data": [f"folders:{folder}/data"],
        "protocols": [
            {"protocol": "probe", "set": {"seeds": [0]}},
            {"protocol": "probe", "set": {"recipe": "mae", "seeds": [0], "mae": {"epochs": 2, "warmup_epochs": 1}}},
            {"protocol": "fewshot", "set": {"shots": [2]}},
            {"protocol": "knn", "set": {"k": [3]}},
            {"protocol": "finetune", "set": {"epochs": 4, "warmup_epochs": 1, "batch_size": 4, "base_lr": 0.05}},
            "zeroshot",
        ],
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_one_command_measures_them_by_everything_that_fits(suite_folder: Path) -> None:
    command = [
        "eval",
        "--suite",
        str(suite_folder / "suite.yaml"),
        "--out",
        str(suite_folder / "out"),
        "--set",
        "features.threads=2",
    ]
    said = CliRunner().invoke(cli, command, catch_exceptions=False, env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    found = json.loads((suite_folder / "out" / "suite.json").read_text())
    rows = {(row["encoder"], row["variant"]): row for row in found["results"]}
    variants = ["probe", "probe, MAE's recipe", "2-shot", "3-nn", "3-nn majority", "fine-tuned"]
    for name in ("tiny_mae", "tiny_dinov2"):
        for encoder in (f"timm:{name}", f"timm:{name}, layer -1, avg"):
            for variant in variants:
                row = rows[encoder, variant]
                assert 0 <= row["top1"] <= 1 and row["description"]["architecture"] == name, (encoder, variant)
            assert rows[encoder, "fine-tuned"]["seeds"][0]["drop_path"] == 0.2
            assert (
                f"skipped: zeroshot of {encoder}: it has no text tower and no pre-training head; give a run (run:RUN)"
                in said.output
            )
    assert (
        "pixels:2",
        "fine-tuned",
    ) not in rows and "skipped: finetune of pixels:2: it has no weights to train" in said.output
    assert len(rows) == 1 + 4 * len(variants) + len(variants) - 1
    before = {file: file.read_bytes() for file in (suite_folder / "out" / "results").iterdir()}
    again = CliRunner().invoke(cli, command, catch_exceptions=False, env={"COLUMNS": "200"})
    assert again.exit_code == 0 and before == {
        file: file.read_bytes() for file in (suite_folder / "out" / "results").iterdir()
    }
