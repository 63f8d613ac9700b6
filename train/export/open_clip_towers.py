"""A trunk and its projection as open_clip's image tower: `vision_cfg` and weights.

A plain ViT becomes open_clip's own VisionTransformer, whose patch convolution has no bias: a bias is added to the patches' positions, where
it makes the same sums. A convolutional trunk is a timm model inside open_clip, which takes no arguments but the name.
W trunk width, D width of the common space, N patches.
"""

import copy
from typing import Any, NamedTuple, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from labels.errors import UserError
from train.export.format import TimmTower
from train.export.vit_classes import ACTIVATIONS, is_plain

_INNER = {
    "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_OUTER = {"norm_pre": "ln_pre", "norm": "ln_post", "patch_embed.proj": "conv1"}
_ACT_KWARGS: dict[str, dict[str, Any] | None] = {
    "gelu": None,
    "gelu_pytorch_tanh": {"approximate": "tanh"},
}  # quick GELU is a word for both towers there


class Towers(NamedTuple):
    """What a contrastive run has trained beside its trunk.

    Attributes:
        projection: of pooled features, without bias, [D, W] as nn.Linear has it.
        text_config: open_clip's `text_cfg`.
        text: weights of open_clip's TextTransformer, by its own keys.
        logit_scale: the logarithm of the factor of cosines, a scalar.
    """

    projection: Tensor
    text_config: dict[str, Any]
    text: dict[str, Tensor]
    logit_scale: Tensor


def build_pair(tower: TimmTower, towers: Towers, side: int) -> tuple[nn.Module, dict[str, Any]]:
    """open_clip's CustomTextCLIP of a trunk and what was trained beside it, in evaluation mode, and its `model_cfg`.

    Args:
        tower: the trunk.
        towers: see there.
        side: of the images, pixels.

    Raises:
        UserError: as for image_tower.
    """
    from open_clip.model import CustomTextCLIP

    vision, visual = image_tower(tower, towers.projection, side)
    config = {"embed_dim": len(towers.projection), "vision_cfg": vision, "text_cfg": towers.text_config}
    model = CustomTextCLIP(**copy.deepcopy(config))
    tensors = {f"visual.{key}": tensor for key, tensor in visual.items()} | {f"text.{key}": tensor for key, tensor in towers.text.items()}
    try:
        model.load_state_dict({**tensors, "logit_scale": towers.logit_scale}, strict=True)
    except RuntimeError:  # norms or scales that the tower there does not have
        raise _refused(tower) from None
    return model.eval(), {**config, "custom_text": True}


def text_config(tower: Any) -> dict[str, int]:
    """open_clip's `text_cfg` of a text tower as train/text_tower.py builds it."""
    block = tower.transformer.resblocks[0]
    return {
        "context_length": tower.context_length, "vocab_size": tower.vocab_size, "width": tower.token_embedding.weight.shape[1],
        "heads": block.attn.num_heads, "layers": len(tower.transformer.resblocks),
    }  # fmt: skip


def image_tower(tower: TimmTower, projection: Tensor, side: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`vision_cfg`, and the weights of open_clip's `visual`, for a trunk whose pooled features are projected without a bias.

    Args:
        tower: the trunk.
        projection: [D, W], as nn.Linear has it.
        side: of the images, pixels.

    Raises:
        UserError: open_clip has no tower that computes the same.
    """
    net = tower.net
    if isinstance(net, VisionTransformer):
        if is_plain(net) and ACTIVATIONS[type(cast(Any, net.blocks)[0].mlp.act)] in _ACT_KWARGS:
            return _vit(net, projection, side)
    elif not tower.arguments:
        config = {"image_size": side, "timm_model_name": tower.architecture, "timm_pool": "", "timm_proj": "linear"}
        trunk = {f"trunk.{key}": tensor for key, tensor in net.state_dict().items()}
        return config, {**trunk, "head.proj.weight": projection}
    raise _refused(tower)


def _refused(tower: TimmTower) -> UserError:
    return UserError(
        f"open_clip has no image tower like {tower.architecture!r} with {tower.arguments}",
        allowed="a ViT with class token, learned positions and GELU, or a timm model without arguments (train.model.trunk_args: {})",
        mend="--format timm, hf or onnx hold the image tower alone",
    )


def _vit(net: VisionTransformer, projection: Tensor, side: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    block, activation = cast(Any, net.blocks)[0], ACTIVATIONS[type(cast(Any, net.blocks)[0].mlp.act)]
    config: dict[str, Any] = {
        "image_size": side, "patch_size": cast(Any, net.patch_embed).patch_size[0], "layers": len(net.blocks), "width": net.embed_dim,
        "head_width": net.embed_dim // block.attn.num_heads, "mlp_ratio": block.mlp.fc1.out_features / net.embed_dim,
        "pool_type": "tok" if net.global_pool == "token" else "avg", "no_ln_pre": not isinstance(net.norm_pre, nn.LayerNorm),
        "norm_kwargs": {"eps": cast(nn.LayerNorm, net.norm).eps}, "act_kwargs": _ACT_KWARGS[activation],
    }  # fmt: skip
    tensors: dict[str, Tensor] = {"proj": projection.T}
    for key, tensor in net.state_dict().items():
        module, _, kind = key.rpartition(".")
        if key == "cls_token":
            tensors["class_embedding"] = tensor.flatten()
        elif key == "pos_embed":
            bias = getattr(cast(Any, net.patch_embed).proj, "bias", None)
            positions = tensor[0].clone()  # [1 + N, W]
            if bias is not None:
                positions[1:] += bias
            tensors["positional_embedding"] = positions
        elif key == "patch_embed.proj.bias":
            continue
        elif not key.startswith("blocks."):
            tensors[f"{_OUTER.get(module, module)}.{kind}"] = tensor
        else:
            _, number, rest = module.split(".", 2)
            name = f"attn.in_proj_{kind}" if rest == "attn.qkv" else f"{_INNER.get(rest, rest)}.{kind}"
            tensors[f"transformer.resblocks.{number}.{name}"] = tensor
    return config, tensors
