"""open_clip's format, both towers: open_clip_config.json and open_clip_model.safetensors.

    open_clip:NAME                -> the model as it was loaded            -> write_pair
    a run of train clip, train lit -> Towers -> build_pair: CustomTextCLIP -> write_pair

`open_clip.create_model("local-dir:...")` loads it. The run's trunk and its projection become open_clip's image tower
(`vision_cfg` and weights): a plain ViT is open_clip's own VisionTransformer, any other trunk a timm model inside
open_clip, which takes no arguments but the name. W trunk width, D width of the common space, N patches.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from labels.storage import UserError, write_json
from train.encoders.encoder import Encoder
from train.encoders.libraries import load_clip
from train.export.format import Features, Format, TimmTower, Written, save_weights, timm_tower
from train.export.hf import ACTIVATIONS, is_plain, renamed
from train.text_tower import CLIP

_NAMES = {  # timm's names -> open_clip's; all other names are the same
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
    "blocks": "transformer.resblocks",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv": "attn.in_proj",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# Without quick GELU, which open_clip sets for both towers at once.
_ACT_KWARGS: dict[str, dict[str, Any] | None] = {"gelu": None, "gelu_pytorch_tanh": {"approximate": "tanh"}}
_CAPTIONS = 3
_CODE = """\
import open_clip
import torch

model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
with torch.inference_mode():
    features = model.eval().encode_image(preprocess(image).unsqueeze(0))
"""


class Towers(NamedTuple):
    """What a contrastive run has trained in addition to its trunk."""

    projection: Tensor  # of pooled features, without bias, [D, W] as nn.Linear has it
    text_config: dict[str, Any]  # open_clip's `text_cfg`
    text: dict[str, Tensor]  # weights of open_clip's TextTransformer, by its own keys
    logit_scale: Tensor  # the logarithm of the factor of cosines, a scalar


def build_pair(tower: TimmTower, towers: Towers, side: int) -> tuple[nn.Module, dict[str, Any]]:
    """open_clip's CustomTextCLIP for images of `side` pixels, in evaluation mode, and its `model_cfg`.

    Raises:
        UserError: open_clip has no image tower that computes the same.
    """
    from open_clip.model import CustomTextCLIP

    vision, visual = _image_tower(tower, towers.projection, side)
    config = {"embed_dim": len(towers.projection), "vision_cfg": vision, "text_cfg": towers.text_config}
    model = CustomTextCLIP(**copy.deepcopy(config))
    tensors = {f"visual.{key}": tensor for key, tensor in visual.items()}
    tensors |= {f"text.{key}": tensor for key, tensor in towers.text.items()}
    try:
        model.load_state_dict({**tensors, "logit_scale": towers.logit_scale}, strict=True)
    except RuntimeError:  # norms or scales that open_clip's tower does not have
        raise _no_tower(tower) from None
    return model.eval(), {**config, "custom_text": True}


def write_pair(model: Any, config: dict[str, Any], encoder: Encoder, folder: Path) -> Written:
    """Both towers into `folder`.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, in evaluation mode.
        config: what it is built from, open_clip's `model_cfg`.
        encoder: its image tower, or what gives the same features.
    """
    save_weights(model, folder / "open_clip_model.safetensors")
    mean, std = list(encoder.images.mean), list(encoder.images.std)
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    shape, generator = (_CAPTIONS, model.context_length), torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.vocab_size, shape, generator=generator)
    with torch.inference_mode():
        expected = model.encode_text(tokens)

    def text_difference(path: Path) -> float:
        read = _load(path)
        if not torch.equal(read.logit_scale, model.logit_scale):
            return float("inf")
        return float((read.encode_text(tokens) - expected).abs().max())

    pooling = "The encoder's feature is the image embedding, after the projection: `encode_image`, not normalised."
    return Written("open_clip pair of towers", pooling, _CODE, _read, text_difference)


def _write(encoder: Encoder, folder: Path) -> Written:
    spec = encoder.requested
    if spec.layer is not None or spec.pool is not None:
        allowed = "--layer and --pool with --format onnx"
        raise UserError("--format open_clip holds whole towers", allowed=allowed, fix="omit --layer and --pool")
    kind, _, name = spec.spec.partition(":")
    if kind == "open_clip":
        import open_clip

        model = load_clip(name, spec.weights)
        return write_pair(model, open_clip.get_model_config(name) or {}, encoder, folder)
    if encoder.text is None:
        raise UserError(
            f"the encoder {encoder.name!r} has no text tower, which --format open_clip requires",
            allowed="a run of train clip or train lit; open_clip:NAME with --weights FILE",
            fix=f"train a text tower (`train lit {spec.spec} --beton OUT --out RUN`) and export run:RUN, or export the "
            "image tower alone: --format timm, hf or onnx",
        )
    text, joint = cast(tuple[Any, Any], encoder.text().modules)
    projection = joint.projection
    towers = Towers(projection.weight, _text_config(text), text.state_dict(), joint.log_scale[0])
    model, config = build_pair(timm_tower(encoder, "open_clip"), towers, encoder.images.side)
    return write_pair(model, config, encoder, folder)._replace(
        pooling="`encode_image` gives the encoder's feature after the projection into the texts' space, not "
        f"normalised. {_tokenization(encoder, text.vocab_size)}",
        expected=lambda images: projection(encoder(images)),
        projected=len(projection.weight),
    )


def _load(folder: Path) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


def _read(folder: Path) -> Features:
    return _load(folder).encode_image


def _tokenization(encoder: Encoder, vocabulary: int) -> str:
    """How texts become the tower's tokens: CLIP's by open_clip itself, all others framed as in train/text_tower.py."""
    assert encoder.checkpoint is not None
    data = json.loads((encoder.checkpoint.parent.parent / "data.json").read_bytes())
    if data["tokenizer"] == CLIP:
        return 'Texts are tokenized by `open_clip.get_tokenizer("local-dir:" + folder)`.'
    return (
        f"Texts are not tokenized by open_clip's own tokenizer, but by the run's, `{data['tokenizer']}` (fingerprint "
        f"`{data['tokenizer_fingerprint']}`): {vocabulary - 2}, the ids in order, {vocabulary - 1}, zeros."
    )


def _text_config(tower: Any) -> dict[str, int]:
    """open_clip's `text_cfg` of a text tower of train/text_tower.py."""
    blocks = tower.transformer.resblocks
    return {
        "context_length": tower.context_length,
        "vocab_size": tower.vocab_size,
        "width": tower.token_embedding.weight.shape[1],
        "heads": blocks[0].attn.num_heads,
        "layers": len(blocks),
    }


