"""Hugging Face's form: config.json, model.safetensors, preprocessor_config.json.

A timm ViT that CLIPVisionModel or ViTModel can hold becomes one (vit_classes.py); all other timm models are wrapped (TimmWrapperModel).
"""

from pathlib import Path
from typing import Any

import torch

from labels.errors import UserError
from labels.storage import write_json
from train.encoders.encoder import Encoder, ImageForm
from train.export.format import Features, Format, TimmTower, Written, timm_tower
from train.export.timm import image_config
from train.export.vit_classes import transformers_vit
from train.pretrained import import_transformers

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
    ("ViTModel", "token"): "The encoder's feature is the class token after the final norm: the first of `last_hidden_state`.",
    ("TimmWrapperModel", ""): "The encoder's feature is `pooler_output`: timm's own pool, `{pool}`.",
}


def write_processor(folder: Path, form: ImageForm) -> None:
    """preprocessor_config.json: shorter side to S by bicubic resampling, centre crop, mean and std."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": form.side}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": form.side, "width": form.side},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(form.mean), "image_std": list(form.std),
        },
    )  # fmt: skip


def _write(encoder: Encoder, folder: Path) -> Written:
    if encoder.asked.spec.startswith("hf:"):
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
        architecture=tower.architecture, model_args=tower.arguments or None, num_labels=0, pretrained_cfg=image_config(tower.net, form)
    )
    model = transformers.TimmWrapperModel(config)
    model.timm_model.load_state_dict(tower.net.state_dict(), strict=True)
    return model.eval()


def _read(folder: Path, name: str, pool: str) -> Features:
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model = getattr(import_transformers(), name).from_pretrained(folder, local_files_only=True, weights_only=True, **options).eval()

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
