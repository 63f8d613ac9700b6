"""An exported tower inside transformers' LLaVA class, with tiny random language models: forward, generate, a projector
step, saving.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from labels.config import dump_yaml
from labels.settings import Model, Pipeline, Train
from labels.storage import UserError
from train.encoders.encoder import EncoderSpec
from train.export.export import export_encoder
from train.llava.train import build_llava, load_tower
from train.model import build_trunk

pytestmark = pytest.mark.usefixtures("one_thread")
ARGS: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
WORDS, IMAGE = 20, 20  # the image's token is one beyond the vocabulary


@pytest.fixture(scope="module", params=["vit_b16", "vit_tiny_patch16_224"])
def exported(request, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("llava") / "run"
    settings = Model(trunk=request.param, trunk_args=ARGS, image_size=32)
    (run / "checkpoints" / "samples-000000000016").mkdir(parents=True)
    dump_yaml(run / "config.yaml", Pipeline(train=Train(model=settings)))
    torch.manual_seed(0)
    save_file(build_trunk(settings).state_dict(), run / "checkpoints" / "samples-000000000016" / "trunk.safetensors")
    export_encoder(EncoderSpec(f"run:{run}"), "hf", run.parent / "hf")
    return run.parent / "hf"


def language_model(kind: str) -> Any:
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied llama")
    return transformers.LlamaForCausalLM(config).eval()


def prompt(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[IMAGE] * model.config.image_seq_length, 5, 6]] * 2)
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }


@pytest.mark.parametrize("select", ["default", "full"])
def test_the_projector_gets_the_exported_towers_tokens(exported: Path, select: Any) -> None:
    tower = load_tower(exported).eval()
    model = build_llava(tower, language_model("llama"), image_token_id=IMAGE, select=select).eval()
    inputs = prompt(model)
    assert model.config.image_seq_length == 16 + (select == "full")
    seen: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        model(**inputs)
        states = tower(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states
    wanted = states[-2] if select == "full" else states[-2][:, 1:]
    assert seen[0].shape == (2, model.config.image_seq_length, 24) and torch.equal(seen[0], wanted)


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_forward_generate_train_save(exported: Path, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = build_llava(load_tower(exported), language_model(kind), image_token_id=IMAGE).eval()
    inputs = prompt(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("multi_modal_projector" in name for name in trained)

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained.keys()

    with torch.inference_mode():
        words = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = model(**inputs).logits
    assert words.shape == (2, inputs["input_ids"].shape[1] + 3) and logits.shape[-1] == WORDS + 1
    model.save_pretrained(tmp_path)
    again, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        assert torch.allclose(again.eval()(**inputs).logits, logits, atol=1e-6)


def test_the_image_matters(exported: Path) -> None:
    model = build_llava(load_tower(exported), language_model("llama"), image_token_id=IMAGE).eval()
    inputs = prompt(model)
    with torch.inference_mode():
        one = model(**inputs).logits
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert not torch.allclose(one, other, atol=1e-6)


def refusal(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_towers_that_llava_cannot_take(exported: Path, tmp_path: Path) -> None:
    assert "has no config.json" in refusal(lambda: load_tower(tmp_path))
    export_encoder(EncoderSpec("untrained:timm:test_resnet"), "hf", tmp_path / "resnet")
    text = refusal(lambda: load_tower(tmp_path / "resnet"))
    assert (
        "holds a TimmWrapperModel" in text
        and "class token first" in text
        and "CLIPVisionModel, ViTModel" in text
        and "train.model.trunk" in text
    )
    wrapper: Any = transformers.AutoModel.from_pretrained(tmp_path / "resnet")
    assert "cannot take a TimmWrapperModel" in refusal(
        lambda: build_llava(wrapper, language_model("llama"), image_token_id=IMAGE)
    )
    text = refusal(lambda: build_llava(load_tower(exported), language_model("llama"), image_token_id=IMAGE, layer=-4))
    assert "has no hidden states -4" in text and "-3 to 2" in text


def test_a_tower_without_all_its_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    """transformers draws what is missing at random, and only warns."""
    for name in ("part", "none", "pointer", "pickle"):
        shutil.copytree(exported, tmp_path / name)
    file = "model.safetensors"
    tensors = load_file(exported / file)
    gone = sorted(tensors)[-1]
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != gone},
        tmp_path / "part" / file,
        metadata={"format": "pt"},
    )
    text = refusal(lambda: load_tower(tmp_path / "part"))
    assert "1 weights are missing or of another shape, the first:" in text and gone.rpartition(".")[2] in text
    (tmp_path / "none" / file).unlink()
    text = refusal(lambda: load_tower(tmp_path / "none"))
    assert "has no weights" in text and "git lfs pull" in text
    (tmp_path / "pointer" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert f"git lfs pull: {file} is a pointer to the weights" in refusal(lambda: load_tower(tmp_path / "pointer"))
    (tmp_path / "pickle" / file).unlink()
    torch.save({"weight": Touches(tmp_path / "run")}, tmp_path / "pickle" / "pytorch_model.bin")
    text = refusal(lambda: load_tower(tmp_path / "pickle"))
    assert (
        "Weights only load failed" in text
        and "take its weights as safetensors" in text
        and not (tmp_path / "run").exists()
    )


class Touches:
    """What a hostile file holds: unpickled, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.file}",)
