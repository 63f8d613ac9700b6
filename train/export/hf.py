"""Hugging Face's format: config.json, model.safetensors, preprocessor_config.json.

    timm ViT   -> transformers_vit: CLIPVisionModel (with a norm before the blocks) or ViTModel (without)
    all others -> TimmWrapperModel, which holds a timm model as it is

LLaVA and others read hidden states from the two ViT classes. Both have a class token, learned positions for it and for
the N patches, and blocks with the norm before attention and MLP; a ViT with anything else (registers, layer scale,
norms of queries and keys, a norm after the pool, ...) is wrapped. is_plain, keys and shapes decide.
"""

from pathlib import Path
from typing import Any, cast

import torch
from timm.layers.activations import GELU as TimmGELU
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from labels.storage import UserError
from train.encoders.encoder import Encoder, ImageForm
from train.encoders.libraries import import_transformers
from train.export.format import Features, Format, TimmTower, Written, pretrained_config, timm_tower, write_processor

ACTIVATIONS = {nn.GELU: "gelu", TimmGELU: "gelu", QuickGELU: "quick_gelu", GELUTanh: "gelu_pytorch_tanh"}
_CLIP = {  # timm's names -> the class's; all other names are the same
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.{}_proj",
    "attn.proj": "self_attn.out_proj",
}
_VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "blocks": "layers",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.{}_proj",
    "attn.proj": "attention.o_proj",
}


def transformers_vit(net: nn.Module) -> Any | None:
    """A timm model without classifier as CLIPVisionModel or ViTModel (without its pooler) in evaluation mode; None if
    neither computes the same.
    """
    if not isinstance(net, VisionTransformer) or not is_plain(net):
        return None
    from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

    clip, block, patches = isinstance(net.norm_pre, nn.LayerNorm), cast(Any, net.blocks)[0], cast(Any, net.patch_embed)
    sizes: dict[str, Any] = {
        "hidden_size": net.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": patches.img_size[0],
        "patch_size": patches.patch_size[0],
        "hidden_act": ACTIVATIONS[type(block.mlp.act)],
        "layer_norm_eps": net.norm.eps,
    }

    def build() -> Any:
        if clip:
            return CLIPVisionModel(CLIPVisionConfig(**sizes))
        return ViTModel(ViTConfig(**sizes, qkv_bias=block.attn.qkv.bias is not None), add_pooling_layer=False)

    tensors = renamed(net.state_dict(), _CLIP if clip else _VIT)
    if clip:
        tensors[_CLIP["cls_token"]] = tensors[_CLIP["cls_token"]].flatten()
        tensors[_CLIP["pos_embed"]] = tensors[_CLIP["pos_embed"]][0]
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build().state_dict().items()}
    if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
        return None
    model = build()
    model.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, strict=True)
    return model.eval()


def is_plain(net: VisionTransformer) -> bool:
    """Whether everything that keys and shapes do not show is as in both classes."""
    norms = {module.eps for module in net.modules() if isinstance(module, nn.LayerNorm)}
    patches, blocks = cast(Any, net.patch_embed), list(cast(Any, net.blocks))
    return (
        net.global_pool in ("avg", "token")
        and not net.pool_include_prefix
        and isinstance(net.norm, nn.LayerNorm)
        and net.num_prefix_tokens == 1 == int(net.has_class_token)
        and net.pos_embed is not None
        and not net.no_embed_class
        and len(norms) == 1
        and all(side is not None and side[0] == side[1] for side in (patches.img_size, patches.patch_size))
        and len({type(block.mlp.act) for block in blocks}) == 1
        and type(blocks[0].mlp.act) in ACTIVATIONS
        and getattr(blocks[0].mlp.act, "approximate", "none") == "none"
        and all(type(block) is Block and type(block.attn) is Attention for block in blocks)
    )


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """A timm ViT's tensors by another library's keys; a key that is not in `names` stays as it is.

    If `attn.qkv` has a field in its new name, its tensor is split in three: q, k and v.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        prefix = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            prefix = f"{names['blocks']}.{number}."
        name = names.get(module, module)
        if key in names:
            result[names[key]] = tensor
        elif "{}" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{prefix}{name.format(letter)}.{kind}"] = part
        else:
            result[f"{prefix}{name}.{kind}"] = tensor
    return result


_CODE = """\
import torch
from transformers import AutoImageProcessor, {name}

