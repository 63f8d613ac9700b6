"""Trunks: the paper's presets in every detail, any timm model, checkpointing and compilation that change nothing."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from labels.settings import Loss, Model, Optimizer
from labels.storage import UserError
from train.costs.flops import model_costs, trunk_costs
from train.losses.head import HeadLoss
from train.model import Classifier, build_trunk, feature_width, set_up_trunk
from train.optim import by_decay, make_optimizer

SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2}
# Width, layers, heads and patch side (SuperClass, section 4), and parameters in millions, counted from these by hand:
# layers x (12 W^2 + 13 W) + patches, tokens and norms.
VITS = {
    "vit_s16": (384, 12, 6, 16),
    "vit_b16": (768, 12, 12, 16),
    "vit_l16": (1024, 24, 16, 16),
    "vit_l14": (1024, 24, 16, 14),
}


@pytest.mark.parametrize("name", VITS)
def test_a_vit_preset_is_the_papers(name: str) -> None:
    width, layers, heads, patch = VITS[name]
    with torch.device("meta"):
        vit = build_trunk(Model(trunk=name))
    assert isinstance(vit, VisionTransformer)
    block = vit.blocks[0]
    assert (vit.embed_dim, len(vit.blocks), block.attn.num_heads, width // heads) == (width, layers, heads, 64)
    assert vit.patch_embed.proj.bias is None and vit.patch_embed.proj.kernel_size == (patch, patch)
    assert (
        isinstance(vit.norm_pre, nn.LayerNorm)
        and isinstance(vit.norm, nn.LayerNorm)
        and isinstance(vit.fc_norm, nn.Identity)
    )
    assert {norm.eps for norm in (vit.norm_pre, vit.norm, block.norm1, block.norm2)} == {1e-5}
    assert isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"
    assert block.mlp.fc1.out_features == 4 * width
    tokens = (224 // patch) ** 2 + 1
    by_hand = layers * (12 * width**2 + 13 * width) + 3 * patch**2 * width + tokens * width + width + 4 * width
    costs = model_costs(Model(trunk=name), 49_408)
    assert costs.trunk == by_hand
    assert costs.head == 49_408 * (width + 1) + 2 * width
    products = (
        layers * (12 * width**2 * tokens + 2 * tokens**2 * width) + 3 * patch**2 * width * (tokens - 1) + width * 49_408
    )
    assert math.isclose(costs.flops, 6 * products, rel_tol=1e-3), "two operations each, once forward and twice backward"


@pytest.mark.parametrize(("name", "millions", "gigaflops"), [("rn50", 23.5, 4.1), ("convnext_t", 27.8, 4.5)])
def test_convolutional_presets_pool_by_the_mean(name: str, millions: float, gigaflops: float) -> None:
    costs = model_costs(Model(trunk=name), 1)
    assert math.isclose(costs.trunk / 1e6, millions, abs_tol=0.1)
    assert math.isclose(costs.flops / 6e9, gigaflops, abs_tol=0.1), "published multiplications of one image"
    trunk = build_trunk(Model(trunk=name)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        mean = trunk.forward_features(images).mean(dim=(2, 3))  # type: ignore[operator]
        pooled = trunk(images)
        expected = mean if name == "rn50" else trunk.head.norm(mean[:, :, None, None])[:, :, 0, 0]  # type: ignore[union-attr, operator]
    assert torch.allclose(pooled, expected, atol=1e-5)


def test_first_weights_are_the_references() -> None:
    torch.manual_seed(0)
    vit = build_trunk(Model(trunk="vit_s16", trunk_args={"depth": 2}))
    named = dict(vit.named_parameters())
    bound = {
        "blocks.1.attn.qkv.weight": math.sqrt(6 / (4 * 384)),
        "blocks.0.mlp.fc1.weight": 384**-0.5,
        "blocks.1.mlp.fc2.weight": 1536**-0.5,
    }
    bound |= {"patch_embed.proj.weight": (3 * 256) ** -0.5, "blocks.0.attn.proj.weight": 384**-0.5}
    for name, edge in bound.items():  # uniform between -edge and edge
        assert named[name].abs().max() <= edge and math.isclose(
            named[name].std().item(), edge / math.sqrt(3), rel_tol=0.02
        ), name
    for name in ("cls_token", "pos_embed"):
        assert math.isclose(named[name].std().item(), 384**-0.5, rel_tol=0.1), name
    assert not named["blocks.0.attn.qkv.bias"].any() and not named["blocks.0.attn.proj.bias"].any()
    assert named["blocks.0.mlp.fc1.bias"].abs().max() > 0.01, "torch's own draw"
    head = Classifier(vit, HeadLoss(Loss(), torch.ones(2000))).head[1]
    assert math.isclose(head.weight.std().item(), 384**-0.5, rel_tol=0.02) and not head.bias.any()  # type: ignore[union-attr]


def test_pool_is_the_mean_of_patch_tokens_and_vectors_are_not_decayed() -> None:
    trunk = build_trunk(Model(trunk="vit_b16", trunk_args=SMALL, image_size=32))
    model = Classifier(trunk, HeadLoss(Loss(), torch.ones(50)))
    images = torch.randn(2, 3, 32, 32)
    tokens = trunk.forward_features(images)  # type: ignore[operator]  # [B, 1 + patches, W], after the final norm
    assert torch.allclose(trunk(images), tokens[:, 1:].mean(dim=1), atol=1e-6)
    assert model.head(trunk(images)).shape == (2, 50)
    assert model(images, torch.tensor([[1, 2], [3, -1]])).shape == ()
    decayed, exempt = by_decay(model)
    assert exempt.keys() >= {
        "trunk.cls_token",
        "trunk.norm.weight",
        "head.0.bias",
        "head.1.bias",
        "trunk.blocks.0.attn.qkv.bias",
    }
    assert decayed.keys() >= {"trunk.pos_embed", "head.1.weight", "trunk.patch_embed.proj.weight"}
    assert not exempt.keys() & decayed.keys() and len(exempt) + len(decayed) == len(list(model.parameters()))
    groups = make_optimizer(model, Optimizer()).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.2, len(decayed)),
        (0.0, len(exempt)),
    ]


@pytest.mark.parametrize("name", ["vit_b16", "convnext_atto", "resnet18"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = Model(trunk=name, trunk_args=SMALL if name == "vit_b16" else {}, image_size=32, grad_checkpointing=True)
    trunk, images, found = build_trunk(model), torch.randn(2, 3, 32, 32), []
    for settings in (model.model_copy(update={"grad_checkpointing": False}), model):
        set_up_trunk(trunk, settings)
        trunk.zero_grad()
        trunk(images).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in trunk.parameters() if parameter.grad is not None])
    assert any(getattr(module, "grad_checkpointing", False) for module in trunk.modules())
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_compilation_keeps_timms_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, asked = build_trunk(Model(trunk="vit_b16", trunk_args=SMALL, image_size=32)), []
    keys = trunk.state_dict().keys()
    monkeypatch.setattr(torch, "compile", lambda call, **how: asked.append(how) or call)
    set_up_trunk(trunk, Model(compile=True))
    assert asked and trunk.state_dict().keys() == keys
    assert trunk(torch.randn(1, 3, 32, 32)).shape == (1, 128)


def test_trunks_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"timm has no model named 'vit_huuge'\n  allowed: vit_s16, vit_b16, .*timm.list_models\(\)"
    ):
        build_trunk(Model(trunk="vit_huuge"))
    with pytest.raises(UserError, match=r"timm cannot build and run 'vit_b16' .*depht"):
        build_trunk(Model(trunk="vit_b16", trunk_args={"depht": 3}))
    with pytest.raises(UserError, match="timm has no gradient checkpointing for 'test_byobnet_like'"):
        set_up_trunk(nn.Linear(1, 1), Model(trunk="test_byobnet_like", grad_checkpointing=True))


VIT, DEPTH = "vit_tiny_patch16_224", {"depth": 1}
REFUSED: dict[str, tuple[Model, str]] = {  # the model, and a part of the error
    "swin": (Model(trunk="swin_tiny_patch4_window7_224", image_size=64), "train.model.image_size 64"),
    "deit": (Model(trunk="deit_tiny_patch16_224", image_size=64), "train.model.image_size 64"),
    "eva02": (Model(trunk="eva02_tiny_patch14_224", image_size=56), "train.model.image_size 56"),
    "mixer": (Model(trunk="mixer_s32_224", image_size=64), "train.model.image_size 64"),
    "image of two": (Model(trunk=VIT, trunk_args={"img_size": [64, 96]}), "'img_size': [64, 96]"),
    "norm": (Model(trunk=VIT, trunk_args={"norm_layer": "nonsense"}), "KeyError: 'nonsense'"),
    "no patch": (Model(trunk=VIT, trunk_args={"patch_size": 0}), "ZeroDivisionError"),
    "word": (Model(trunk=VIT, trunk_args={"depth": "x"}), "{'depth': 'x'}"),
    "list": (Model(trunk="resnet18", trunk_args={"block": [1]}), "{'block': [1]}"),
    "heads": (Model(trunk=VIT, trunk_args={"num_heads": 5}), "{'num_heads': 5}"),
    "no pool": (Model(trunk=VIT, trunk_args={"global_pool": ""}), "are [1, 197, 192], not [1, 192]"),
    "no pool of maps": (Model(trunk="resnet18", trunk_args={"global_pool": ""}), "not [1, 512]"),
    "unknown": (Model(trunk="resnet18", trunk_args={"img_size": 64}), "{'img_size': 64}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_timm_cannot_build_or_run_are_refused_with_a_fix_that_works(case: str) -> None:
    model, part = REFUSED[case]
    with pytest.raises(UserError) as caught:
        build_trunk(model)
    assert part in caught.value.problem and "train.model.trunk_args" in caught.value.problem
    assert caught.value.fix
    for fix in caught.value.fix.split(", or "):
        key, _, value = fix.removeprefix("--set ").removeprefix("omit ").removeprefix("train.model.").partition("=")
        name = key.removeprefix("trunk_args.")
        if fix.startswith("omit"):
            kept = {other: number for other, number in model.trunk_args.items() if other != name}
            changed = model.model_copy(update={"trunk_args": kept})
        elif key != name:
            changed = model.model_copy(update={"trunk_args": {**model.trunk_args, name: int(value)}})
        else:
            changed = model.model_copy(update={key: int(value)})
        costs = model_costs(changed, 10)
        assert costs.width and costs.width > 100, fix


@pytest.mark.parametrize(
    "own",
    [{"num_classes": 10}, {"in_chans": 1}, {"pretrained": True}, {"features_only": True}, {"checkpoint_path": "x"}],
)
def test_arguments_that_are_not_the_architectures_are_refused(own: dict) -> None:
    ((key, value),) = own.items()
    with pytest.raises(UserError) as caught:
        build_trunk(Model(trunk=VIT, trunk_args={**DEPTH, **own}))
    assert f"train.model.trunk_args.{key} is {value!r}" in caught.value.problem
    assert caught.value.fix == f"omit train.model.trunk_args.{key}"


@pytest.mark.parametrize("name", ["vgg11", "hgnetv2_b0", "mobilenetv3_small_050", "vit_b16"])
def test_features_are_as_wide_as_the_head_expects(name: str) -> None:
    """timm's `num_features` is another width in models with a hidden layer before the classifier."""
    model = Model(trunk=name, trunk_args=DEPTH if name == "vit_b16" else {}, image_size=64)
    with torch.device("meta"):
        trunk = build_trunk(model)
        assert trunk(torch.zeros(2, 3, 64, 64)).shape == (2, feature_width(trunk))
        costs = model_costs(model, 10)
    assert costs.head == 10 * (feature_width(trunk) + 1) + 2 * feature_width(trunk)


