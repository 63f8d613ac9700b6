"""Zero-shot by token logits: the loss of the name as a caption, names labelled as captions, names that do not match."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from beton_factory import build_out
from image_folders import encoded, write_folders
from labels.config import load_pipeline
from labels.idf import read_idf
from labels.settings import Features, Loss, Pipeline
from labels.storage import Layout, UserError
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder
from train.encoders.text import label_dataset, label_texts
from train.evals.data.sets import DataSet, load_pair
from train.evals.features import Extractor
from train.evals.kinds.zeroshot import ZeroShot, Zeroshot, class_names, class_scores, class_targets, templates
from train.evals.measure import run_protocol
from train.losses.head import HeadLoss
from train.trainer import train_run

CONFIG = [
    "train.samples=32",
    "train.batch_size=16",
    "train.model.image_size=16",
    "train.optimizer.warmup_samples=0",
    "train.model.trunk=vit_tiny_patch16_224",
    "train.model.trunk_args={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}",
    "train.runtime={device: cpu, precision: fp32, threads: 1}",
    "train.log.tensorboard=false",
    "train.optimizer.lr=0.01",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A label dataset, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("zeroshot")
    out = build_out(folder, [32])
    assert train_run(out, folder / "run", load_pipeline(overrides=CONFIG))
    return out, folder / "run"


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    write_folders(tmp_path / "train", {"red_bird": 2, "the_dog": 2})
    return load_pair(tmp_path / "train", write_folders(tmp_path / "test", {"red_bird": 2, "the_dog": 1}, start=40))


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_names_are_labelled_as_captions_are(trained) -> None:
    out, _ = trained
    found = label_texts(["a red bird", 'the "dog", of a tree', "red red"], out)
    tokens = dict(zip(*(_column(out, name) for name in ("token", "token_id")), strict=True))
    assert found[0].tolist() == sorted(tokens[word] for word in ("a</w>", "red</w>", "bird</w>"))
    assert found[2].tolist() == [tokens["red</w>"]] and tokens["dog</w>"] in found[1]


def _column(out: Path, name: str) -> list:
    import pyarrow.parquet as pq

    return pq.read_table(Layout(out).idf_parquet)[name].to_pylist()


def test_a_tokenizer_that_is_gone_or_another_is_refused(trained, tmp_path: Path) -> None:
    built = shutil.copytree(trained[0], tmp_path / "out")
    config = yaml.safe_load(Layout(built).config.read_text())
    for key, value, message in (
        ("tokenizer", "no-such-file.json", "texts cannot be labelled as in"),
        ("stop_words", "remove", "texts are labelled with the tokenizer"),
    ):
        Layout(built).config.write_text(yaml.safe_dump(config | {"labels": config.get("labels", {}) | {key: value}}))
        text = refused(label_texts, ["x"], built)
        assert message in text and (value in text or "label again" in text)


@pytest.mark.parametrize("idf", [True, False])
def test_scores_rank_as_the_loss_of_the_name_does(idf: bool) -> None:
    """Of a batch of one image, class c's score is the loss of its name as caption, negated, but for a constant of the
    image.
    """
    torch.manual_seed(0)
    weights = torch.rand(30) * idf + (not idf)
    labels = [np.array([1, 5, 9]), np.array([2]), np.array([5, 7])]
    head = {
        "0.weight": torch.rand(8),
        "0.bias": torch.rand(8),
        "1.weight": torch.randn(30, 8),
        "1.bias": torch.randn(30),
    }
    features = torch.randn(4, 8)
    targets = class_targets([[ids] for ids in labels], weights.numpy())
    scores = class_scores(
        features.double(), {key: value.double() for key, value in head.items()}, torch.from_numpy(targets)
    )
    loss = HeadLoss(Loss(), weights)
    normed = torch.nn.functional.layer_norm(features, (8,), head["0.weight"], head["0.bias"])
    for image in range(4):
        losses = [
            float(loss(normed[image : image + 1], head["1.weight"], head["1.bias"], torch.from_numpy(ids)[None].int()))
            for ids in labels
        ]
        sums = np.array(losses) + scores[image].numpy()
        assert np.allclose(sums, sums[0], atol=1e-5)


def test_targets_are_the_mean_over_templates() -> None:
    idf = np.array([0.0, 1.0, 3.0, 2.0], np.float32)
    targets = class_targets([[np.array([1, 2]), np.array([2])], [np.array([0]), np.array([], np.int64)]], idf)
    assert np.allclose(targets[0], [0, 0.125, 0.875, 0]) and not targets[1].any()


def zeroshot(run: Path, data: DataSet, settings: Zeroshot, **readout) -> dict:
    pipeline, extract = (
        Pipeline(evaluators={"zeroshot": settings.model_dump()}),
        Extractor(torch.device("cpu"), Features()),
    )
    return run_protocol(ZeroShot(), [EncoderSpec(str(run), **readout)], lambda: data, pipeline, extract)


def test_the_command_gives_the_accuracy_of_these_scores(trained, data: DataSet, monkeypatch, tmp_path: Path) -> None:
    out, run = trained
    for index, place in enumerate(data.test.encoded):
        place.path.write_bytes(encoded((90 * index, 200 - 60 * index, 30)))
    monkeypatch.setattr(
        "train.evals.kinds.zeroshot.label_texts", lambda texts, built: [np.array([_ids(out)[text]]) for text in texts]
    )
    (tmp_path / "names.txt").write_text("the_dog\tdog\nred_bird\tbird\n")
    result = zeroshot(run, data, Zeroshot(classnames=str(tmp_path / "names.txt")))
    row = result["results"][1]
    assert row["seeds"][0]["names"] == ["bird", "dog"] and "no text tower" in result["protocol"]
    encoder = load_encoder(str(run))
    assert encoder.checkpoint is not None
    head = load_file(encoder.checkpoint / "head.safetensors")
    features = torch.from_numpy(Extractor(torch.device("cpu"), Features())(encoder, data.test))
    normed = torch.nn.functional.layer_norm(features, (24,), head["0.weight"], head["0.bias"])
    logits = normed @ head["1.weight"].T + head["1.bias"]
    guesses = logits[:, [_ids(out)["bird"], _ids(out)["dog"]]].argmax(1).numpy()
    assert row["top1"] == pytest.approx((guesses == data.test.targets).mean())


def _ids(out: Path) -> dict[str, int]:
    return {
        token.removesuffix("</w>"): number
        for token, number in zip(_column(out, "token"), _column(out, "token_id"), strict=True)
    }


def test_encoders_that_have_no_head_are_refused(trained, data: DataSet) -> None:
    text = refused(lambda: zeroshot(trained[1], data, Zeroshot(), pool="cls"))
    assert "the pre-training head takes the run's own pooled features" in text
    pipeline, extract = Pipeline(), Extractor(torch.device("cpu"), Features())
    text = refused(lambda: run_protocol(ZeroShot(), [EncoderSpec("pixels:4")], lambda: data, pipeline, extract))
    assert "no text tower and no pre-training head" in text and "train lit" in text


def test_labels_that_have_moved(trained, data: DataSet, tmp_path: Path) -> None:
    text = refused(lambda: zeroshot(trained[1], data, Zeroshot(labels=str(tmp_path / "gone"))))
    assert "no manifest is there" in text and "--set zeroshot.labels=OUT" in text


@pytest.fixture(scope="module")
def other_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label dataset with the same tokenizer and another IDF."""
    return build_out(tmp_path_factory.mktemp("other"), [12])


