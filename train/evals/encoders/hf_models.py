"""Encoders from a local folder in Hugging Face's form: config.json, model.safetensors, preprocessor_config.json. No code in it is run.

The features are the model's `pooler_output`, or, where it has none, the class token or else the mean of its last tokens; `--layer` and
`--pool` read `hidden_states`. A CLIP-like folder with both towers gives its image tower, before the projection.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labels.errors import UserError
from train.encoders.encoder import Encoder, EncoderSpec, ImageForm, finish
from train.evals.encoders.readout import Blocks, read_out
from train.pretrained import check_whole, load_folder

_NORMS = ("layernorm", "post_layernorm", "norm")


def load_hf(asked: EncoderSpec, folder: Path) -> Encoder:
    """The vision model in `folder`.

    Raises:
        UserError: transformers is missing; the folder lacks configuration or weights; weights do not fit; it is no vision model.
    """
    for name, mend in (
        ("config.json", "give hf: a folder that save_pretrained wrote, or that was downloaded whole"),
        ("preprocessor_config.json", "save the image processor beside the model: it says size, mean and std"),
    ):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}", allowed="hf:DIR, a folder in Hugging Face's form", mend=mend)
    form = image_form(folder)
    model = load_vision_model(folder)
    net, words = _Pooled(model), {"pool": "the model's own", "layer": "last"}
    if asked.layer is not None or asked.pool is not None:
        net, words = read_out(asked, model, _blocks(model, form.side))
    words = {"architecture": type(model).__name__, "architecture_args": {}, "checkpoint": str(folder), **words}
    return finish(asked, net, form, words)


def load_vision_model(folder: Path) -> Any:
    """transformers' vision model in `folder`, its image tower where it has two, in evaluation mode on the CPU.

    Raises:
        UserError: transformers is missing; the folder lacks weights, or some of them; it holds no vision model.
    """
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has no weights",
            allowed="model.safetensors, or pytorch_model.bin",
            mend="download the weights too; after git clone: git lfs pull",
        )
    model, info = load_folder("AutoModel", folder, "a vision model")
    if any(key.startswith("pooler.") for key in info["missing_keys"]):  # a pooler that the weights lack would be random
        model, info = load_folder("AutoModel", folder, "a vision model", add_pooling_layer=False)
    check_whole(folder, info)
    model = getattr(model, "vision_model", model)
    if getattr(model.config, "model_type", "") == "vit_mae":
        model.config.mask_ratio = 0.0  # else three quarters of the patches are dropped
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise UserError(f"{folder} holds a {type(model).__name__}, which takes no images", allowed="a vision model")
    return model.eval()


class _Pooled(nn.Module):
    """The model's own pooled output [B, W]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = model

    def forward(self, images: Tensor) -> Tensor:
        found = self.net(pixel_values=images)
        pooled = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # convolutional models give [B, W, 1, 1]
        tokens = found.last_hidden_state
        if tokens.ndim == 4:
            return tokens.mean((2, 3))
        return tokens[:, 0] if _prefix(self.net, tokens.shape[1], images.shape[-1]) else tokens.mean(1)


def _blocks(model: Any, side: int) -> Blocks:
    with torch.inference_mode():
        states = model(pixel_values=torch.zeros(1, 3, side, side), output_hidden_states=True).hidden_states
    if not states or states[-1].ndim not in (3, 4):
        raise UserError(f"{type(model).__name__} gives no hidden states", mend="leave --layer and --pool out")
    grid = states[-1].ndim == 4
    norm = None if grid else next((getattr(model, name) for name in _NORMS if isinstance(getattr(model, name, None), nn.Module)), None)

    def tokens(images: Tensor, block: int) -> Tensor:
        found = model(pixel_values=images, output_hidden_states=True).hidden_states[block + 1]  # the first are the embeddings
        if grid:
            return found.flatten(2).transpose(1, 2)
        return norm(found) if norm is not None else found

    prefix = 0 if grid else _prefix(model, states[-1].shape[1], side)
    return Blocks(len(states) - 1, prefix, tokens, "final norm" if norm is not None else "none", "cls" if prefix else "avg")


def _prefix(model: Any, tokens: int, side: int) -> int:
    """Tokens before the patches: what is left beyond a whole grid of patches."""
    patch = getattr(model.config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    return max(0, tokens - (side // patch) ** 2) if patch else 0


def image_form(folder: Path) -> ImageForm:
    """Side, mean and std of the folder's image processor."""
    file = folder / "preprocessor_config.json"
    try:
        content = json.loads(file.read_bytes())
        size = content.get("crop_size") or content["size"]
        if isinstance(size, dict):
            size = size.get("shortest_edge") or size["height"]
        mean, std = content.get("image_mean") or [0.5] * 3, content.get("image_std") or [0.5] * 3
        return ImageForm(int(size), tuple(map(float, mean)), tuple(map(float, std)))
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} gives no size, mean and std: {error!r}", allowed="size or crop_size, image_mean, image_std") from None
