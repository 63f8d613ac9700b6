"""A trunk and what a contrastive run trains beside it, as open_clip's pair of towers: the same embeddings, from its own folder."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer

from labels.errors import UserError
from labels.settings import Model
from train.evals.encoders.encoder import EncoderSpec, ImageForm, finish
from train.export.check import check
from train.export.formats import TimmTower
from train.export.open_clip_format import write_pair
from train.export.open_clip_towers import Towers, build_pair
from train.model import build_trunk, trunk_arguments

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
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
        ("vit_b16", 32, TINY), ("vit_tiny_patch16_224", 32, TINY), ("test_resnet", 64, {}), ("test_convnext", 64, {}),
        ("vit_tiny_patch16_224", 32, {**TINY, "act_layer": "gelu_tanh", "global_pool": "token"}),
    ],
)  # fmt: skip
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
    "arguments", [{"reg_tokens": 1}, {"act_layer": "quick_gelu"}, {"init_values": 1e-2}, {"qk_norm": True}, {"fc_norm": True}]
)
def test_trunks_that_open_clip_has_no_tower_for(arguments: dict[str, Any]) -> None:
    tower, towers = made("vit_tiny_patch16_224", 32, {**TINY, **arguments})
    with pytest.raises(UserError) as caught:
        build_pair(tower, towers, 32)
    assert "open_clip has no image tower like" in str(caught.value) and "--format timm, hf or onnx" in str(caught.value)
