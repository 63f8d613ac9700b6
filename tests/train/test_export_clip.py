"""A contrastive run as open_clip's pair of towers: the same embeddings after loading it from the exported folder."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file

from labels.config import load_pipeline
from labels.settings import Model
from labels.storage import UserError
from train.clip import train_clip
from train.data.open import Chosen
from train.encoders.encoder import EncoderSpec, ImageForm, finish
from train.encoders.load import load_encoder
from train.evals.lit import train_lit
from train.export.export import export_encoder
from train.export.format import TimmTower, check
from train.export.open_clip import Towers, build_pair, write_pair
from train.model import build_trunk, trunk_arguments
from trainer_factory import small_config, small_out

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
SHORT = [
    "train.samples=32",
    "text_tower={embed_dim: 8, width: 16, heads: 2, layers: 1, context: 8}",
    "train.optimizer.warmup_samples=0",
]
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def made(trunk: str, side: int, arguments: dict[str, Any]) -> tuple[TimmTower, Towers]:
    torch.manual_seed(0)
    model = Model(trunk=trunk, trunk_args=arguments, image_size=side)
    net: Any = build_trunk(model).eval()
    text = TextTransformer(**TEXT, output_dim=12)
    for parameter in (*net.parameters(), *text.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    towers = Towers(torch.randn(12, net.num_features), TEXT, text.state_dict(), torch.tensor(1.5))
    return TimmTower(net, *trunk_arguments(model)), towers


@pytest.mark.parametrize(
    ("trunk", "side", "arguments"),
    [
        ("vit_b16", 32, TINY),
        ("vit_tiny_patch16_224", 32, TINY),
        ("test_resnet", 64, {}),
        ("test_convnext", 64, {}),
        ("vit_tiny_patch16_224", 32, {**TINY, "act_layer": "gelu_tanh", "global_pool": "token"}),
    ],
)
def test_the_pair_is_loaded_back(trunk: str, side: int, arguments: dict[str, Any], tmp_path: Path) -> None:
    tower, towers = made(trunk, side, arguments)
    model, config = build_pair(tower, towers, side)
    net = torch.nn.Sequential(tower.net, torch.nn.Linear(*towers.projection.shape[::-1], bias=False))
    net[1].weight.data = towers.projection
    form = ImageForm(side, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    encoder = finish(EncoderSpec("run:made"), net, form, {"architecture": trunk})
    written = write_pair(model, config, encoder, tmp_path)
    assert check(encoder, written, tmp_path) < 1e-5
    read: Any = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    text = TextTransformer(**TEXT, output_dim=12).eval()
    text.load_state_dict(towers.text)
    tokens = torch.randint(1, 64, (3, 8))
    assert torch.allclose(read.encode_text(tokens), text(tokens), atol=1e-6) and read.logit_scale == 1.5
    assert read.visual.image_mean == (0.5, 0.5, 0.5) or list(read.visual.image_mean) == [0.5] * 3


@pytest.mark.parametrize(
    "arguments",
    [{"reg_tokens": 1}, {"act_layer": "quick_gelu"}, {"init_values": 1e-2}, {"qk_norm": True}, {"fc_norm": True}],
)
def test_trunks_that_open_clip_has_no_tower_for(arguments: dict[str, Any]) -> None:
    tower, towers = made("vit_tiny_patch16_224", 32, {**TINY, **arguments})
    with pytest.raises(UserError) as caught:
        build_pair(tower, towers, 32)
    assert "open_clip has no image tower like" in str(caught.value) and "--format timm, hf or onnx" in str(caught.value)


@pytest.mark.parametrize("method", ["clip", "lit", "lit of timm"])
def test_runs_of_clip_and_lit(method: str, tmp_path: Path) -> None:
    chosen, run = Chosen([str(small_out(tmp_path))]), tmp_path / "run"
    pipeline = load_pipeline(small_config(tmp_path), SHORT)
    assert train_clip(chosen, tmp_path / "clip", pipeline)
    spec = EncoderSpec(f"run:{tmp_path / 'clip'}")
    if method == "lit of timm":
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
        spec = EncoderSpec("timm:test_vit", str(tmp_path / "vit.safetensors"))
    if method != "clip":
        assert train_lit(spec, chosen, run, pipeline)
        spec = EncoderSpec(f"run:{run}")
    encoder = load_encoder(spec)
    assert encoder.text is not None
    side = encoder.text()
    for name in ("open_clip", "timm", "hf"):
        exported = export_encoder(spec, name, tmp_path / name)
        assert exported["difference"] <= 1e-5
    read: Any = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    images, texts = (
        torch.randn(3, 3, encoder.images.side, encoder.images.side),
        side.tokens(["red cat", "blue dog", "sun"], None),
    )
    with torch.inference_mode():
        cosines = read(images, texts)
        own = (
            torch.nn.functional.normalize(side.projection(encoder(images)), dim=1)
            @ side.texts(["red cat", "blue dog", "sun"], images.device).T
        )
    assert torch.allclose(cosines[0] @ cosines[1].T, own, atol=1e-5)
    text = (tmp_path / "open_clip" / "README.md").read_text("utf8")
    assert "Texts are not tokenized by open_clip's own tokenizer, but by the run's" in text
    assert "text_tower:" in text and str(tmp_path) not in text
    assert (
        f"| features | 8, layer {encoder.describe()['layer']}, pool {encoder.describe()['pool']}, projected |" in text
    )
    assert f"By `train {'clip' if method == 'clip' else 'lit'}`: 32 of 32 samples seen." in text
    frozen = {
        "clip": None,
        "lit": "The image tower was frozen: `run:clip` as it was",
        "lit of timm": "frozen: `timm:test_vit` as it was",
    }
    assert frozen[method] in text if frozen[method] else "was frozen" not in text
    assert ("trunk:" in text) == (
        method != "lit of timm"
    )  # RUN/config.yaml describes a trunk that another encoder has not
    assert (
        json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_bytes())["model_cfg"]["text_cfg"][
            "vocab_size"
        ]
        == 17
    )


def test_results_with_another_text_tower_are_not_on_the_card(tmp_path: Path) -> None:
    chosen, pipeline = Chosen([str(small_out(tmp_path))]), load_pipeline(small_config(tmp_path), SHORT)
    assert train_clip(chosen, tmp_path / "clip", pipeline)
    spec = EncoderSpec(f"run:{tmp_path / 'clip'}")
    about = load_encoder(spec).describe()
    rows = [
        {
            "encoder": spec.spec,
            "variant": name,
            "metrics": ["top1"],
            "top1": 0.5,
            "description": {**about, "text_tower": tower},
        }
        for name, tower in (("mine", about["text_tower"]), ("of another tower", "0"))
    ]
    (tmp_path / "clip" / "zeroshot.json").write_text(
        json.dumps({"protocol": "zero-shot", "data": "pets", "results": rows})
    )
    export_encoder(spec, "open_clip", tmp_path / "exported")
    text = (tmp_path / "exported" / "README.md").read_text("utf8")
    assert "| pets | mine: zero-shot | top1 | 50.0 | - |" in text and "of another tower" not in text
