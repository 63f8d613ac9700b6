"""Exports: loaded back by their own libraries with the encoder's features, cards whose code runs, and refused
encoders.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import train.cli
import train.export.export as exporting
from doc_commands import own_command, parse
from labels.config import dump_yaml, load_pipeline
from labels.settings import Model, Pipeline, Train
from labels.storage import UserError, whole_folder
from train.encoders.encoder import Encoder, EncoderSpec
from train.encoders.load import load_encoder
from train.evals.features import decode
from train.evals.measure import readout_of
from train.export.export import FORMATS, export_encoder
from train.export.format import Format, Written
from train.export.hf import transformers_vit
from train.model import PRESETS, build_trunk

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
TRUNKS = {
    "clip": Model(trunk="vit_b16", trunk_args=TINY, image_size=32),
    "plain": Model(trunk="vit_tiny_patch16_224", trunk_args=TINY, image_size=32),
    "registers": Model(trunk="vit_tiny_patch16_224", trunk_args={**TINY, "reg_tokens": 2}, image_size=32),
    "convolutional": Model(trunk="test_resnet", image_size=64),
}
HOLDS = {
    "clip": "CLIPVisionModel",
    "plain": "ViTModel",
    "registers": "TimmWrapperModel",
    "convolutional": "TimmWrapperModel",
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Callable[[str], Path]:
    """A run folder with one checkpoint, for a key of TRUNKS."""
    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in made:
            run = tmp_path_factory.mktemp(kind) / "run"
            folder = run / "checkpoints" / "samples-000000000640"
            folder.mkdir(parents=True)
            dump_yaml(run / "config.yaml", Pipeline(train=Train(model=TRUNKS[kind])), exclude={"recipes": True})
            data = {
                "beton": "/secret/place",
                "labels": "/secret/place",
                "fingerprints": {"labels": "abc123"},
                "samples": 640,
            }
            (run / "data.json").write_text(json.dumps(data))
            torch.manual_seed(1)
            trunk = build_trunk(TRUNKS[kind])
            for (
                parameter
            ) in trunk.parameters():  # biases and norms begin as 0 and 1: a mapping that mixes them up would not show
                torch.nn.init.normal_(parameter, std=0.2)
            save_file(trunk.state_dict(), folder / "trunk.safetensors")
            made[kind] = run
        return made[kind]

    return write


def refusal(spec: EncoderSpec | str, name: str, out: Path, results: tuple[Path, ...] = ()) -> str:
    asked = EncoderSpec(spec) if isinstance(spec, str) else spec
    with pytest.raises(UserError) as caught:
        export_encoder(asked, name, out, results)
    assert not list(out.parent.glob("*.partial"))
    return str(caught.value)


def features_by_card(folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The features that the card's own code block computes, run next to the export."""
    assert "photo.jpg" in (folder / "README.md").read_text("utf8")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf8"), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    found: dict[str, Any] = {}
    exec(compile(code.replace("photo.jpg", str(image)), "card", "exec"), found)
    return torch.as_tensor(found["features"])


def own_features(encoder: Encoder, image: Path) -> torch.Tensor:
    """The encoder's features of the image as this project decodes and resizes it."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in encoder.images[1:])
    pixels = torch.from_numpy(decode(image.read_bytes(), encoder.images.side).copy()).permute(2, 0, 1)
    return encoder(((pixels.float() / 255 - mean) / std)[None])


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth, and not square: a crop or a resampling of another kind would show."""
    x, y = np.meshgrid(np.linspace(0, 6, 96), np.linspace(0, 6, 70))
    waves = np.stack([np.sin(x + k * y) for k in range(3)], axis=-1)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray((127 * (waves + 1)).astype(np.uint8)).save(path)
    return path


