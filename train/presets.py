"""The paper's trunks by short names: which timm model each is, with which arguments, and how its weights begin.

vit_s16, vit_b16, vit_l16, vit_l14   patch convolution without bias, CLS token, learned positions, norm before the blocks, exact GELU,
                                     MLP ratio 4, head width 64; weights begun as the reference does
rn50, convnext_t                     timm's ResNet-50 and ConvNeXt-T with average pool, weights begun as timm does: no configuration of
                                     them was published

Sources: SuperClass, section 4 and table 8; x-cls/superclass, open_clip/transformer.py (`VisionTransformer`).
"""

from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


class Preset(NamedTuple):
    """A timm model name, and what is passed to it."""

    name: str
    arguments: dict[str, Any]


PRESETS = {
    "vit_s16": Preset("vit_base_patch16_clip_224", {"embed_dim": 384, "num_heads": 6}),  # timm has no small one of CLIP's kind
    "vit_b16": Preset("vit_base_patch16_clip_224", {}),
    "vit_l16": Preset("vit_large_patch14_clip_224", {"patch_size": 16}),
    "vit_l14": Preset("vit_large_patch14_clip_224", {}),
    "rn50": Preset("resnet50", {}),
    "convnext_t": Preset("convnext_tiny", {}),
}


@torch.no_grad()
def begin_as_reference(vit: VisionTransformer) -> None:
    """Draw a ViT's first weights as the reference does: tokens and positions from N(0, W^-1/2), query, key and value by Xavier,
    all other layers as torch draws them, biases of the attention 0.
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