@pytest.mark.parametrize("arguments", [{"class_token": False}, {"pos_embed": "none"}, {"qkv_bias": False}])
def test_a_preset_without_a_part_is_built(arguments: dict) -> None:
    model = Model(trunk="vit_b16", trunk_args={**SMALL, **arguments}, image_size=32)
    assert build_trunk(model)(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_a_pool_by_attention_is_counted() -> None:
    model = Model(trunk=VIT, trunk_args={**DEPTH, "global_pool": "map"}, image_size=32)
    assert model_costs(model, 10).flops > model_costs(model.model_copy(update={"trunk_args": DEPTH}), 10).flops


DROPPED = {
    "half of the patches": (VIT, {**DEPTH, "patch_drop_rate": 0.5}, 64),
    "three quarters, an odd number kept": (VIT, {**DEPTH, "patch_drop_rate": 0.75}, 48),
    "registers stay": (VIT, {**DEPTH, "reg_tokens": 4, "patch_drop_rate": 0.5}, 64),
    "with rotary positions": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 1, "patch_drop_rate": 0.5}, 56),
    "no transformer": ("resnet18", {}, 32),
}


@pytest.mark.parametrize("case", DROPPED)
def test_operations_are_those_of_the_trunk_as_it_is_trained(case: str) -> None:
    """Against torch's counter over a real forward pass: patches that are dropped in training cost nothing."""
    name, arguments, side = DROPPED[case]
    model = Model(trunk=name, trunk_args=arguments, image_size=side)
    trunk = build_trunk(model).train().requires_grad_(False)
    # The counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trunk(torch.randn(4, 3, side, side))
    head = 2 * feature_width(trunk) * 10
    assert model_costs(model, 10).flops == 3 * (counter.get_total_flops() // 4 + head)
    with torch.device("meta"):
        frozen = trunk_costs(build_trunk(model), side, trained=False).flops
    assert (frozen > counter.get_total_flops() / 4) == ("patch_drop_rate" in arguments), "a frozen trunk drops none"


@pytest.mark.parametrize(
    ("name", "arguments", "side", "patch", "sizes"),
    [
        ("vit_l14", {"depth": 1}, 64, 14, "56, or 70"),
        (VIT, {**DEPTH, "patch_size": [16, 12]}, 64, 48, "48, or 96"),
        ("convnext_atto", {}, 66, 4, "64, or 68"),
        ("swin_tiny_patch4_window7_224", {"img_size": 30, "depths": [1, 1, 1, 1]}, 30, 4, "28, or 32"),
    ],
)
def test_patches_that_do_not_cover_the_image_are_refused(
    name: str, arguments: dict, side: int, patch: int, sizes: str
) -> None:
    model = Model(trunk=name, trunk_args=arguments, image_size=side)
    with torch.device("meta"), pytest.raises(UserError) as caught:
        set_up_trunk(build_trunk(model), model)
    assert f"train.model.image_size is {side}, but {name} takes patches of {patch} pixels" in caught.value.problem
    assert caught.value.allowed == f"multiples of {patch}" and caught.value.fix.endswith(sizes)  # type: ignore[union-attr]


def test_patches_that_are_padded_and_windows_that_overlap_cover_the_image() -> None:
    for name, arguments in ((VIT, {**DEPTH, "dynamic_img_pad": True, "dynamic_img_size": True}), ("resnet18", {})):
        model = Model(trunk=name, trunk_args=arguments, image_size=70)
        with torch.device("meta"):
            trunk = build_trunk(model)
            set_up_trunk(trunk, model)
            assert trunk(torch.empty(1, 3, 70, 70)).shape == (1, trunk.num_features)