SIZES = {"square": (77, 77), "wide": (150, 77), "tall": (76, 131), "odd": (33, 40), "long": (400, 35), "small": (9, 20)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise, that every other filter, crop, size, mean or order of channels changes; and kinds of images."""
    folder, dice = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    wide = Image.open(folder / "wide.png")
    wide.convert("L").save(folder / "grey.png")
    wide.convert("P").save(folder / "palette.png")
    alpha = Image.fromarray(dice.integers(0, 256, (77, 150), dtype=np.uint8))
    wide.putalpha(alpha)
    wide.save(folder / "alpha.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", ["timm", "hf", "onnx"])
def test_an_image_file_through_the_librarys_own_preprocessing(
    run_of, kind: str, name: str, tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files' features by the card's code are the encoder's own to 1e-4."""
    if name == "onnx" and kind != "clip":
        pytest.skip("the same code for every trunk")
    encoder = load_encoder(f"run:{run_of(kind)}")
    export_encoder(encoder.requested, name, tmp_path / "out")
    for file in files:
        found, wanted = features_by_card(tmp_path / "out", file, monkeypatch), own_features(encoder, file)
        assert (found - wanted).abs().max() <= 1e-4, file.name


def test_a_large_jpeg_is_halved_by_its_decoder_as_in_evaluations(
    run_of, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.open(photo).resize((500, 380)).save(tmp_path / "large.jpg", quality=95)
    encoder = load_encoder(f"run:{run_of('clip')}")
    export_encoder(encoder.requested, "timm", tmp_path / "out")
    found = features_by_card(tmp_path / "out", tmp_path / "large.jpg", monkeypatch)
    wanted = own_features(encoder, tmp_path / "large.jpg")
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max(), "pixels within two levels"


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("name", ["timm", "hf"])
def test_a_run_is_loaded_back(
    run_of, kind: str, name: str, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(f"run:{run_of(kind)}")
    exported = export_encoder(encoder.requested, name, tmp_path / "out")
    assert exported["difference"] <= 1e-5 and (name == "timm" or exported["holds"] == f"transformers {HOLDS[kind]}")
    assert json.loads((tmp_path / "out" / "export.json").read_bytes()) == exported
    assert (
        len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    )  # weights that others may read as they may the card
    found, wanted = features_by_card(tmp_path / "out", photo, monkeypatch), own_features(encoder, photo)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4


def test_timms_keys_are_timms(run_of, tmp_path: Path) -> None:
    export_encoder(EncoderSpec(f"run:{run_of('clip')}"), "timm", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == build_trunk(TRUNKS["clip"]).state_dict().keys()
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["architecture"] == "vit_base_patch16_clip_224" and config["model_args"]["global_pool"] == "avg"
    built = timm.create_model(
        config["architecture"], checkpoint_path=str(tmp_path / "out" / "model.safetensors"), **config["model_args"]
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(built(images), load_encoder(f"run:{run_of('clip')}")(images))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_rebuilt_from_json(name: str) -> None:
    from train.model import trunk_arguments

    model = Model(trunk=name)
    architecture, arguments = trunk_arguments(model)
    with torch.device("meta"):
        rebuilt = timm.create_model(architecture, num_classes=0, **json.loads(json.dumps(arguments)))
    assert {key: tensor.shape for key, tensor in rebuilt.state_dict().items()} == {
        key: tensor.shape for key, tensor in timm_on_meta(model).items()
    }


def timm_on_meta(model: Model) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build_trunk(model).state_dict()


@pytest.mark.parametrize(
    ("arguments", "held"),
    [
        ({}, "ViTModel"),
        ({"pre_norm": True}, "CLIPVisionModel"),
        ({"act_layer": "quick_gelu", "pre_norm": True}, "CLIPVisionModel"),
        ({"act_layer": "gelu_tanh"}, "ViTModel"),
        ({"global_pool": "token"}, "ViTModel"),
        ({"qkv_bias": False}, "ViTModel"),
        ({"global_pool": "token", "pre_norm": True}, "CLIPVisionModel"),
        ({"mlp_ratio": 2.0}, "ViTModel"),
        ({"init_values": 1e-2}, None),
        ({"reg_tokens": 1}, None),
        ({"no_embed_class": True}, None),
        ({"qk_norm": True}, None),
        ({"class_token": False}, None),
        ({"fc_norm": True}, None),
        ({"global_pool": "map"}, None),
        ({"act_layer": "relu"}, None),
        ({"pool_include_prefix": True}, None),
        ({"final_norm": False}, None),
        ({"patch_size": (8, 4)}, None),
        ({"pos_embed": "none"}, None),
    ],
)
def test_vits_that_transformers_classes_hold(arguments: dict[str, Any], held: str | None) -> None:
    torch.manual_seed(0)
    net: Any = build_trunk(Model(trunk="vit_tiny_patch16_224", trunk_args={**TINY, **arguments}, image_size=32)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = transformers_vit(net)
    assert (type(model).__name__ if model is not None else None) == held
    if model is not None:
        images = torch.randn(2, 3, 32, 32)
        tokens = model(pixel_values=images).last_hidden_state
        tokens = model.post_layernorm(tokens) if held == "CLIPVisionModel" else tokens
        assert torch.allclose(tokens, net.forward_features(images), atol=1e-5)


def test_an_export_is_an_encoder_again(run_of, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    for kind in ("clip", "plain"):
        encoder = load_encoder(f"run:{run_of(kind)}")
        export_encoder(encoder.requested, "hf", tmp_path / kind)
        again = load_encoder(EncoderSpec(f"hf:{tmp_path / kind}", pool="avg"))
        assert torch.allclose(again(images), encoder(images), atol=1e-5) and again.images == encoder.images


def test_a_timm_model_with_weights_of_its_own(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class token's pool, as MAE's and DINOv2's."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    asked = EncoderSpec("timm:test_vit", str(tmp_path / "weights.safetensors"))
    for name in ("timm", "hf"):
        exported = export_encoder(asked, name, tmp_path / name)
        assert exported["encoder"]["checkpoint"] == "weights.safetensors"  # without its folder
        found = features_by_card(tmp_path / name, photo, monkeypatch)
        assert (found - own_features(load_encoder(asked), photo)).abs().max() <= 1e-4
        assert (
            "Not by this project: `test_vit`, its weights from `weights.safetensors`."
            in (tmp_path / name / "README.md").read_text()
        )


@pytest.mark.parametrize(("layer", "pool"), [(None, None), (-2, "cls+avg")])
def test_onnx_takes_any_layer_and_pool(
    run_of, layer: int | None, pool: str | None, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(EncoderSpec(f"run:{run_of('clip')}", None, layer, pool))
    exported = export_encoder(encoder.requested, "onnx", tmp_path / "out")
    assert 0 <= exported["difference"] <= 1e-4
    assert torch.allclose(
        features_by_card(tmp_path / "out", photo, monkeypatch), own_features(encoder, photo), atol=1e-4
    )


def test_open_clip_gets_both_towers(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-export.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-export.json")
    torch.manual_seed(0)
    model: Any = open_clip.create_model("tiny-export").eval()
    file = tmp_path / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    asked = EncoderSpec("open_clip:tiny-export", str(file))
    export_encoder(asked, "open_clip", tmp_path / "out")
    read: Any = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 64, (2, 8))
    assert torch.equal(read.encode_image(images), model.encode_image(images))
    assert torch.equal(read.encode_text(tokens), model.encode_text(tokens)) and read.logit_scale == model.logit_scale
    found = features_by_card(tmp_path / "out", photo, monkeypatch)
    assert (found - own_features(load_encoder(asked), photo)).abs().max() <= 1e-4
    text_of = refusal(asked, "timm", tmp_path / "timm")
    assert "is no timm model" in text_of and "--format open_clip this one" in text_of


def test_the_card_has_recipe_data_and_results(run_of, tmp_path: Path) -> None:
    run = run_of("clip")
    encoder = load_encoder(f"run:{run}")
    assert readout_of(encoder.describe()) == "layer last, before the classifier, pool avg"
    row = {
        "encoder": encoder.name,
        "variant": "10 shots",
        "metrics": ["top1"],
        "top1": 0.5,
        "top1_std": 0.01,
        "seeds": [{}, {}, {}],
        "description": encoder.describe(),
    }
    other = {**row, "variant": "of other weights", "description": {"weights": "0"}}
    class_token = {
        **row,
        "encoder": f"{encoder.name}, layer 1, cls",
        "description": {**encoder.describe(), "layer": "1 of 2", "pool": "cls"},
    }
    for results in ((), (tmp_path / "results",)):
        place = results[0] if results else run
        place.mkdir(exist_ok=True)
        (place / "fewshot.json").write_text(
            json.dumps({"protocol": "fewshot, ridge", "data": "pets", "results": [row, other, class_token]})
        )
        export_encoder(encoder.requested, "timm", tmp_path / "out", results)
        text = (tmp_path / "out" / "README.md").read_text("utf8")
        assert "| pets | 10 shots: fewshot, ridge | top1 | 50.0 ± 1.0 | 3 |" in text and "of other weights" not in text
        assert (
            "| pets | 10 shots: fewshot, ridge (of layer 1 of 2, pool cls) | top1 |" in text
        )  # not what the export gives
        (place / "fewshot.json").unlink()
    head, recipe = yaml.safe_load(text.split("---\n")[1]), re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]
    assert head["library_name"] == "timm"
    (tmp_path / "again.yaml").write_text(recipe)
    assert load_pipeline(tmp_path / "again.yaml").train == load_pipeline(run / "config.yaml").train
    assert "By `train run`: 640 of 12,800,000 samples seen." in text
    assert '{"labels": "abc123"}' in text and "/secret/place" not in text and encoder.describe()["weights"] in text
    (tmp_path / "other.json").write_text(json.dumps({"protocol": "knn", "data": "pets", "results": [other]}))
    assert "is of the weights of" in refusal(encoder.requested, "timm", tmp_path / "out", (tmp_path / "other.json",))


def test_the_cards_labels_are_the_datas(run_of, tmp_path: Path) -> None:
    """A run's configuration has a section `labels` that it does not read: the card has the label dataset's."""
    shutil.copytree(run_of("clip"), tmp_path / "run")
    options = {"tokenizer": "/home/me/words.json", "context": 9, "idf": "paper"}
    (tmp_path / "run" / "data.json").write_text(json.dumps({"label_options": options, "fingerprints": {}}))
    export_encoder(EncoderSpec(f"run:{tmp_path / 'run'}"), "timm", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text("utf8")
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert recipe["labels"] == {"tokenizer": "words.json", "context": 9, "idf": "paper"}


def test_the_card_of_an_untrained_trunk_says_so(run_of, tmp_path: Path) -> None:
    export_encoder(EncoderSpec(f"untrained:{run_of('clip')}"), "timm", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text("utf8")
    assert "Not trained: `vit_b16`, its weights drawn from seed 0." in text and "```yaml" not in text


def test_nothing_foreign_is_replaced(run_of, tmp_path: Path) -> None:
    spec, out = f"run:{run_of('plain')}", tmp_path / "out"
    out.mkdir()
    export_encoder(EncoderSpec(spec), "timm", out)  # an empty folder
    export_encoder(EncoderSpec(spec), "hf", out)  # one of ours, of another format
    assert (out / "preprocessor_config.json").is_file()
    for content in (None, "[]", '{"format": 1}'):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "thesis.tex").write_text("x")
        if content is not None:
            (tmp_path / "mine" / "export.json").write_text(content)
        text = refusal(spec, "timm", tmp_path / "mine")
        assert "exists and is not of `train export`" in text and "give another --out" in text
    assert "exists and is not of `train export`" in refusal(spec, "timm", tmp_path / "mine" / "thesis.tex")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    # What somebody has put next to an export is not removed with it: a clone of the Hub's keeps its history there.
    (out / ".git").mkdir()
    text = refusal(spec, "timm", out)
    assert "has not written and would remove: .git" in text and "move that away" in text
    assert (out / ".git").is_dir() and (out / "preprocessor_config.json").is_file()


def test_a_failed_check_leaves_nothing(run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out = EncoderSpec(f"run:{run_of('plain')}"), tmp_path / "out"

    def off_by(worst: float) -> Format:
        def write(encoder: Encoder, folder: Path) -> Written:
            (folder / "model").write_text("x")
            return Written("a thing", "none", "", lambda _: lambda images: encoder(images) + worst)

        return Format("timm", "timm", write)

    for worst, printed in ((0.001, "1.0e-03"), (float("nan"), "inf")):
        monkeypatch.setitem(exporting.FORMATS, "timm", off_by(worst))
        text = refusal(spec, "timm", out)
        assert f"by {printed}; nothing was written" in text and "at most 1e-04" in text and not out.exists()
    monkeypatch.setitem(exporting.FORMATS, "timm", off_by(5e-5))
    export_encoder(spec, "timm", out)
    monkeypatch.setitem(exporting.FORMATS, "timm", off_by(1.0))
    before = (out / "export.json").read_bytes()
    refusal(spec, "timm", out)
    assert (out / "export.json").read_bytes() == before  # the export before is kept


def test_encoders_that_a_format_cannot_hold(run_of, tmp_path: Path) -> None:
    run, out = f"run:{run_of('clip')}", tmp_path / "out"
    export_encoder(EncoderSpec(run), "hf", tmp_path / "hf")
    assert "has no weights to export" in refusal("pixels:8", "onnx", out)
    for name in ("timm", "hf"):
        text = refusal(EncoderSpec(run, layer=1), name, out)
        assert "holds the whole model, not layer 1" in text and "--layer and --pool with --format onnx" in text
    assert "is in Hugging Face's form already" in refusal(f"hf:{tmp_path / 'hf'}", "hf", out)
    text = refusal(f"hf:{tmp_path / 'hf'}", "timm", out)
    assert "is no timm model" in text and "run:RUN" in text
    text = refusal(run, "open_clip", out)
    assert "has no text tower" in text
    (fix,) = re.findall(r"`(train lit .*?)`", text)
    own = own_command(shlex.split(fix))
    assert own is not None and parse(*own).params["encoder"] == run
    assert "is no known kind" in refusal("lunch", "timm", out)


def test_the_command(run_of, tmp_path: Path) -> None:
    assert set(FORMATS) == set(train.cli.cli.commands["export"].params[1].type.choices)  # type: ignore[attr-defined]
    arguments = ["export", f"run:{run_of('plain')}", "--format", "hf", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(train.cli.cli, arguments, catch_exceptions=False)
    assert found.exit_code == 0
    assert (
        "transformers ViTModel, loaded back: no feature differs by more than" in found.output
        and "--pool avg" in found.output
    )
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == "vit"


def test_an_interrupted_swap_is_undone(tmp_path: Path) -> None:
    """As a kill between the two renames leaves it: the export before has another name, the new one is not yet there."""
    old, partial, out = tmp_path / "out.old.partial", tmp_path / "out.partial", tmp_path / "out"
    for folder in (old, partial):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with pytest.raises(ZeroDivisionError), whole_folder(out):
        raise ZeroDivisionError
    assert (out / "file").read_text() == "out.old.partial" and {path.name for path in tmp_path.iterdir()} == {"out"}
    with whole_folder(out) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"] and {path.name for path in tmp_path.iterdir()} == {"out"}
