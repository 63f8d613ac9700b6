"""A text tower for a frozen encoder, and what is asked of it: zero-shot, retrieval, a suite."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_eval_data import encoded, write_folders, write_tar
from timm import create_model
from trainer_factory import losses, small_config, small_out, weights

from labels.config import load_pipeline
from labels.errors import UserError
from labels.settings import Features, Pipeline, Retrieval, Zeroshot
from train.checkpoint import checkpoint_folders
from train.cli import cli
from train.contrastive.method import train_clip, train_lit
from train.data import Chosen
from train.evals.data.captions import load_caption_set
from train.evals.data.sets import DataSet, load_pair
from train.evals.encoders.encoder import EncoderSpec
from train.evals.encoders.load import load_encoder
from train.evals.features import Extractor
from train.evals.protocols import retrieval
from train.evals.protocols.retrieval import Recall, ranks, recalls
from train.evals.protocols.zeroshot import ZeroShot, class_embeddings
from train.evals.run_protocol import run_protocol
from train.report.published import Line, matches
from train.report.runs import read_runs
from train.run import train_run

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["train.samples=160", "text_tower={embed_dim: 8, width: 16, heads: 2, layers: 1, context: 8}", "train.optimizer.warmup_samples=0"]
CPU = torch.device("cpu")


class Runs:
    """A run of classification, one of CLIP, and text towers for both trunks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, small_out(folder)
        self.config = small_config(folder)
        self.pipeline = load_pipeline(self.config, SHORT)
        self.chosen = Chosen([str(self.out)])
        assert train_run(self.chosen, folder / "run", self.pipeline)
        assert train_clip(self.chosen, folder / "clip", self.pipeline)
        assert self.lit(f"run:{folder / 'run'}", "lit")

    def lit(self, spec: str, name: str, weights: str | None = None, *overrides: str) -> bool:
        return train_lit(
            EncoderSpec(spec, weights), self.chosen, self.folder / name, load_pipeline(self.config, [*SHORT, *overrides])
        )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("lit"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned images."""
    folder = tmp_path_factory.mktemp("pairs")
    members = []
    for number, text in enumerate(["red cat", "blue dog", "green tree", "sun", "moon\nstar", "bird fish"]):
        members += [(f"{number}.jpg", encoded((40 * number, 90, 250 - 40 * number), "JPEG")), (f"{number}.txt", text.encode())]
    write_tar(folder / "test" / "0.tar", members)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("classes")
    write_folders(folder / "train", {"red_bird": 2, "the_dog": 2, "sun": 2})
    return load_pair(folder / "train", write_folders(folder / "test", {"red_bird": 3, "the_dog": 3, "sun": 3}, start=40))


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# -- training


def test_the_trunk_is_frozen_and_the_rest_learns(runs: Runs) -> None:
    run, lit = weights(runs.folder / "run"), weights(runs.folder / "lit")
    trunk = {name: tensor for name, tensor in run.items() if name.startswith("trunk.")}
    assert trunk and all(torch.equal(lit[name], tensor) for name, tensor in trunk.items())
    assert not any(name.startswith("optimizer.exp_avg.trunk") for name in lit)
    found = losses(runs.folder / "lit")
    assert len(found) == 10 and np.mean([loss for _, loss, _ in found[-3:]]) < found[0][1]
    assert (
        load_encoder(f"run:{runs.folder / 'lit'}").describe()["weights"] == load_encoder(f"run:{runs.folder / 'run'}").describe()["weights"]
    )
    facts = json.loads((runs.folder / "lit" / "data.json").read_text())
    assert facts["method"] == "lit" and facts["encoder"]["by_config"] and str(runs.folder / "run") in facts["encoder"]["spec"]


def test_batch_norm_of_a_frozen_trunk_keeps_its_statistics(runs: Runs, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "net.safetensors")
    assert runs.lit("timm:test_resnet", str(tmp_path / "lit"), str(tmp_path / "net.safetensors"), "train.samples=32")
    found = load_file(checkpoint_folders(tmp_path / "lit")[-1] / "trunk.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(tmp_path / "net.safetensors").items())


def test_a_lit_run_goes_on_as_if_it_had_not_stopped(runs: Runs, tmp_path: Path) -> None:
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
    assert "was begun with another configuration: was `encoder: " in text


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


# -- zero-shot


def tiny_clip(folder: Path) -> tuple[str, str, Any]:
    """A small model of open_clip's with random weights: name, file, model."""
    name = "tiny-two-towers"
    config = {
        "embed_dim": 12, "vision_cfg": {"image_size": 16, "layers": 1, "width": 24, "head_width": 12, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
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
    wanted = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(name), names, forms.read_text().splitlines())
    encoder = load_encoder(EncoderSpec(f"open_clip:{name}", file))
    assert encoder.text
    texts = [form.replace("{}", one) for one in names for form in forms.read_text().splitlines()]
    assert torch.allclose(class_embeddings(encoder.text().texts(texts, CPU), 3).T, wanted, atol=1e-6)
    extract = Extractor(CPU, Features())
    pipeline = Pipeline(zeroshot=Zeroshot(templates=str(forms)))
    found = run_protocol(ZeroShot(), [EncoderSpec(f"open_clip:{name}", file)], lambda: data, pipeline, extract)["results"][1]
    guesses = (torch.from_numpy(extract(encoder, data.test)) @ wanted).argmax(1).numpy()
    assert found["variant"] == "zeroshot" and found["top1"] == pytest.approx((guesses == data.test.targets).mean())


@pytest.mark.parametrize("kind", ["clip", "lit"])
def test_runs_are_asked_with_their_own_tokens(runs: Runs, data: DataSet, kind: str) -> None:
    spec = f"run:{runs.folder / kind}"
    encoder = load_encoder(spec)
    assert encoder.text
    side = encoder.text()
    words = json.loads((runs.folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert side.tokens(["red cat", "nothing", "dog " * 9], None).tolist() == [
        [15, words["red"], words["cat"], 16, 0, 0, 0, 0], [15, 16, 0, 0, 0, 0, 0, 0], [15, *[words["dog"]] * 6, 16],
    ]  # fmt: skip
    found = run_protocol(ZeroShot(), [EncoderSpec(spec)], lambda: data, Pipeline(), Extractor(CPU, Features()))
    row = found["results"][1]
    features = torch.from_numpy(Extractor(CPU, Features())(encoder, data.test))
    joint = load_file(checkpoint_folders(runs.folder / kind)[-1] / "joint.safetensors")
    names = torch.nn.functional.normalize(side.tower(side.tokens(list(data.names), None)), dim=1)
    guesses = ((features @ joint["projection.weight"].T) @ names.T).argmax(1).detach().numpy()
    assert row["variant"] == "zeroshot" and row["top1"] == pytest.approx((guesses == data.test.targets).mean())


def test_a_run_without_text_tower_is_told_as_such(runs: Runs, data: DataSet, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(
        "train.evals.protocols.token_logits.label_texts", lambda texts, built: [np.array([1 + n]) for n, _ in enumerate(texts)]
    )
    spec = EncoderSpec(f"run:{runs.folder / 'run'}")
    found = run_protocol(ZeroShot(), [spec], lambda: data, Pipeline(), Extractor(CPU, Features()))
    assert found["results"][1]["variant"] == "zero-shot by token logits"
    said = capsys.readouterr().out
    assert "has no text tower: its head's token logits are taken; `train lit` gives it one" in " ".join(said.split())


def test_another_tokenizer_is_refused(runs: Runs, data: DataSet, tmp_path: Path) -> None:
    from beton_factory import build_out

    other = build_out(tmp_path, [4])
    pipeline = Pipeline(zeroshot=Zeroshot(labels=str(other)))
    spec, extract = EncoderSpec(f"run:{runs.folder / 'lit'}"), Extractor(CPU, Features())
    text = refused(run_protocol, ZeroShot(), [spec], lambda: data, pipeline, extract)
    assert "was trained with the tokenizer" in text and "zeroshot.labels=OUT" in text
    pipeline = Pipeline(zeroshot=Zeroshot(labels=str(tmp_path / "gone")))
    assert "no manifest is there" in refused(run_protocol, ZeroShot(), [spec], lambda: data, pipeline, extract)


def test_predictions_are_of_classification_alone(runs: Runs) -> None:
    said = CliRunner().invoke(cli, ["predict", str(runs.folder / "clip"), "x.png"])
    assert isinstance(said.exception, UserError) and "it was trained by `train clip`" in str(said.exception)


# -- retrieval


def naive(cosines: np.ndarray, right: list[set[int]], k: int) -> float:
    """The share of rows of which one of the right columns is among the k largest, equals in their order."""
    return float(np.mean([bool(right[row] & set(np.argsort(-line, kind="stable")[:k].tolist())) for row, line in enumerate(cosines)]))


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40))
def test_recall_is_the_naive_one_in_any_chunks(seed: int, most: int, chunk: int) -> None:
    dice = np.random.default_rng(seed)
    of = np.repeat(np.arange(7), dice.integers(1, most + 1, 7))
    images, texts = (torch.from_numpy(dice.integers(-1, 2, (rows, 3)).astype(np.float32)) for rows in (7, len(of)))  # many ties
    both = torch.from_numpy(np.stack([of, np.arange(len(of))], axis=1))
    cosines = (images @ texts.T).numpy()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(retrieval, "_CHUNK_COSINES", chunk)
        by_image, by_text = ranks(images, texts, both), ranks(texts, images, both.flip(1))
    captions = [set(np.flatnonzero(of == image).tolist()) for image in range(7)]
    for k in (1, 2, 5):
        assert recalls(by_image, [k])[f"r@{k}"] == pytest.approx(naive(cosines, captions, k))
        assert recalls(by_text, [k])[f"r@{k}"] == pytest.approx(naive(cosines.T, [{int(image)} for image in of], k))


def karpathy(folder: Path) -> Path:
    """Five images of Flickr30k's layout with one to three captions each, two of them in the test part."""
    (folder / "images").mkdir()
    images = []
    for number, captions in enumerate([["red cat", "dog"], ["blue"], ["green tree", "sun", "moon"], ["star"], ["bird", "fish"]]):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded((50 * number, 120, 9 * number), "JPEG"))
        sentences = [{"raw": text} for text in captions]
        images.append({"filename": f"{number}.jpg", "split": "test" if number < 4 else "train", "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return folder


def test_the_command_tells_both_ways(runs: Runs, tmp_path: Path) -> None:
    folder = karpathy(tmp_path)
    arguments = ["retrieval", "--data", f"flickr30k:{folder}", "--encoder", f"run:{runs.folder / 'lit'}", "--out", str(tmp_path / "r.json")]
    said = CliRunner().invoke(cli, [*arguments, "--set", "retrieval.k=[1,3]"], catch_exceptions=False, env={"COLUMNS": "200"})
    assert said.exit_code == 0 and "4 images, width 24" in said.output, said.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["part"] == "test" and result["test"]["captions"] == 7
    encoder, data = load_encoder(f"run:{runs.folder / 'lit'}"), load_caption_set(f"flickr30k:{folder}")
    assert encoder.text
    side = encoder.text()
    texts = side.texts([text for one in data.test.captions for text in one], CPU)
    cosines = (side.images(Extractor(CPU, Features())(encoder, data.test), CPU) @ texts.T).numpy()
    right = [{0, 1}, {2}, {3, 4, 5}, {6}]
    by_image, by_text = result["results"]
    assert (by_image["variant"], by_text["variant"]) == ("retrieval, image to text", "retrieval, text to image")
    assert by_image["metrics"] == ["r@1", "r@3"]
    for k in (1, 3):
        assert by_image[f"r@{k}"] == pytest.approx(naive(cosines, right, k))
        assert by_text[f"r@{k}"] == pytest.approx(naive(cosines.T, [{0}, {0}, {1}, {2}, {2}, {2}, {3}], k))
    share = by_text["r@1"]
    assert by_text["r@1_standard_error"] == pytest.approx(np.sqrt(share * (1 - share) / 7)), "shares are of captions, not of images"


def test_what_cannot_be_asked(runs: Runs, pairs: Path) -> None:
    extract = Extractor(CPU, Features())

    def ask(spec: EncoderSpec, settings: Retrieval) -> Any:
        return run_protocol(Recall(), [spec], lambda: load_caption_set(f"pairs:{pairs}"), Pipeline(retrieval=settings), extract)

    for spec in (EncoderSpec(f"run:{runs.folder / 'run'}"), EncoderSpec("pixels:4"), EncoderSpec(f"run:{runs.folder / 'lit'}", pool="cls")):
        text = refused(ask, spec, Retrieval(k=[1]))
        assert "it has no text tower" in text and "`train lit ENCODER --beton OUT` gives it one" in text
    assert "retrieval.k is 10" in refused(ask, EncoderSpec(f"run:{runs.folder / 'lit'}"), Retrieval())
    (pairs / "test").rename(pairs / "train")
    assert "has the parts train" in refused(load_caption_set, f"pairs:{pairs}")
    (pairs / "train").rename(pairs / "test")


# -- a suite


def test_a_suite_of_clip_and_lit(runs: Runs, pairs: Path, data: DataSet, tmp_path: Path) -> None:
    parts = data.train.directory.parent
    content = {
        "encoders": [f"run:{runs.folder / name}" for name in ("run", "clip", "lit")],
        "data": [f"folders:{parts}", f"pairs:{pairs}"],
        "protocols": [{"protocol": "knn", "set": {"k": [1]}}, "zeroshot", {"protocol": "retrieval", "set": {"k": [1, 5]}}],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    arguments = ["eval", "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(cli, arguments, catch_exceptions=False, env={"COLUMNS": "250"})
    assert said.exit_code == 0, said.output
    rows = json.loads((tmp_path / "out" / "suite.json").read_text())["results"]
    found = {(row["data"].partition(":")[0], Path(row["encoder"]).name, row["variant"]) for row in rows}
    for name in ("clip", "lit"):
        assert ("folders", name, "zeroshot") in found
        assert {("pairs", name, f"retrieval, {way}") for way in ("image to text", "text to image")} <= found
    assert ("folders", "run", "zero-shot by token logits") in found and not any(
        kind == "pairs" and name == "run" for kind, name, _ in found
    )
    assert "left out: retrieval of run:" in said.output and "train lit" in said.output
    content["protocols"] = [{"protocol": "knn", "set": {"k": [1]}}]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    found_error = CliRunner().invoke(cli, arguments)
    assert "no protocol of the suite takes pairs:" in str(found_error.exception)
    content |= {"protocols": ["retrieval"], "data": [f"folders:{parts}"]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    assert "retrieval takes data with captions, and the suite has none" in str(CliRunner().invoke(cli, arguments).exception)


def test_the_papers_lines_are_of_their_own_method(runs: Runs) -> None:
    classified, clip, lit = read_runs([runs.folder / name for name in ("run", "clip", "lit")])
    lines = {"superclass": Line("", [1.0], {"train.samples": 160}), "clip": Line("", [1.0], {"train.samples": 160, "data.method": "clip"})}
    assert [matches(run, lines["superclass"]) for run in (classified, clip, lit)] == [True, False, False]
    assert [matches(run, lines["clip"]) for run in (classified, clip, lit)] == [False, True, False]
