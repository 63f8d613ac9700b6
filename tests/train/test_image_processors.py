"""Encoders `hf:DIR` take images as the library's own image processor gives them, whatever its flags."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from labels.storage import UserError
from run_factory import VIT, write_hf
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder
from train.evals.features import Normaliser

SQUARE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).eval()


def with_processor(folder: Path, model: Any, kind: str, flags: dict[str, Any]) -> Any:
    """A folder of the model with the library's processor, which is returned."""
    model.save_pretrained(folder)
    processor = getattr(transformers, kind)(**flags)
    processor.save_pretrained(folder)
    return transformers.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("ViTImageProcessor", {"size": SQUARE}),
        ("ViTImageProcessor", {"size": 32, "do_normalize": False}),
        ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False}),
        ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
        ("ViTImageProcessor", {"size": SQUARE, "rescale_factor": 1 / 128, "image_mean": [0.1, 0.5, 0.9]}),
        ("ViTImageProcessor", {"size": SQUARE, "resample": 0, "do_convert_rgb": True}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 32, "do_flip_channel_order": False}),
        ("EfficientNetImageProcessor", {"size": SQUARE, "rescale_factor": 1 / 127.5, "rescale_offset": True}),
        ("EfficientNetImageProcessor", {"size": SQUARE, "include_top": True, "image_std": [0.2, 0.3, 0.4]}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.8}),
        ("LevitImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 32}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "do_center_crop": False}),
        ("BitImageProcessor", {"do_resize": False, "crop_size": SQUARE}),
        ("BitImageProcessor", {"do_resize": False, "do_center_crop": False}),  # the model's own size
    ],
)
@pytest.mark.parametrize("layer", [None, 1])
def test_features_are_those_of_the_librarys_own_pixels(
    tmp_path: Path, model: Any, kind: str, flags: dict[str, Any], layer: int | None
) -> None:
    processor = with_processor(tmp_path, model, kind, flags)
    encoder = load_encoder(EncoderSpec(f"hf:{tmp_path}", None, layer))
    assert encoder.images.side == 32
    # Resizing and cropping are the same for all encoders: an image that they leave as it is.
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    own = {name: False for name in ("do_resize", "do_center_crop") if getattr(processor, name, False)}
    expected_images = processor(images=Image.fromarray(pixels), return_tensors="pt", **own)["pixel_values"]
    found = encoder(Normaliser(encoder.images, torch.device("cpu"))(torch.from_numpy(pixels)[None]))
    output = model(pixel_values=expected_images, output_hidden_states=True)
    expected = output.last_hidden_state[:, 0] if layer is None else model.layernorm(output.hidden_states[1])[:, 0]
    assert torch.allclose(found, expected, atol=2e-4)


def test_an_order_of_channels_is_a_part_of_the_description(tmp_path: Path, model: Any) -> None:
    descriptions = []
    for name, flips in (("a", True), ("b", False)):
        flags = {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "do_flip_channel_order": flips}
        with_processor(tmp_path / name, model, "MobileViTImageProcessor", flags)
        descriptions.append(load_encoder(f"hf:{tmp_path / name}").describe() | {"checkpoint": ""})
    assert descriptions[0].pop("channels") == "BGR" and descriptions[0] == descriptions[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"size": {"height": 32, "width": 48}}, "gives square images the shape [1, 3, 32, 48]"),
        ({"image_processor_type": "NoSuchProcessor"}, "cannot be loaded by transformers"),
        (
            {"image_processor_type": "NoSuchProcessor", "size": None},
            "save the image processor of the model there again",
        ),
    ],
)
def test_processors_that_cannot_be_taken(tmp_path: Path, model: Any, words: dict[str, Any], expected: str) -> None:
    write_hf(tmp_path, model, **words)
    with pytest.raises(UserError) as caught:
        load_encoder(f"hf:{tmp_path}")
    assert expected in str(caught.value) and "preprocessor_config.json" in str(caught.value)


def test_a_size_that_the_model_does_not_take_is_refused(tmp_path: Path, model: Any) -> None:
    write_hf(tmp_path, model, side=48)
    with pytest.raises(UserError, match="cannot take RGB images of 48 x 48"):
        load_encoder(f"hf:{tmp_path}")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["image_size"] == 32
