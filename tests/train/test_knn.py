"""Nearest neighbours against a loop over samples: DINO's weighted vote and the majority."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_folders import encoded, write_folders
from labels.settings import Features, Pipeline
from labels.storage import UserError
from run_factory import write_run
from train.encoders.encoder import EncoderSpec
from train.evals.data.sets import load_pair
from train.evals.features import Extractor
from train.evals.kinds import knn
from train.evals.kinds.knn import Knn, NearestNeighbours, majority_votes, nearest, weighted_votes
from train.evals.measure import run_protocol


def naive(
    train_x: np.ndarray, train_y: np.ndarray, query: np.ndarray, classes: int, k: int, temperature: float
) -> tuple[np.ndarray, int]:
    """Weighted votes of every class, and the majority's class, for one query."""
    cosines = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in train_x]
    neighbours = sorted(range(len(train_x)), key=lambda row: -cosines[row])[:k]
    votes, counts = np.zeros(classes), [0] * classes
    for row in neighbours:
        votes[train_y[row]] += np.exp(cosines[row] / temperature)
        counts[train_y[row]] += 1
    return votes, counts.index(max(counts))


@pytest.mark.parametrize("k", [1, 10, 20])
@pytest.mark.parametrize("chunk", [2**26, 100])
def test_equal_to_a_naive_implementation(k: int, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(knn, "_CHUNK_COSINES", chunk)
    random = np.random.default_rng(k)
    centres = random.normal(size=(7, 12))
    train_y, test_y = random.integers(0, 7, 80), random.integers(0, 7, 30)
    train_x, test_x = (centres[y] + random.normal(size=(len(y), 12)) for y in (train_y, test_y))
    cosines, rows = nearest(torch.from_numpy(train_x), torch.from_numpy(test_x), 20)
    classes_of = torch.from_numpy(train_y)[rows[:, :k]]
    votes = weighted_votes(cosines[:, :k], classes_of, 7, 0.07).numpy()
    plain = majority_votes(classes_of, 7).argmax(1).tolist()
    for query, found, chosen in zip(test_x, votes, plain, strict=True):
        expected, majority = naive(train_x, train_y, query, 7, k, 0.07)
        assert np.allclose(found / found.sum(), expected / np.sum(expected), rtol=1e-9) and chosen == majority


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_of_equal_counts_the_smaller_class_wins(neighbours: list[int]) -> None:
    counts = [neighbours.count(label) for label in range(5)]
    votes = majority_votes(torch.tensor([neighbours]), 5)
    assert int(votes.argmax(1)) == counts.index(max(counts)) and len(set(votes[0].tolist())) == 5


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for part, count in (("train", 6), ("test", 3)):
        write_folders(tmp_path / part, {"dark": count, "light": count})
        for index, file in enumerate(sorted((tmp_path / part).rglob("*.png"))):
            light = file.parent.name == "light"
            file.write_bytes(encoded((200, 20 + index, 10 + count) if light else (10 + count, 20 + index, 200)))
    return tmp_path / "train", tmp_path / "test"


def test_results_of_the_command(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    pipeline, extract = (
        Pipeline(evaluators={"knn": Knn(k=[3, 5]).model_dump()}),
        Extractor(torch.device("cpu"), Features()),
    )
    requested = [EncoderSpec("pixels:2"), EncoderSpec(f"untrained:{tmp_path}/run")]
    result = run_protocol(
        NearestNeighbours(), requested, lambda: load_pair(*folders), pipeline, extract, tmp_path / "knn.json"
    )
    rows = {(row["encoder"], row["variant"]): row for row in result["results"]}
    variants = ["3-nn", "3-nn majority", "5-nn", "5-nn majority"]
    assert [variant for _, variant in rows] == ["majority class", *variants, *variants]
    assert rows["pixels:2", "3-nn"]["top1"] == 1.0 and rows["pixels:2", "3-nn"]["top1_std"] is None
    assert len(rows[requested[1].spec, "5-nn"]["seeds"]) == 3  # drawn again for each seed
    assert not (tmp_path / "knn.splits.parquet").exists()  # nothing is drawn from the data


def test_k_beyond_the_data_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError) as caught:
        NearestNeighbours().check(load_pair(*folders), Knn(k=[10, 20]))
    text = str(caught.value)
    assert "knn.k is 20, the training part has 12 images" in text and "--set knn.k=[10]" in text
