"""open_clip's own form, both towers: open_clip_config.json and open_clip_model.safetensors, for
open_clip.create_model("local-dir:...").

D width of the common space.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from labels.storage import UserError, write_json
from train.encoders.encoder import Encoder
from train.encoders.libraries import load_clip
from train.export.format import Features, Format, TimmTower, Written, timm_tower
from train.export.hf import ACTIVATIONS, is_plain
from train.text_tower import CLIP

# ---- open_clip_towers: A trunk and its projection as open_clip's image tower: `vision_cfg` and weights.
#
# A plain ViT becomes open_clip's own VisionTransformer, whose patch convolution has no bias: a bias is added to the
# patches' positions, where it makes the same sums. A convolutional trunk is a timm model inside open_clip, which takes
# no arguments but the name. W trunk width, D width of the common space, N patches.


_INNER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
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
    tensors = {f"visual.{key}": tensor for key, tensor in visual.items()} | {
        f"text.{key}": tensor for key, tensor in towers.text.items()
    }
    try:
        model.load_state_dict({**tensors, "logit_scale": towers.logit_scale}, strict=True)
    except RuntimeError:  # norms or scales that the tower there does not have
        raise _refused(tower) from None
    return model.eval(), {**config, "custom_text": True}


def text_config(tower: Any) -> dict[str, int]:
    """open_clip's `text_cfg` of a text tower as train/text_tower.py builds it."""
    block = tower.transformer.resblocks[0]
    return {
        "context_length": tower.context_length,
        "vocab_size": tower.vocab_size,
        "width": tower.token_embedding.weight.shape[1],
        "heads": block.attn.num_heads,
        "layers": len(tower.transformer.resblocks),
    }


def image_tower(tower: TimmTower, projection: Tensor, side: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`vision_cfg`, and the weights of open_clip's `visual`, for a trunk whose pooled features are projected without a
    bias.

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
        fix="--format timm, hf or onnx hold the image tower alone",
    )


def _vit(net: VisionTransformer, projection: Tensor, side: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    block, activation = cast(Any, net.blocks)[0], ACTIVATIONS[type(cast(Any, net.blocks)[0].mlp.act)]
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
        "act_kwargs": _ACT_KWARGS[activation],
    }
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


_CAPTIONS = 3
_CODE = """\
import open_clip
import torch

model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
with torch.inference_mode():
    features = model.eval().encode_image(preprocess(image).unsqueeze(0))
"""


def _write(encoder: Encoder, folder: Path) -> Written:
    if encoder.requested.layer is not None or encoder.requested.pool is not None:
        raise UserError(
            "--format open_clip holds whole towers",
            allowed="--layer and --pool with --format onnx",
            fix="leave them out",
        )
    kind, _, name = encoder.requested.spec.partition(":")
    if kind == "open_clip":
        import open_clip

        model = load_clip(name, encoder.requested.weights)
        return write_pair(model, open_clip.get_model_config(name) or {}, encoder, folder)
    if encoder.text is None:
        raise UserError(
            f"the encoder {encoder.name!r} has no text tower, as --format open_clip wants it",
            allowed="a run of train clip or train lit; open_clip:NAME with --weights FILE",
            fix=f"train lit --encoder {encoder.requested.spec} gives it one; --format timm, hf or onnx hold the image tower alone",
        )
    text, joint = encoder.text().modules
    towers = Towers(joint.projection.weight, text_config(text), text.state_dict(), joint.log_scale[0])  # type: ignore[union-attr, index, arg-type]
    model, config = build_pair(timm_tower(encoder, "open_clip"), towers, encoder.images.side)
    written = write_pair(model, config, encoder, folder)
    pooling = (
        "`encode_image` gives the encoder's feature after the projection into the texts' space, not normalised. "
        f"{_texts(encoder, int(model.vocab_size))}"  # type: ignore[arg-type]
    )
    projection: Any = joint.projection
    return written._replace(
        pooling=pooling, wanted=lambda images: projection(encoder(images)), projected=len(projection.weight)
    )


def _texts(encoder: Encoder, vocabulary: int) -> str:
    """How texts become the tower's tokens: CLIP's are open_clip's own, all others are framed as train/text_tower.py
    says.
    """
    assert encoder.checkpoint is not None
    data = json.loads((encoder.checkpoint.parent.parent / "data.json").read_bytes())
    if data["tokenizer"] == CLIP:
        return 'Texts are tokenized by `open_clip.get_tokenizer("local-dir:" + folder)`.'
    return (
        f"Texts are not tokenized by open_clip's own tokenizer, but by the run's, `{data['tokenizer']}` (fingerprint "
        f"`{data['tokenizer_fingerprint']}`): {vocabulary - 2}, the ids in order, {vocabulary - 1}, zeros."
    )


def write_pair(model: Any, config: dict[str, Any], encoder: Encoder, folder: Path) -> Written:
    """Both towers into `folder`.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, in evaluation mode.
        config: what it is built from, open_clip's `model_cfg`.
        encoder: its image tower, or what gives the same features.
    """
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    form = encoder.images
    preprocess = {"mean": list(form.mean), "std": list(form.std), "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    tokens = torch.randint(
        1, model.vocab_size, (_CAPTIONS, model.context_length), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        wanted = model.encode_text(tokens)

    def text(where: Path) -> float:
        read = _load(where)
        if not torch.equal(read.logit_scale, model.logit_scale):
            return float("inf")
        return float((read.encode_text(tokens) - wanted).abs().max())

    pooling = "The encoder's feature is the image embedding, after the projection: `encode_image`, not normalised."
    return Written("open_clip pair of towers", pooling, _CODE, _read, text)


def _load(folder: Path) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


def _read(folder: Path) -> Features:
    return _load(folder).encode_image


OPEN_CLIP = Format("open_clip", "open_clip", _write)
