"""What `train run` trains: a vision trunk, a linear head, and the loss of both.

    images [B, 3, S, S] -> trunk (timm) -> pooled features [B, W] -> LayerNorm(W) -> Linear(W, V) and loss -> mean loss

Structure after SuperClass (x-cls/superclass, opencls/model.py, open_clip/transformer.py); a ViT's pool is the mean of
its patch tokens after the final norm. PRESETS are the paper's trunks (section 4 and table 8): ViTs with patch
convolution without bias, CLS token, learned positions, norm before the blocks, exact GELU, MLP ratio 4, head width 64,
and the reference's initial weights; ResNet-50 and ConvNeXt-T, of which no configuration was published, are timm's.
B batch, S image size, W trunk width, V vocabulary.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from labels.settings import Model
from labels.storage import UserError
from train.losses.head import HeadLoss


class Preset(NamedTuple):
    """A timm model and its arguments: JSON values, so that a configuration file can name them."""

    name: str
    arguments: dict[str, Any]


PRESETS = {
    # timm's small CLIP ViT has another norm, which JSON cannot express
    "vit_s16": Preset("vit_base_patch16_clip_224", {"embed_dim": 384, "num_heads": 6}),
    "vit_b16": Preset("vit_base_patch16_clip_224", {}),
    "vit_l16": Preset("vit_large_patch14_clip_224", {"patch_size": 16}),
    "vit_l14": Preset("vit_large_patch14_clip_224", {}),
    "rn50": Preset("resnet50", {}),
    "convnext_t": Preset("convnext_tiny", {}),
}
# Arguments of timm.create_model that make something else than a trunk with weights of its own and images in RGB.
_OWN_ARGUMENTS = {*inspect.signature(timm.create_model).parameters} - {"kwargs"} | {
    "num_classes",
    "in_chans",
    "features_only",
    "out_indices",
}


class Classifier(nn.Module):
    """Trunk, head and loss: images [B, 3, S, S] and label ids [B, K] -> the batch's mean loss, a scalar.

    The loss is inside because it computes the head's matrix product itself, and because DDP and FSDP see only what a
    module's forward does.
    """

    def __init__(self, trunk: nn.Module, loss: HeadLoss) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = build_head(feature_width(trunk), len(loss.idf))
        self.loss = loss

    def forward(self, images: Tensor, label_ids: Tensor) -> Tensor:
        norm, linear = self.head
        return self.loss(norm(self.trunk(images)), linear.weight, linear.bias, label_ids)


def build_head(width: int, vocabulary: int) -> nn.Sequential:
    """LayerNorm(W) -> Linear(W, V), weight drawn from N(0, W^-1/2), bias 0 (reference: opencls/model.py)."""
    linear = nn.Linear(width, vocabulary)
    nn.init.normal_(linear.weight, std=width**-0.5)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(width), linear)


def build_trunk(model: Model) -> nn.Module:
    """A timm model without classifier: normalised images [B, 3, S, S] -> pooled features [B, W].

    A ViT pools by the mean of its patch tokens after the final norm; other architectures keep timm's average pool.
    It is first built and run on one image on the meta device, without memory. UserError, before any weight is drawn, if
    timm does not know the model, or cannot build or run it as requested.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            _run_once(_create(model), model.image_size)
    except UserError:
        raise
    except Exception as error:  # timm checks few arguments: anything may be raised, anywhere
        raise UserError(
            f"timm cannot build and run {model.trunk!r} with train.model.image_size {model.image_size} and "
            f"train.model.trunk_args {model.trunk_args}: "
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            allowed="what timm builds, with features [B, W] of images [B, 3, image_size, image_size]",
            fix=", or ".join(_fixes(model)) or "change train.model.trunk_args or train.model.image_size",
        ) from None
    return _create(model)


def _create(model: Model) -> nn.Module:
    name, arguments = trunk_arguments(model)
    trunk = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    if model.trunk in PRESETS and isinstance(trunk, VisionTransformer):
        init_like_reference(trunk)
    return trunk


@torch.no_grad()
def _run_once(trunk: nn.Module, side: int) -> None:
    """Raise what the trunk raises on one image, and ValueError for features that are not pooled."""
    features = trunk.eval()(torch.zeros(1, 3, side, side))
    shape, wanted = list(getattr(features, "shape", [type(features).__name__])), [1, feature_width(trunk)]
    if shape != wanted:
        raise ValueError(f"its features of one image are {shape}, not {wanted}")


