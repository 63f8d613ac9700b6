"""A text tower for a frozen encoder, and zero-shot by it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from timm import create_model

from labels.settings import Features, Pipeline
from labels.storage import UserError
from lit_factory import Runs, refused, three_classes
from train.checkpoint import checkpoint_folders
from train.cli import cli
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.kinds.zeroshot import ZeroShot, Zeroshot, class_embeddings
from train.evals.lit import train_lit
from train.evals.measure import run_protocol
from train.report.page import Line, matches
from train.report.runs import read_runs
from trainer_factory import losses, weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("lit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return three_classes(tmp_path_factory.mktemp("classes"))


# -- training


def test_the_trunk_is_frozen_and_the_rest_learns(runs: Runs) -> None:
    run, lit = weights(runs.folder / "run"), weights(runs.folder / "lit")
    trunk = {name: tensor for name, tensor in run.items() if name.startswith("trunk.")}
    assert trunk and all(torch.equal(lit[name], tensor) for name, tensor in trunk.items())
    assert not any(name.startswith("optimizer.exp_avg.trunk") for name in lit)
    found = losses(runs.folder / "lit")
    assert len(found) == 10 and np.mean([loss for _, loss, _ in found[-3:]]) < found[0][1]
    assert (
        load_encoder(f"run:{runs.folder / 'lit'}").describe()["weights"]
        == load_encoder(f"run:{runs.folder / 'run'}").describe()["weights"]
    )
    facts = json.loads((runs.folder / "lit" / "data.json").read_text())
    assert (
        facts["method"] == "lit"
        and facts["encoder"]["by_config"]
        and str(runs.folder / "run") in facts["encoder"]["spec"]
    )


def test_batch_norm_of_a_frozen_trunk_keeps_its_statistics(runs: Runs, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "net.safetensors")
    assert runs.lit("timm:test_resnet", str(tmp_path / "lit"), str(tmp_path / "net.safetensors"), "train.samples=32")
    found = load_file(checkpoint_folders(tmp_path / "lit")[-1] / "trunk.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(tmp_path / "net.safetensors").items())


def test_a_lit_run_resumes_as_if_it_had_not_stopped(runs: Runs, tmp_path: Path) -> None:
    spec, pipeline = EncoderSpec(f"run:{runs.folder / 'run'}"), runs.pipeline
    import train.loop

    real = train.loop._Due.__call__

    def stop(self: Any, finished: int, stopping: Any, seconds: float) -> tuple[bool, bool, bool]:
        return real(self, finished, lambda: finished == 4, seconds)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.loop._Due, "__call__", stop)
        assert not train_lit(spec, runs.chosen, tmp_path / "lit", pipeline)
    assert train_lit(spec, runs.chosen, tmp_path / "lit", pipeline)
    assert losses(tmp_path / "lit") == losses(runs.folder / "lit")
    one, other = weights(tmp_path / "lit"), weights(runs.folder / "lit")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_encoder_is_not_mixed_into_a_run(runs: Runs) -> None:
    text = refused(runs.lit, f"run:{runs.folder / 'clip'}", "lit")
    assert "was begun with another configuration: encoder was '" in text


def test_any_encoder_takes_a_text_tower_and_is_found_again(runs: Runs, data: DataSet, tmp_path: Path) -> None:
    torch.manual_seed(5)
    file = tmp_path / "vit.safetensors"
    save_file(create_model("test_vit", num_classes=0).state_dict(), file)
    assert runs.lit("timm:test_vit", str(tmp_path / "lit"), str(file), "train.samples=32")
    encoder, own = load_encoder(f"run:{tmp_path / 'lit'}"), load_encoder(EncoderSpec("timm:test_vit", str(file)))
    images = torch.randn(2, 3, own.images.side, own.images.side)
    assert encoder.text and torch.equal(encoder(images), own(images)) and encoder.images == own.images
    assert runs.lit(f"run:{tmp_path / 'lit'}", str(tmp_path / "again"), None, "train.samples=32")
    assert load_encoder(f"run:{tmp_path / 'again'}").describe()["weights"] == own.describe()["weights"]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert "has other weights than when" in refused(load_encoder, f"run:{tmp_path / 'lit'}")


def test_an_encoder_of_the_hub_is_found_again(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(name: str, *, pretrained: bool, num_classes: int) -> torch.nn.Module:
        torch.manual_seed(5)
        return create_model(name, num_classes=num_classes)

    monkeypatch.setattr("train.encoders.libraries.timm.create_model", fetched)
    (tmp_path / "test_vit").mkdir()  # a folder that is named as the model
    monkeypatch.chdir(tmp_path)
    assert runs.lit("timm:test_vit", str(tmp_path / "lit"), "hub", "train.samples=32")
    assert load_encoder("run:lit").describe()["frozen"] == "timm:test_vit"


# -- zero-shot


def tiny_clip(folder: Path) -> tuple[str, str, Any]:
    """A small model of open_clip's with random weights: name, file, model."""
    name = "tiny-two-towers"
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 24, "head_width": 12, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(2)
    model = open_clip.create_model(name, load_weights=False).eval()
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "clip.safetensors")
    return name, str(folder / "clip.safetensors"), model


