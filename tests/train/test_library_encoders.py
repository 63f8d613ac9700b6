"""Encoders of open_clip and transformers, from local files with random weights: the library's own outputs, and what is
refused.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

from labels.storage import UserError
from run_factory import VIT, write_hf
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder

TINY: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}


def refusal(spec: str, **asked) -> str:
    with pytest.raises(UserError) as caught:
        load_encoder(EncoderSpec(spec, **asked))
    return str(caught.value)


@pytest.fixture(scope="module", params=["tiny-vit", "tiny-resnet", "tiny-timm"])
def clip(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A tiny architecture made known to open_clip, as by a configuration file of the user's, and its weights."""
    folder = tmp_path_factory.mktemp("clip")
    vision: dict[str, Any] = {
        "tiny-vit": TINY,
        "tiny-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "tiny-timm": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"},
    }[request.param]
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    name = request.param
    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model: Any = open_clip.create_model(name).eval()
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return name, folder / "open_clip_model.safetensors", model


def test_open_clip_gives_its_own_embedding(clip) -> None:
    name, file, model = clip
    encoder = load_encoder(EncoderSpec(f"open_clip:{name}", str(file)))
    images = torch.randn(2, 3, encoder.images.side, encoder.images.side)
    assert torch.allclose(encoder(images), model.encode_image(images), atol=1e-5) and encoder.width == 12
    assert encoder.describe()["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert encoder.describe()["layer"] == "embedding, after the projection"


def test_open_clips_last_layer_is_what_it_projects(clip) -> None:
    name, file, model = clip
    if name == "tiny-resnet":
        encoder = load_encoder(EncoderSpec(f"open_clip:{name}", str(file), -1))
        images = torch.randn(2, 3, 64, 64)
        maps = model.visual.forward_intermediates(images, indices=[4], intermediates_only=True)["image_intermediates"][
            0
        ]
        assert torch.allclose(encoder(images), maps.mean((2, 3)), atol=1e-5)
        assert "has no class token" in refusal(f"open_clip:{name}", weights=str(file), pool="cls")
        return
    encoder = load_encoder(EncoderSpec(f"open_clip:{name}", str(file), -1, "cls"))
    images = torch.randn(2, 3, encoder.images.side, encoder.images.side)
    features = encoder(images)
    if name == "tiny-vit":
        assert torch.allclose(features @ model.visual.proj, model.encode_image(images), atol=1e-5)
    else:
        assert torch.allclose(features, model.visual.trunk.forward_features(images)[:, 0], atol=1e-5)
    assert encoder.describe()["norm"] == "final norm"


def test_open_clip_refusals(clip, tmp_path: Path) -> None:
    name, file, model = clip
    assert "open_clip has no model named 'ViT-Z'" in refusal("open_clip:ViT-Z", weights=str(file))
    text = refusal(f"open_clip:{name}")
    assert "has no weights" in text and f"--encoder open_clip:{name} --weights FILE" in text
    tensors = dict(model.state_dict())
    tensors.pop("logit_scale")
    torch.save(tensors, tmp_path / "cut.pt")
    assert "missing (1): logit_scale" in refusal(f"open_clip:{name}", weights=str(tmp_path / "cut.pt"))


def hf_models() -> dict[str, Any]:
    torch.manual_seed(2)
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 64,
    }
    return {
        "vit": transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**VIT)),
        "mae": transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT)),
        "clip": transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=12)),
        "clip-vision": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)),
        "convnext": transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32)
        ),
    }


@pytest.mark.parametrize("name", ["vit", "dinov2", "mae", "clip", "clip-vision", "convnext"])
def test_hf_gives_the_models_own_features(tmp_path: Path, name: str) -> None:
    model = hf_models()[name].eval()
    encoder = load_encoder(f"hf:{write_hf(tmp_path / name, model)}")
    assert encoder.images == (32, (0.5,) * 3, (0.25,) * 3)
    images = torch.randn(2, 3, 32, 32)
    vision = getattr(model, "vision_model", model)
    if name == "mae":
        model.config.mask_ratio = 0.0  # the order of the patches is drawn, the class token does not see it
    found = vision(pixel_values=images)
    pooled = getattr(found, "pooler_output", None)
    assert torch.allclose(encoder(images), pooled if pooled is not None else found.last_hidden_state[:, 0], atol=1e-5)


def test_layers_of_hf_models(tmp_path: Path) -> None:
    model = hf_models()["dinov2"].eval()
    folder = write_hf(tmp_path / "dino", model)
    images = torch.randn(2, 3, 32, 32)
    states = model(pixel_values=images, output_hidden_states=True).hidden_states
    for layer, state in ((1, states[1]), (-1, states[2])):
        tokens = model.layernorm(state)
        for pool, expected in (("cls", tokens[:, 0]), ("avg", tokens[:, 1:].mean(1))):
            encoder = load_encoder(EncoderSpec(f"hf:{folder}", None, layer, pool))
            assert torch.allclose(encoder(images), expected, atol=1e-5)
    conv = write_hf(tmp_path / "conv", hf_models()["convnext"])
    assert load_encoder(EncoderSpec(f"hf:{conv}", layer=1)).width == 8
    assert "has no layer 3" in refusal(f"hf:{folder}", layer=3)


def test_hf_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    assert "has no config.json" in refusal(f"hf:{folder}")
    model = transformers.ViTModel(transformers.ViTConfig(**VIT))
    model.save_pretrained(folder)
    text = refusal(f"hf:{folder}")
    assert "has no preprocessor_config.json" in text and "save the image processor next to the model" in text
    write_hf(folder, model, size={})
    assert "preprocessor_config.json cannot be loaded by transformers: size must" in refusal(f"hf:{folder}")
    write_hf(folder, model, crop_size={"height": 32, "width": 32})
    assert load_encoder(f"hf:{folder}").images.side == 32
    weights = folder / "model.safetensors"
    save_file({"nothing": torch.zeros(1)}, weights, metadata={"format": "pt"})
    assert "weights are missing or of another shape" in refusal(f"hf:{folder}")
    weights.write_bytes(b"cut")
    assert "cannot be loaded by transformers" in refusal(f"hf:{folder}")
    weights.unlink()
    assert "has no weights" in refusal(f"hf:{folder}")
    text_model = transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    assert "which takes no images" in refusal(f"hf:{write_hf(tmp_path / 'bert', text_model)}")


def test_a_pickle_in_an_hf_folder_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("the pickle was run",))

    folder = write_hf(tmp_path / "m", transformers.ViTModel(transformers.ViTConfig(**VIT)))
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    assert "cannot be loaded by transformers" in refusal(f"hf:{folder}")
