"""The 10-shot protocol: big_vision's ridge regression, by another solver; its shots, stored; classes that are too
small.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_folders import encoded, write_folders
from labels.settings import Features, Pipeline
from labels.storage import UserError
from train.encoders.encoder import EncoderSpec
from train.evals.data.sets import load_pair
from train.evals.features import Extractor
from train.evals.kinds.fewshot import FewShot, Fewshot, draw_shots, fit_ridge
from train.evals.measure import run_protocol


def dense_solve(x: np.ndarray, y: np.ndarray, test: np.ndarray, classes: int, l2: float, *, dual: bool) -> np.ndarray:
    """The formula of the protocol as it stands, by a dense linear solve."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    design, unseen = (np.hstack([(part - mean) / std, np.full((len(part), 1), 100.0)]) for part in (x, test))
    targets = 2.0 * np.eye(classes)[y] - 1.0
    if dual:
        weight = design.T @ np.linalg.solve(design @ design.T + l2 * np.eye(len(x)), targets)
    else:
        weight = np.linalg.solve(design.T @ design + l2 * np.eye(design.shape[1]), design.T @ targets)
    return unseen @ weight


@pytest.mark.parametrize(("samples", "width"), [(60, 20), (20, 60), (21, 20), (20, 20)])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("l2", [1024.0, 1.0])
def test_equal_to_an_independent_dense_solve(samples: int, width: int, dual: bool, l2: float) -> None:
    random = np.random.default_rng(samples + width)
    x, test = random.normal(3, 2, (samples, width)), random.normal(3, 2, (15, width))
    x[:, 0] = test[:, 0] = 1.5  # a constant feature
    y = np.arange(samples) % 4
    ridge = fit_ridge(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), 4, l2)
    expected = dense_solve(x.astype(np.float32).astype(np.float64), y, test, 4, l2, dual=dual)
    assert np.abs(ridge.logits(torch.from_numpy(test)).numpy() - expected).max() < 1e-6


@given(st.lists(st.integers(0, 4), min_size=5, max_size=80), st.integers(0, 5), st.integers(1, 4))
def test_shots_are_drawn_by_the_rule(labels: list[int], seed: int, shots: int) -> None:
    y = np.array([*labels, *range(5)])
    random = np.random.default_rng(seed)
    expected = [int(row) for label in range(5) for row in random.permutation(np.where(y == label)[0])[:shots]]
    assert draw_shots(y, 5, shots, seed).tolist() == expected


def test_fewer_shots_are_the_first_of_more() -> None:
    y = np.repeat(np.arange(3), 20)
    one, five = draw_shots(y, 3, 1, 2), draw_shots(y, 3, 5, 2)
    assert one.tolist() == five[::5].tolist() and not np.array_equal(five, draw_shots(y, 3, 5, 3))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        write_folders(tmp_path / part, {"blue": count, "red": count + 2})
        for file in sorted((tmp_path / part).rglob("*.png")):
            shade = random.integers(0, 120, 3) + 120 * np.array(
                [file.parent.name == name for name in ("red", "", "blue")]
            )
            file.write_bytes(encoded(tuple(int(value) for value in shade)))
    return tmp_path / "train", tmp_path / "test"


def fewshot(folders: tuple[Path, Path], settings: Fewshot, out: Path | None = None) -> dict:
    pipeline, extract = (
        Pipeline(evaluators={"fewshot": settings.model_dump()}),
        Extractor(torch.device("cpu"), Features()),
    )
    return run_protocol(FewShot(), [EncoderSpec("pixels:2")], lambda: load_pair(*folders), pipeline, extract, out)


def test_accuracies_and_shots_are_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "few.json"
    result = fewshot(folders, Fewshot(shots=[2, 5], seeds=[0, 1], l2=8.0), out)
    assert json.loads(out.read_text()) == result and "l2 8" in result["protocol"]
    data = load_pair(*folders)
    images = [
        np.stack([np.array([int(c) for c in _mean(place.read())]) for place in part.encoded])
        for part in (data.train, data.test)
    ]
    x, test = (np.repeat(part / 255, 4, axis=1).astype(np.float32).astype(np.float64) for part in images)
    table = pq.read_table(tmp_path / "few.splits.parquet").to_pylist()
    for row, shots in zip(result["results"][1:], (2, 5), strict=True):
        assert row["variant"] == f"{shots}-shot"
        for one, seed in zip(row["seeds"], (0, 1), strict=True):
            rows = draw_shots(data.train.targets, 2, shots, seed)
            stored = [line["key"] for line in table if (line["variant"], line["seed"]) == (f"{shots}-shot", seed)]
            assert stored == [data.train.keys[index] for index in rows]
            guesses = dense_solve(x[rows], data.train.targets[rows], test, 2, 8.0, dual=True).argmax(1)
            assert one["top1"] == pytest.approx((guesses == data.test.targets).mean())
        assert row["top1_std"] == pytest.approx(np.std([one["top1"] for one in row["seeds"]], ddof=1))


def _mean(image: bytes) -> tuple[int, ...]:
    return Image.open(io.BytesIO(image)).convert("RGB").getpixel((0, 0))  # type: ignore[return-value]


def test_a_class_with_too_few_images_is_named(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError) as caught:
        fewshot(folders, Fewshot(shots=[2, 7]))
    text = str(caught.value)
    assert "1 of 2 classes have less than 7 training images: blue (6)" in text
    assert "shots up to 6, the smallest class" in text and "--set fewshot.shots=[6]" in text
