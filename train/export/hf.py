"""Hugging Face's form: config.json, model.safetensors, preprocessor_config.json.

A timm ViT that CLIPVisionModel or ViTModel can hold becomes one (vit_classes.py); all other timm models are wrapped
(TimmWrapperModel).
"""

from pathlib import Path
from typing import Any, cast

import torch
from timm.layers.activations import GELU as TimmGELU
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from labels.storage import UserError, write_json
from train.encoders.encoder import Encoder, ImageForm
from train.encoders.libraries import import_transformers
from train.export.format import Features, Format, TimmTower, Written, timm_tower
from train.export.timm import image_config

# ---- vit_classes: A timm ViT as transformers' CLIPVisionModel (norm before the blocks) or ViTModel (none there):
# configuration and weights.
#
# Both have a class token, learned positions for it and for the patches, and blocks with the norm before attention and
# MLP. What has anything else (registers, layer scale, norms of queries and keys, a norm behind the pool, ...) is
# neither. W width, N patches.


ACTIVATIONS = {nn.GELU: "gelu", TimmGELU: "gelu", QuickGELU: "quick_gelu", GELUTanh: "gelu_pytorch_tanh"}
_CLIP = {  # timm's name -> the part of the name that differs
    "class": "embeddings.class_embedding",
    "patch": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight",
    "before": "pre_layrnorm",
    "after": "post_layernorm",
    "block": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention": "self_attn",
    "out": "out_proj",
}
_VIT = {
    "class": "embeddings.cls_token",
    "patch": "embeddings.patch_embeddings.projection",
    "positions": "embeddings.position_embeddings",
    "after": "layernorm",
    "block": "layers",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention": "attention",
    "out": "o_proj",
}


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
        "hidden_size": net.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": patches.img_size[0],
        "patch_size": patches.patch_size[0],
        "hidden_act": ACTIVATIONS[type(block.mlp.act)],
        "layer_norm_eps": net.norm.eps,
    }
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
    model = (
        type(model)(model.config) if clip else type(model)(model.config, add_pooling_layer=False)
    )  # for buffers that are not kept
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


_CODE = """\
import torch
from transformers import AutoImageProcessor, {name}

model = {name}.from_pretrained(folder{options}).eval()
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # as measured; torchvision's rounds pixels by a level
with torch.inference_mode():
    found = model(**processor(images=image, return_tensors="pt"))
    features = {features}
"""
# What of the output are the encoder's features, by class and pool.
_FEATURES = {
    ("CLIPVisionModel", "avg"): "model.post_layernorm(found.last_hidden_state)[:, 1:].mean(1)",
    ("CLIPVisionModel", "token"): "found.pooler_output",
    ("ViTModel", "avg"): "found.last_hidden_state[:, 1:].mean(1)",
    ("ViTModel", "token"): "found.last_hidden_state[:, 0]",
    ("TimmWrapperModel", ""): "found.pooler_output.flatten(1)",
}
_POOLING = {
    ("CLIPVisionModel", "avg"): (
        "The encoder's feature is the mean of the patch tokens after the final norm. CLIPVisionModel's `last_hidden_state` is before that "
        "norm and its `pooler_output` is the class token, which the training did not read: the code in the card takes the right one. "
        "`--encoder hf:DIR --pool avg` does the same."
    ),
    ("CLIPVisionModel", "token"): "The encoder's feature is the class token after the final norm: `pooler_output`.",
    ("ViTModel", "avg"): (
        "The encoder's feature is the mean of the patch tokens after the final norm: of `last_hidden_state` without its first token. "
        "There is no `pooler_output`; `--encoder hf:DIR --pool avg` does the same."
    ),
    (
        "ViTModel",
        "token",
    ): "The encoder's feature is the class token after the final norm: the first of `last_hidden_state`.",
    ("TimmWrapperModel", ""): "The encoder's feature is `pooler_output`: timm's own pool, `{pool}`.",
}


def write_processor(folder: Path, form: ImageForm) -> None:
    """preprocessor_config.json: shorter side to S by bicubic resampling, centre crop, mean and std."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": form.side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": form.side, "width": form.side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(form.mean),
            "image_std": list(form.std),
        },
    )


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
    options = ", add_pooling_layer=False" if name == "ViTModel" else ""
    taken = _FEATURES[name, pool]
    code = _CODE.format(name=name, options=options, features=taken)
    pooling = _POOLING[name, pool].format(pool=encoder.description["pool"])
    return Written(f"transformers {name}", pooling, code, lambda where: _read(where, name, pool))


def _wrapped(transformers: Any, tower: TimmTower, form: ImageForm) -> Any:
    config = transformers.TimmWrapperConfig(
        architecture=tower.architecture,
        model_args=tower.arguments or None,
        num_labels=0,
        pretrained_cfg=image_config(tower.net, form),
    )
    model = transformers.TimmWrapperModel(config)
    model.timm_model.load_state_dict(tower.net.state_dict(), strict=True)
    return model.eval()


def _read(folder: Path, name: str, pool: str) -> Features:
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model = (
        getattr(import_transformers(), name)
        .from_pretrained(folder, local_files_only=True, weights_only=True, **options)
        .eval()
    )

    def features(images: torch.Tensor) -> torch.Tensor:
        found = model(pixel_values=images)
        tokens = found.last_hidden_state
        if name == "TimmWrapperModel":
            return found.pooler_output.flatten(1)
        if name == "ViTModel":
            return tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
        return found.pooler_output if pool == "token" else model.post_layernorm(tokens)[:, 1:].mean(1)

    return features


HF = Format("hf", "transformers", _write)