def test_classes_are_embedded_as_open_clip_does(data: DataSet, tmp_path: Path) -> None:
    name, file, model = tiny_clip(tmp_path)
    forms = tmp_path / "forms.txt"
    forms.write_text("a photo of a {}.\nart of the {}\n{}\n")
    names = list(data.names)
    wanted = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(name), names, forms.read_text().splitlines()
    )
    encoder = load_encoder(EncoderSpec(f"open_clip:{name}", file))
    assert encoder.text
    texts = [form.replace("{}", one) for one in names for form in forms.read_text().splitlines()]
    assert torch.allclose(class_embeddings(encoder.text().texts(texts, CPU), 3).T, wanted, atol=1e-6)
    extract = Extractor(CPU, Features())
    pipeline = Pipeline(evaluators={"zeroshot": Zeroshot(templates=str(forms)).model_dump()})
    found = run_protocol(ZeroShot(), [EncoderSpec(f"open_clip:{name}", file)], lambda: data, pipeline, extract)[
        "results"
    ][1]
    guesses = (torch.from_numpy(extract(encoder, data.test)) @ wanted).argmax(1).numpy()
    assert found["variant"] == "zeroshot" and found["top1"] == pytest.approx((guesses == data.test.targets).mean())


@pytest.mark.parametrize("kind", ["clip", "lit"])
def test_runs_are_evaluated_with_their_own_tokens(runs: Runs, data: DataSet, kind: str) -> None:
    spec = f"run:{runs.folder / kind}"
    encoder = load_encoder(spec)
    assert encoder.text
    side = encoder.text()
    words = json.loads((runs.folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert side.tokens(["red cat", "nothing", "dog " * 9], None).tolist() == [
        [15, words["red"], words["cat"], 16, 0, 0, 0, 0],
        [15, 16, 0, 0, 0, 0, 0, 0],
        [15, *[words["dog"]] * 6, 16],
    ]
    found = run_protocol(ZeroShot(), [EncoderSpec(spec)], lambda: data, Pipeline(), Extractor(CPU, Features()))
    row = found["results"][1]
    features = torch.from_numpy(Extractor(CPU, Features())(encoder, data.test))
    joint = load_file(checkpoint_folders(runs.folder / kind)[-1] / "joint.safetensors")
    names = torch.nn.functional.normalize(side.tower(side.tokens(list(data.names), None)), dim=1)
    guesses = ((features @ joint["projection.weight"].T) @ names.T).argmax(1).detach().numpy()
    assert row["variant"] == "zeroshot" and row["top1"] == pytest.approx((guesses == data.test.targets).mean())


def test_a_run_without_text_tower_is_reported(
    runs: Runs, data: DataSet, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(
        "train.evals.kinds.zeroshot.label_texts", lambda texts, built: [np.array([1 + n]) for n, _ in enumerate(texts)]
    )
    spec = EncoderSpec(f"run:{runs.folder / 'run'}")
    found = run_protocol(ZeroShot(), [spec], lambda: data, Pipeline(), Extractor(CPU, Features()))
    assert found["results"][1]["variant"] == "zero-shot by token logits"
    said = capsys.readouterr().out
    assert "has no text tower: its head's token logits are used; `train lit` adds one" in " ".join(said.split())


def test_names_that_the_tokenizer_does_not_know_are_reported(runs: Runs, data: DataSet, tmp_path: Path) -> None:
    """Otherwise both would be the same text to the tower, and the accuracy would silently be chance."""
    (tmp_path / "names.txt").write_text("red bird\nxylophone\nzeppelin\n")
    pipeline = Pipeline(evaluators={"zeroshot": Zeroshot(classnames=str(tmp_path / "names.txt")).model_dump()})
    text = refused(
        run_protocol,
        ZeroShot(),
        [EncoderSpec(f"run:{runs.folder / 'lit'}")],
        lambda: data,
        pipeline,
        Extractor(CPU, Features()),
    )
    assert "1 class names have the same tokens as others" in text and "zeppelin (as xylophone)" in text
    assert "--classnames FILE with other words" in text


def test_another_tokenizer_is_refused(runs: Runs, data: DataSet, tmp_path: Path) -> None:
    from beton_factory import build_out

    other = build_out(tmp_path, [4])
    pipeline = Pipeline(evaluators={"zeroshot": Zeroshot(labels=str(other)).model_dump()})
    spec, extract = EncoderSpec(f"run:{runs.folder / 'lit'}"), Extractor(CPU, Features())
    text = refused(run_protocol, ZeroShot(), [spec], lambda: data, pipeline, extract)
    assert "was trained with the tokenizer" in text and "zeroshot.labels=OUT" in text
    pipeline = Pipeline(evaluators={"zeroshot": Zeroshot(labels=str(tmp_path / "gone")).model_dump()})
    assert "no manifest is there" in refused(run_protocol, ZeroShot(), [spec], lambda: data, pipeline, extract)


def test_predictions_are_of_classification_alone(runs: Runs) -> None:
    said = CliRunner().invoke(cli, ["predict", str(runs.folder / "clip"), "x.png"])
    assert isinstance(said.exception, UserError) and "it was trained by `train clip`" in str(said.exception)


def test_the_papers_lines_are_of_their_own_method(runs: Runs) -> None:
    classified, clip, lit = read_runs([runs.folder / name for name in ("run", "clip", "lit")])
    lines = {
        "superclass": Line("", [1.0], {"train.samples": 160}),
        "clip": Line("", [1.0], {"train.samples": 160, "data.method": "clip"}),
    }
    assert [matches(run, lines["superclass"]) for run in (classified, clip, lit)] == [True, False, False]
    assert [matches(run, lines["clip"]) for run in (classified, clip, lit)] == [False, True, False]
