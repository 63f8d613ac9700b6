"""What `train run` trains: a vision trunk, a linear head, and the loss of both.

    images [B, 3, S, S] -> trunk (timm) -> pooled features [B, W] -> LayerNorm(W) -> Linear(W, V) and loss -> mean loss

Structure after SuperClass (x-cls/superclass, opencls/model.py, open_clip/transformer.py); a ViT's pool is the mean of
its patch tokens after the final norm. PRESETS are the paper's trunks (section 4 and table 8): ViTs with patch
convolution without bias, CLS token, learned positions, norm before the blocks, exact GELU, MLP ratio 4, head width 64,
and the reference's initial weights; ResNet-50 and ConvNeXt-T, of which no configuration was published, are timm's.
B batch, S image size, W trunk width, V vocabulary.
"""

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


class Classifier(nn.Module):
    """Trunk, head and loss: images [B, 3, S, S] and label ids [B, K] -> the batch's mean loss, a scalar.

    The loss is inside because it computes the head's matrix product itself, and because DDP and FSDP see only what a
    module's forward does.
    """

    def __init__(self, trunk: nn.Module, loss: HeadLoss) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = build_head(int(trunk.num_features), len(loss.idf))  # type: ignore[arg-type]
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
    UserError if timm does not know the model, or rejects `model.trunk_args`.
    """
    name, arguments = trunk_arguments(model)
    try:
        trunk = timm.create_model(name, pretrained=False, **{"num_classes": 0, **arguments})
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"timm cannot build {model.trunk!r} with {arguments}: {error}",
            fix="fix train.model.trunk_args or train.model.image_size",
        ) from None
    if model.trunk in PRESETS and isinstance(trunk, VisionTransformer):
        init_like_reference(trunk)
    return trunk


def trunk_arguments(model: Model) -> tuple[str, dict[str, Any]]:
    """timm's name of the trunk and its JSON arguments, without num_classes; UserError if timm has no such model."""
    preset = _preset(model)
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
        nn.init.normal_(tokens, std=vit.embed_dim**-0.5)  # type: ignore[arg-type]
    vit.patch_embed.proj.reset_parameters()
    blocks: Any = vit.blocks
    for block in blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            linear.reset_parameters()
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)


def set_up_trunk(trunk: nn.Module, model: Model) -> None:
    """Switch on gradient checkpointing and compilation, in place; UserError if timm has no checkpointing for it."""
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