def moved(trained: tuple[Path, Path], other_out: Path, folder: Path, **facts: object) -> tuple[Path, Path]:
    """The dataset and the run as A/out and A/run with changed facts in data.json; another dataset as B/out."""
    out, run = folder / "A" / "out", folder / "A" / "run"
    for source, copy in ((trained[0], out), (trained[1], run), (other_out, folder / "B" / "out")):
        shutil.copytree(source, copy)
    known = json.loads((run / "data.json").read_text()) | facts
    (run / "data.json").write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    return out, run


@pytest.mark.parametrize("labels", ["out", "./out", "A/out", "../A/out"])
@pytest.mark.parametrize("cwd", ["A", "B", "."])
def test_the_labels_of_a_run_that_names_them_relatively(
    trained, other_out: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, cwd: str
) -> None:
    out, run = moved(trained, other_out, tmp_path, labels=labels, idf=None)
    monkeypatch.chdir(tmp_path / cwd)
    assert label_dataset(run, None).resolve() == out
    found, expected = (zeroshot(path, data, Zeroshot())["results"][1]["top1"] for path in (run, trained[1]))
    assert found == expected


def test_another_idf_or_tokenizer_than_the_runs_is_refused(
    trained, other_out: Path, data: DataSet, tmp_path: Path
) -> None:
    out, run = moved(trained, other_out, tmp_path, idf=None)
    other = tmp_path / "B" / "out"
    text = refused(zeroshot, run, data, Zeroshot(labels=str(other)))
    assert (
        "was trained with the IDF table of SHA-256" in text and f"{other / 'idf.parquet'} is another or missing" in text
    )
    Layout(out).idf_parquet.unlink()
    assert "is another or missing" in refused(zeroshot, run, data, Zeroshot(labels=str(out)))
    _, run = moved(trained, other_out, tmp_path / "c", tokenizer_fingerprint="0123")
    assert "was trained with the tokenizer 0123" in refused(zeroshot, run, data, Zeroshot())