def _fixes(model: Model) -> Iterator[str]:
    """The changes of one key with which timm builds and runs the model; each is tried."""
    arguments, side = model.trunk_args, model.image_size
    changes: dict[str, dict[str, Any]] = {
        f"omit train.model.trunk_args.{key}": {
            "trunk_args": {name: arguments[name] for name in arguments if name != key}
        }
        for key in arguments
    }
    # Trunks with a fixed size other than ViTs
    changes[f"--set train.model.trunk_args.img_size={side}"] = {"trunk_args": {**arguments, "img_size": side}}
    own = timm.get_pretrained_cfg(_preset(model).name)
    if own:
        changes[f"--set train.model.image_size={own.input_size[-1]}"] = {"image_size": own.input_size[-1]}
    for change, update in changes.items():
        changed = model.model_copy(update=update)
        with suppress(Exception), torch.device("meta"), torch.random.fork_rng(devices=[]):
            trunk = _create(changed)
            _run_once(trunk, changed.image_size)
            check_patches(trunk, changed)
            yield change


def feature_width(trunk: nn.Module) -> int:
    """W. timm's `num_features` is the width before the hidden layer of a classifier that has one."""
    return int(getattr(trunk, "head_hidden_size", None) or trunk.num_features)  # type: ignore[arg-type]


def trunk_arguments(model: Model) -> tuple[str, dict[str, Any]]:
    """timm's name of the trunk and its JSON arguments, without num_classes; UserError if timm has no such model, or an
    argument is set by this program.
    """
    preset = _preset(model)
    if own := sorted(_OWN_ARGUMENTS & model.trunk_args.keys()):
        raise UserError(
            f"train.model.trunk_args.{own[0]} is {model.trunk_args[own[0]]!r}, but `train` sets {own[0]} itself",
            allowed="arguments of the architecture, such as depth or drop_path_rate",
            fix=f"omit train.model.trunk_args.{own[0]}",
        )
    if not timm.is_model(preset.name):
        near = timm.list_models(f"*{model.trunk.split('_')[0]}*")[:5]
        names = f"{', '.join(PRESETS)}, or any name of timm.list_models()"
        raise UserError(
            f"timm has no model named {model.trunk!r}",
            allowed=names + (f", e.g. {', '.join(near)}" if near else ""),
            fix="set train.model.trunk",
        )
    arguments: dict[str, Any] = {**preset.arguments, **model.trunk_args}
    if is_vit(model):
        # fc_norm=False keeps the final norm before the pool; timm moves it behind the pool for global_pool="avg".
        arguments = {"img_size": model.image_size, "global_pool": "avg", "fc_norm": False} | arguments
    return preset.name, arguments


def is_vit(model: Model) -> bool:
    """Whether the trunk is of timm's ViT class: those take img_size and a pool, convolutional trunks do not."""
    return timm.models.model_entrypoint(_preset(model).name).__module__.endswith(".vision_transformer")


def _preset(model: Model) -> Preset:
    return PRESETS.get(model.trunk, Preset(model.trunk, {}))


@torch.no_grad()
def init_like_reference(vit: VisionTransformer) -> None:
    """Draw a ViT's initial weights like the reference: tokens and positions from N(0, W^-1/2), query, key and value by
    Xavier, all other layers as torch draws them, biases of the attention 0.
    """
    for tokens in (vit.cls_token, vit.pos_embed):
        if tokens is not None:
            nn.init.normal_(tokens, std=vit.embed_dim**-0.5)
    vit.patch_embed.proj.reset_parameters()
    blocks: Any = vit.blocks
    for block in blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            linear.reset_parameters()
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        for bias in (block.attn.qkv.bias, block.attn.proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)


def set_up_trunk(trunk: nn.Module, model: Model) -> None:
    """Make a trunk ready for training, in place: gradient checkpointing, compilation. UserError if timm has no
    checkpointing for it, or if its patches do not cover the image.
    """
    check_patches(trunk, model)
    if model.grad_checkpointing:
        try:
            trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise UserError(
                f"timm has no gradient checkpointing for {model.trunk!r}",
                fix="--set train.model.grad_checkpointing=false",
            ) from None
    if model.compile:
        trunk.compile()


def check_single_images(model: Model) -> None:
    """Refuse a trunk that cannot be trained on one image at a time: its BatchNorm has one value for each channel."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        trunk = build_trunk(model).train()
        try:
            trunk(torch.zeros(1, 3, model.image_size, model.image_size))
        except ValueError as error:
            raise UserError(
                f"{model.trunk} cannot be trained on one image at a time: {error}",
                allowed="two or more images of each rank at a time",
                fix="raise train.batch_size, or lower train.runtime.accumulation",
            ) from None


def check_patches(trunk: nn.Module, model: Model) -> None:
    """Refuse an image size of which the last rows and columns would silently not be used."""
    stem = next((module for module in trunk.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or stem.padding != (0, 0) or stem.kernel_size != stem.stride:
        return
    if getattr(getattr(trunk, "patch_embed", None), "dynamic_img_pad", False):
        return
    side, patch = model.image_size, math.lcm(*stem.stride)
    if side % patch:
        below = side // patch * patch
        raise UserError(
            f"train.model.image_size is {side}, but {model.trunk} takes patches of {patch} pixels: "
            f"{side - below} of {side} rows and columns would not be used",
            allowed=f"multiples of {patch}",
            fix=f"--set train.model.image_size={below}, or {below + patch}",
        )