def _image_tower(tower: TimmTower, projection: Tensor, side: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`vision_cfg`, and the weights of open_clip's `visual`, for pooled features that `projection` [D, W] projects."""
    net = tower.net
    if isinstance(net, VisionTransformer):
        if is_plain(net) and ACTIVATIONS[type(cast(Any, net.blocks)[0].mlp.act)] in _ACT_KWARGS:
            return _vit(net, projection, side)
    elif not tower.arguments:
        config = {"image_size": side, "timm_model_name": tower.architecture, "timm_pool": "", "timm_proj": "linear"}
        trunk = {f"trunk.{key}": tensor for key, tensor in net.state_dict().items()}
        return config, {**trunk, "head.proj.weight": projection}
    raise _no_tower(tower)


def _no_tower(tower: TimmTower) -> UserError:
    return UserError(
        f"open_clip has no image tower like {tower.architecture!r} with {tower.arguments}",
        allowed="a ViT with class token, learned positions and GELU, or a timm model without arguments "
        "(train.model.trunk_args: {})",
        fix="export the image tower alone: --format timm, hf or onnx",
    )


def _vit(net: VisionTransformer, projection: Tensor, side: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    block = cast(Any, net.blocks)[0]
    config: dict[str, Any] = {
        "image_size": side,
        "patch_size": cast(Any, net.patch_embed).patch_size[0],
        "layers": len(net.blocks),
        "width": net.embed_dim,
        "head_width": net.embed_dim // block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / net.embed_dim,
        "pool_type": "tok" if net.global_pool == "token" else "avg",
        "no_ln_pre": not isinstance(net.norm_pre, nn.LayerNorm),
        "norm_kwargs": {"eps": cast(nn.LayerNorm, net.norm).eps},
        "act_kwargs": _ACT_KWARGS[ACTIVATIONS[type(block.mlp.act)]],
    }
    tensors = {key.replace("in_proj.", "in_proj_"): tensor for key, tensor in renamed(net.state_dict(), _NAMES).items()}
    positions = tensors["positional_embedding"][0].clone()  # [1 + N, W]
    # open_clip's patch convolution has no bias: added to the patches' positions, it makes the same sums.
    if (bias := tensors.pop("conv1.bias", None)) is not None:
        positions[1:] += bias
    class_embedding = tensors["class_embedding"].flatten()
    tensors |= {"proj": projection.T, "class_embedding": class_embedding, "positional_embedding": positions}
    return config, tensors


OPEN_CLIP = Format("open_clip", "open_clip", _write)
