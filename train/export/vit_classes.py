"""A timm ViT as transformers' CLIPVisionModel (norm before the blocks) or ViTModel (none there): configuration and weights.

Both have a class token, learned positions for it and for the patches, and blocks with the norm before attention and MLP. What has
anything else (registers, layer scale, norms of queries and keys, a norm behind the pool, ...) is neither. W width, N patches.
"""

from typing import Any, cast

import torch
from timm.layers.activations import GELU as TimmGELU
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

ACTIVATIONS = {nn.GELU: "gelu", TimmGELU: "gelu", QuickGELU: "quick_gelu", GELUTanh: "gelu_pytorch_tanh"}
_CLIP = {  # timm's name -> the part of the name that differs
    "class": "embeddings.class_embedding", "patch": "embeddings.patch_embedding", "positions": "embeddings.position_embedding.weight",
    "before": "pre_layrnorm", "after": "post_layernorm", "block": "encoder.layers", "norm1": "layer_norm1", "norm2": "layer_norm2",
    "attention": "self_attn", "out": "out_proj",
}  # fmt: skip
_VIT = {
    "class": "embeddings.cls_token", "patch": "embeddings.patch_embeddings.projection", "positions": "embeddings.position_embeddings",
    "after": "layernorm", "block": "layers", "norm1": "layernorm_before", "norm2": "layernorm_after",
    "attention": "attention", "out": "o_proj",
}  # fmt: skip


def transformers_vit(net: nn.Module) -> Any | None:
    """The same ViT as a transformers model in evaluation mode, or None if its classes cannot hold it.

    Args:
        net: a timm model without classifier.

    Returns:
        CLIPVisionModel or ViTModel (without its pooler); None.
    """
    if not isinstance(net, VisionTransformer) or not is_plain(net):
        return None
    from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

    clip, block, patches = isinstance(net.norm_pre, nn.LayerNorm), _blocks(net)[0], cast(Any, net.patch_embed)
    sizes: dict[str, Any] = {
        "hidden_size": net.embed_dim, "intermediate_size": block.mlp.fc1.out_features, "num_hidden_layers": len(net.blocks),
        "num_attention_heads": block.attn.num_heads, "image_size": patches.img_size[0],
        "patch_size": patches.patch_size[0], "hidden_act": ACTIVATIONS[type(block.mlp.act)],
        "layer_norm_eps": net.norm.eps,
    }  # fmt: skip
    with torch.device("meta"):
        model: Any = (
            CLIPVisionModel(CLIPVisionConfig(**sizes))
            if clip
            else ViTModel(ViTConfig(**sizes, qkv_bias=block.attn.qkv.bias is not None), add_pooling_layer=False)
        )
    tensors = _renamed(net.state_dict(), _CLIP if clip else _VIT)
    if clip:
        tensors["embeddings.class_embedding"] = tensors["embeddings.class_embedding"].flatten()
        tensors["embeddings.position_embedding.weight"] = tensors["embeddings.position_embedding.weight"][0]
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if wanted != {key: tensor.shape for key, tensor in tensors.items()}:
        return None
    model = type(model)(model.config) if clip else type(model)(model.config, add_pooling_layer=False)  # for buffers that are not kept
    model.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, strict=True)
    return model.eval()


def _blocks(net: VisionTransformer) -> list[Any]:
    return list(net.blocks)


def is_plain(net: VisionTransformer) -> bool:
    """Whether all that keys and shapes do not tell is as in both classes."""
    norms = {module.eps for module in net.modules() if isinstance(module, nn.LayerNorm)}
    patches, blocks = cast(Any, net.patch_embed), _blocks(net)
    return (
        net.global_pool in ("avg", "token")
        and not net.pool_include_prefix
        and isinstance(net.norm, nn.LayerNorm)
        and net.num_prefix_tokens == 1 == int(net.has_class_token)
        and not net.no_embed_class
        and len(norms) == 1
        and all(side is not None and side[0] == side[1] for side in (patches.img_size, patches.patch_size))
        and len({type(block.mlp.act) for block in blocks}) == 1
        and type(blocks[0].mlp.act) in ACTIVATIONS
        and getattr(blocks[0].mlp.act, "approximate", "none") == "none"
        and all(type(block) is Block and type(block.attn) is Attention for block in blocks)
    )


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """timm's keys -> those of a class; keys that neither has stay as they are, and fit nowhere."""
    heads = {"cls_token": names["class"], "pos_embed": names["positions"]}
    parts = {"norm_pre": names.get("before", "norm_pre"), "norm": names["after"], "patch_embed.proj": names["patch"]}
    inner = {"norm1": names["norm1"], "norm2": names["norm2"], "attn.proj": f"{names['attention']}.{names['out']}"}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        if key in heads:
            found[heads[key]] = tensor
        elif not key.startswith("blocks."):
            found[f"{parts.get(module, module)}.{kind}"] = tensor
        else:
            _, number, rest = module.split(".", 2)
            at = f"{names['block']}.{number}"
            if rest == "attn.qkv":
                for name, part in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{at}.{names['attention']}.{name}_proj.{kind}"] = part
            else:
                found[f"{at}.{inner.get(rest, rest)}.{kind}"] = tensor
    return found
