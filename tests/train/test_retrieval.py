"""Captions by images and images by captions, and a suite with both kinds of data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from image_folders import encoded, write_tar
from labels.settings import Features, Pipeline
from lit_factory import Runs, refused, three_classes
from train.cli import cli
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder
from train.evals.data.captions import load_caption_set
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.kinds import retrieval
from train.evals.kinds.retrieval import Recall, Retrieval, ranks, recalls
from train.evals.measure import run_protocol

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("lit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return three_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned images."""
    folder = tmp_path_factory.mktemp("pairs")
    members = []
    for number, text in enumerate(["red cat", "blue dog", "green tree", "sun", "moon\nstar", "bird fish"]):
        members += [
            (f"{number}.jpg", encoded((40 * number, 90, 250 - 40 * number), "JPEG")),
            (f"{number}.txt", text.encode()),
        ]
    write_tar(folder / "test" / "0.tar", members)
    return folder


def naive(cosines: np.ndarray, right: list[set[int]], k: int) -> float:
    """The share of rows of which one of the right columns is among the k largest, equals in their order."""
    return float(
        np.mean(
            [bool(right[row] & set(np.argsort(-line, kind="stable")[:k].tolist())) for row, line in enumerate(cosines)]
        )
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40))
def test_recall_is_the_naive_one_in_any_chunks(seed: int, most: int, chunk: int) -> None:
    dice = np.random.default_rng(seed)
    of = np.repeat(np.arange(7), dice.integers(1, most + 1, 7))
    images, texts = (
        torch.from_numpy(dice.integers(-1, 2, (rows, 3)).astype(np.float32)) for rows in (7, len(of))
    )  # many ties
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
    for number, captions in enumerate(
        [["red cat", "dog"], ["blue"], ["green tree", "sun", "moon"], ["star"], ["bird", "fish"]]
    ):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded((50 * number, 120, 9 * number), "JPEG"))
        sentences = [{"raw": text} for text in captions]
        images.append({"filename": f"{number}.jpg", "split": "test" if number < 4 else "train", "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return folder


def test_the_command_reports_both_directions(runs: Runs, tmp_path: Path) -> None:
    folder = karpathy(tmp_path)
    arguments = [
        "retrieval",
        "--data",
        f"flickr30k:{folder}",
        "--encoder",
        f"run:{runs.folder / 'lit'}",
        "--out",
        str(tmp_path / "r.json"),
    ]
    output = CliRunner().invoke(
        cli, [*arguments, "--set", "retrieval.k=[1,3]"], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert output.exit_code == 0 and "4 images, width 24" in output.output, output.output
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
    assert by_text["r@1_standard_error"] == pytest.approx(np.sqrt(share * (1 - share) / 7)), (
        "shares are of captions, not of images"
    )


def test_requests_that_are_rejected(runs: Runs, pairs: Path) -> None:
    extract = Extractor(CPU, Features())

    def evaluate(spec: EncoderSpec, settings: Retrieval) -> Any:
        return run_protocol(
            Recall(),
            [spec],
            lambda: load_caption_set(f"pairs:{pairs}"),
            Pipeline(evaluators={"retrieval": settings.model_dump()}),
            extract,
        )

    for spec in (
        EncoderSpec(f"run:{runs.folder / 'run'}"),
        EncoderSpec("pixels:4"),
        EncoderSpec(f"run:{runs.folder / 'lit'}", pool="cls"),
    ):
        text = refused(evaluate, spec, Retrieval(k=[1]))
        assert "it has no text tower" in text and "`train lit ENCODER --beton OUT` adds a text tower" in text
    assert "retrieval.k is 10" in refused(evaluate, EncoderSpec(f"run:{runs.folder / 'lit'}"), Retrieval())
    (pairs / "test").rename(pairs / "train")
    assert "has the parts train" in refused(load_caption_set, f"pairs:{pairs}")
    (pairs / "train").rename(pairs / "test")


def test_a_suite_of_clip_and_lit(runs: Runs, pairs: Path, data: DataSet, tmp_path: Path) -> None:
    parts = data.train.directory.parent
    content = {
        "encoders": [f"run:{runs.folder / name}" for name in ("run", "clip", "lit")],
        "data": [f"folders:{parts}", f"pairs:{pairs}"],
        "protocols": [
            {"protocol": "knn", "set": {"k": [1]}},
            "zeroshot",
            {"protocol": "retrieval", "set": {"k": [1, 5]}},
        ],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    arguments = ["eval", "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]
    output = CliRunner().invoke(cli, arguments, catch_exceptions=False, env={"COLUMNS": "250"})
    assert output.exit_code == 0, output.output
    rows = json.loads((tmp_path / "out" / "suite.json").read_text())["results"]
    found = {(row["data"].partition(":")[0], Path(row["encoder"]).name, row["variant"]) for row in rows}
    for name in ("clip", "lit"):
        assert ("folders", name, "zeroshot") in found
        assert {("pairs", name, f"retrieval, {way}") for way in ("image to text", "text to image")} <= found
    assert ("folders", "run", "zero-shot by token logits") in found and not any(
        kind == "pairs" and name == "run" for kind, name, _ in found
    )
    assert "skipped: retrieval of run:" in output.output and "train lit" in output.output
    content["protocols"] = [{"protocol": "knn", "set": {"k": [1]}}]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    found_error = CliRunner().invoke(cli, arguments)
    assert "no protocol of the suite takes pairs:" in str(found_error.exception)
    content |= {"protocols": ["retrieval"], "data": [f"folders:{parts}"]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    assert "retrieval takes data with captions, and the suite has none" in str(
        CliRunner().invoke(cli, arguments).exception
    )
