"""The vision trunk, the classification head, and both with the loss: what the loop trains.

B batch, W trunk width, V vocabulary. Structure after SuperClass (METHOD: x-cls/superclass, opencls/model.py):
pooled feature -> LayerNorm(W) -> Linear(W, V); the pool of a ViT is the mean of the patch tokens after the final norm.
"""

from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from labels.settings import Model
from labels.storage import UserError
from train.losses.head import HeadLoss

# ---- presets: The paper's trunks by short names: which timm model each is, with which arguments, and how its weights begin.
#
# vit_s16, vit_b16, vit_l16, vit_l14   patch convolution without bias, CLS token, learned positions, norm before the blocks, exact GELU,
#                                      MLP ratio 4, head width 64; weights begun as the reference does
# rn50, convnext_t                     timm's ResNet-50 and ConvNeXt-T with average pool, weights begun as timm does: no configuration of
#                                      them was published
#
# Sources: SuperClass, section 4 and table 8; x-cls/superclass, open_clip/transformer.py (`VisionTransformer`).


class Preset(NamedTuple):
    """A timm model name, and what is passed to it."""

    name: str
    arguments: dict[str, Any]


PRESETS = {
    "vit_s16": Preset(
        "vit_base_patch16_clip_224", {"embed_dim": 384, "num_heads": 6}
    ),  # timm has no small one of CLIP's kind
    "vit_b16": Preset("vit_base_patch16_clip_224", {}),
    "vit_l16": Preset("vit_large_patch14_clip_224", {"patch_size": 16}),
    "vit_l14": Preset("vit_large_patch14_clip_224", {}),
    "rn50": Preset("resnet50", {}),
    "convnext_t": Preset("convnext_tiny", {}),
}


@torch.no_grad()
def init_like_reference(vit: VisionTransformer) -> None:
    """Draw a ViT's first weights as the reference does: tokens and positions from N(0, W^-1/2), query, key and value by
    Xavier, all other layers as torch draws them, biases of the attention 0.
    """
    for tokens in (vit.cls_token, vit.pos_embed):
        nn.init.normal_(tokens, std=vit.embed_dim**-0.5)  # type: ignore[arg-type]
    vit.patch_embed.proj.reset_parameters()
    for block in vit.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):  # type: ignore[union-attr]
            linear.reset_parameters()  # type: ignore[operator]
        nn.init.xavier_uniform_(block.attn.qkv.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(block.attn.qkv.bias)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(block.attn.proj.bias)  # type: ignore[union-attr, arg-type]


def build_trunk(model: Model) -> nn.Module:
    """A timm model without classifier: normalised images [B, 3, S, S] -> pooled features [B, W].

    A ViT pools by the mean of its patch tokens after the final norm (CLS kept in the blocks, left out of the mean);
    other architectures keep timm's own average pool. `model.trunk_args` are passed to timm as they are.

    Raises:
        UserError: there is no such preset or timm model, or timm refuses the arguments.
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
    """timm's name of the trunk and the arguments that it is built with, JSON-able, without num_classes.

    Raises:
        UserError: there is no such preset or timm model.
    """
    preset = PRESETS.get(model.trunk, Preset(model.trunk, {}))
    if not timm.is_model(preset.name):
        near = timm.list_models(f"*{model.trunk.split('_')[0]}*")[:5]
        raise UserError(
            f"timm has no model named {model.trunk!r}",
            allowed=f"{', '.join(PRESETS)}, or any name of timm.list_models()"
            + (f", e.g. {', '.join(near)}" if near else ""),
            fix="set train.model.trunk",
        )
    arguments: dict[str, Any] = {**preset.arguments, **model.trunk_args}
    if is_vit(model):
        # fc_norm=False keeps the final norm before the pool; timm moves it behind for global_pool="avg".
        arguments = {"img_size": model.image_size, "global_pool": "avg", "fc_norm": False} | arguments
    return preset.name, arguments


def is_vit(model: Model) -> bool:
    """Whether the trunk is of timm's ViT class: those take img_size and a pool, convolutional trunks do not."""
    module = timm.models.model_entrypoint(PRESETS.get(model.trunk, Preset(model.trunk, {})).name).__module__
    return module.endswith(".vision_transformer")


def set_up_trunk(trunk: nn.Module, model: Model) -> None:
    """What of `train.model` decides how, not what, a trunk computes: gradient checkpointing and compilation, both in
    place.

    Raises:
        UserError: gradient checkpointing is asked for and timm has none for this architecture.
    """
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


class Classifier(nn.Module):
    """Trunk, head and loss: images [B, 3, S, S] and label ids [B, K] -> the batch's mean loss, a scalar.

    The loss is inside, because it takes the head's matrix product into its own hands, and because wrappers (DDP, FSDP)
    only see what a module's forward does.
    """

    def __init__(self, trunk: nn.Module, loss: HeadLoss) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = build_head(int(trunk.num_features), len(loss.idf))  # type: ignore[arg-type]
        self.loss = loss

    def forward(self, images: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        norm, linear = self.head
        return self.loss(norm(self.trunk(images)), linear.weight, linear.bias, label_ids)


def build_head(width: int, vocabulary: int) -> nn.Sequential:
    """LayerNorm(W) -> Linear(W, V), weight drawn from N(0, W^-1/2), bias 0 (reference: opencls/model.py)."""
    linear = nn.Linear(width, vocabulary)
    nn.init.normal_(linear.weight, std=width**-0.5)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(width), linear)
