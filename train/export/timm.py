"""timm's own form: model.safetensors with timm's keys, config.json as its hub format has it (timm/models/_hub.py)."""

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from labels.storage import write_json
from train.encoders.encoder import Encoder, ImageForm
from train.export.format import Features, Format, Written, timm_tower

_KEPT = ("first_conv", "classifier", "fixed_input_size")
_CODE = """\
import timm
import torch

model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.inference_mode():
    features = model(transform(image.convert("RGB")).unsqueeze(0))
"""


def image_config(net: Any, form: ImageForm) -> dict[str, Any]:
    """timm's `pretrained_cfg`: the images that the net wants, and where its first and last layers are."""
    own = getattr(net, "pretrained_cfg", {})
    return {
        **{key: own[key] for key in _KEPT if own.get(key) is not None},
        "num_classes": 0,
        "input_size": [3, form.side, form.side],
        "mean": list(form.mean),
        "std": list(form.std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _write(encoder: Encoder, folder: Path) -> Written:
    tower = timm_tower(encoder, "timm")
    save_file(
        {key: tensor.contiguous() for key, tensor in tower.net.state_dict().items()}, folder / "model.safetensors"
    )
    write_json(
        folder / "config.json",
        {
            "architecture": tower.architecture,
            "num_classes": 0,
            "num_features": int(tower.net.num_features),
            "model_args": {**tower.arguments, "num_classes": 0},
            "pretrained_cfg": image_config(tower.net, encoder.images),
        },
    )
    pooling = f"The model's own output is the encoder's feature: its pool is `{encoder.description['pool']}`."
    return Written(f"timm {tower.architecture}", pooling, _CODE, _read)


def _read(folder: Path) -> Features:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


TIMM = Format("timm", "timm", _write)