def test_a_table_of_its_own_is_named_by_the_run(
    trained, other_out: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `--idf TABLE`, scores are weighted by TABLE, not by the table of the labels."""
    table = tmp_path / "table.parquet"
    shutil.copy(Layout(trained[0]).idf_parquet, table)
    _, run = moved(trained, other_out, tmp_path, labels=str(tmp_path / "B" / "out"), idf=str(table))
    weights = []

    def targets(label_sets: list, idf: np.ndarray) -> np.ndarray:
        weights.append(idf)
        return class_targets(label_sets, idf)

    monkeypatch.setattr("train.evals.kinds.zeroshot.class_targets", targets)
    zeroshot(run, data, Zeroshot())
    assert np.array_equal(weights[0], read_idf(table))
    assert not np.array_equal(weights[0], read_idf(Layout(other_out).idf_parquet))


def test_a_run_names_its_data_by_absolute_paths(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained[0].parent)
    assert train_run(Path("out"), tmp_path / "run", load_pipeline(overrides=CONFIG))
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["beton"] == facts["labels"] == str(trained[0])
    assert facts["idf"] == str(Layout(trained[0]).idf_parquet)


def test_names_without_labels_are_rejected(trained, data: DataSet, monkeypatch) -> None:
    monkeypatch.setattr(
        "train.evals.kinds.zeroshot.label_texts", lambda texts, built: [np.empty(0, np.int64) for _ in texts]
    )
    text = refused(lambda: zeroshot(trained[1], data, Zeroshot()))
    assert "2 class names have no label" in text and "red bird, the dog" in text


def test_names_that_do_not_match_the_classes(data: DataSet, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    assert class_names("auto", data) == ["red bird", "the dog"]
    names.write_text("cardinal\n\npoodle\n")
    assert class_names(str(names), data) == ["cardinal", "poodle"]
    names.write_text("cardinal\npoodle\nwren\n")
    text = refused(class_names, str(names), data)
    assert (
        "has 3 names" in text
        and "has 2 classes: red_bird, the_dog" in text
        and "write one name for every class" in text
    )
    names.write_text("red_bird\tcardinal\nred_brid\tpoodle\n")
    text = refused(class_names, str(names), data)
    assert "1 classes have no name: the_dog; 1 names are of no class: red_brid" in text
    assert "write a line class<TAB>name for every class" in text
    names.write_text("same\nsame\n")
    text = refused(ZeroShot().check, data, Zeroshot(classnames=str(names)))
    assert "1 names stand for several classes" in text and "--classnames FILE with other words" in text
    names.write_text("")
    assert "is empty" in refused(class_names, str(names), data)
    assert "no file of class names at" in refused(class_names, "gone.txt", data)
    assert "2 classes, ImageNet's names are 1000" in refused(class_names, "imagenet", data)


def test_names_that_are_not_utf8_need_a_file(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {os.fsdecode(b"caf\xe9"): 1, "dog": 1})
    data = load_pair(tmp_path / "train", write_folders(tmp_path / "test", {"dog": 1}, start=40))
    text = refused(ZeroShot().check, data, Zeroshot())
    assert r"1 class names are not UTF-8: caf\xe9" in text and "--classnames FILE with lines class<TAB>name" in text
    (tmp_path / "names.txt").write_text("caf\\xe9\tcafé\ndog\tdog\n")
    ZeroShot().check(data, Zeroshot(classnames=str(tmp_path / "names.txt")))
    assert class_names(str(tmp_path / "names.txt"), data) == ["café", "dog"]


def test_templates(tmp_path: Path) -> None:
    assert templates("none") == ["{}"]
    assert len(templates("openai")) == 80 and templates("openai")[0] == "a bad photo of a {}."
    file = tmp_path / "t.txt"
    file.write_text("a photo of a {}.\nart of {}\n")
    assert templates(str(file)) == ["a photo of a {}.", "art of {}"]
    file.write_text("a photo\n")
    assert "1 templates have no {}, the first: 'a photo'" in refused(templates, str(file))


def test_a_changed_file_of_names_is_another_protocol(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    words = []
    for text in ("a\nb\n", "a\nc\n"):
        file.write_text(text)
        words.append(ZeroShot().describe(Zeroshot(classnames=str(file))))
    assert words[0] != words[1] and json.dumps(words)