model = {name}.from_pretrained(folder{options}).eval()
# backend="pil" as measured: torchvision's rounds pixels by a level
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
with torch.inference_mode():
    output = model(**processor(images=image, return_tensors="pt"))
    features = {features}
"""
# The encoder's features by class and pool: an expression, for the card and for the check, and a sentence. A run's pool
# is the mean of the patches after the final norm, which CLIPVisionModel does not give out.
_READOUTS = {
    ("CLIPVisionModel", "avg"): (
        "model.post_layernorm(output.last_hidden_state)[:, 1:].mean(1)",
        "The encoder's feature is the mean of the patch tokens after the final norm. CLIPVisionModel's "
        "`last_hidden_state` is before that norm and its `pooler_output` is the class token, which the training did "
        "not read: the code in the card takes the right one. `--encoder hf:DIR --pool avg` does the same.",
    ),
    ("CLIPVisionModel", "token"): (
        "output.pooler_output",
        "The encoder's feature is the class token after the final norm: `pooler_output`.",
    ),
    ("ViTModel", "avg"): (
        "output.last_hidden_state[:, 1:].mean(1)",
        "The encoder's feature is the mean of the patch tokens after the final norm: of `last_hidden_state` without "
        "its first token. There is no `pooler_output`; `--encoder hf:DIR --pool avg` does the same.",
    ),
    ("ViTModel", "token"): (
        "output.last_hidden_state[:, 0]",
        "The encoder's feature is the class token after the final norm: the first of `last_hidden_state`.",
    ),
    ("TimmWrapperModel", ""): (
        "output.pooler_output.flatten(1)",
        "The encoder's feature is `pooler_output`: timm's own pool, `{pool}`.",
    ),
}


def _write(encoder: Encoder, folder: Path) -> Written:
    if encoder.requested.spec.startswith("hf:"):
        raise UserError(f"the encoder {encoder.name!r} is in Hugging Face's form already", allowed="--format onnx")
    tower = timm_tower(encoder, "hf")
    transformers = import_transformers()
    model, pool = transformers_vit(tower.net), str(getattr(tower.net, "global_pool", ""))
    if model is None:
        model, pool = _wrapped(transformers, tower, encoder.images), ""
    model.save_pretrained(folder)
    write_processor(folder, encoder.images)
    name = type(model).__name__
    features, pooling = _READOUTS[name, pool]
    code = _CODE.format(name=name, options=", add_pooling_layer=False" if name == "ViTModel" else "", features=features)
    pooling = pooling.format(pool=encoder.description["pool"])
    return Written(f"transformers {name}", pooling, code, lambda path: _read(path, name, features))


def _wrapped(transformers: Any, tower: TimmTower, form: ImageForm) -> Any:
    config = transformers.TimmWrapperConfig(
        architecture=tower.architecture,
        model_args=tower.arguments or None,
        num_labels=0,
        pretrained_cfg=pretrained_config(tower.net, form),
    )
    model = transformers.TimmWrapperModel(config)
    model.timm_model.load_state_dict(tower.net.state_dict(), strict=True)
    return model.eval()


def _read(folder: Path, name: str, features: str) -> Features:
    options: dict[str, Any] = {"local_files_only": True, "weights_only": True}
    if name == "ViTModel":
        options["add_pooling_layer"] = False
    model = getattr(import_transformers(), name).from_pretrained(folder, **options).eval()
    # The card's own expression, so that the check covers it.
    return lambda images: eval(features, {"model": model, "output": model(pixel_values=images)})


HF = Format("hf", "transformers", _write)
