"""Values of the evaluators' keys that would fail after the work are refused when the configuration is read."""

from typing import Any

import numpy as np
import pytest
import torch

from labels.config import load_pipeline
from labels.storage import UserError
from train.evals.captioner import SmallDecoder, make_decoder
from train.evals.kinds.knn import weighted_votes
from train.evals.kinds.probe import MaeProbe, cached_epochs, mae_probe
from train.evals.protocol import load_protocol

HUGE = 2**63


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("probe.mae.batch_size", 1),  # BatchNorm of one row
        ("probe.seeds", [0, 0]),  # one draw counted twice in mean and deviation
        ("probe.seeds", [HUGE]),
        ("probe.seeds", [-1]),
        ("fewshot.shots", [5, 5]),
        ("fewshot.seeds", [1, 2, 1]),
        ("knn.k", [10, 10]),
        ("knn.seeds", [HUGE]),
        ("retrieval.k", [1, 1]),
        ("zeroshot.seeds", [3, 3]),
        ("finetune.batch_size", 1),
        ("finetune.seeds", [HUGE]),
        ("caption.seeds", [HUGE]),
        ("caption.max_tokens", 1),
    ],
)
def test_values_that_are_refused_at_once(key: str, value: Any) -> None:
    name = key.partition(".")[0]
    with pytest.raises(UserError) as caught:
        load_protocol(name).settings(load_pipeline(overrides=[f"{key}={value}"]))
    assert key in str(caught.value)


def test_seeds_of_63_bits() -> None:
    load_pipeline(overrides=[f"train.runtime.seed={HUGE - 1}"])
    with pytest.raises(UserError, match=r"train\.runtime\.seed"):
        load_pipeline(overrides=[f"train.runtime.seed={HUGE}"])


@pytest.mark.parametrize("width", [1, 64, 130, 200, 250])
def test_the_built_in_decoder_has_heads_that_divide_its_width(width: int) -> None:
    model = make_decoder(
        "built-in", ["a cat", "a dog"], SmallDecoder(layers=1, width=width, vocabulary=257), 4, 0
    ).model
    assert width % model.config.n_head == 0 and model.config.n_head <= max(1, width // 64)


def test_a_probe_that_diverges_is_no_result() -> None:
    x, y = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), np.arange(8) % 2
    settings, cpu = MaeProbe(epochs=3, warmup_epochs=0, base_lr=1e30), torch.device("cpu")
    with pytest.raises(UserError, match=r"the probe has diverged: probe\.mae\.base_lr is 1e\+30"):
        mae_probe(cached_epochs(x, cpu), y, (x, y), 2, settings, 0, cpu)


@pytest.mark.parametrize("temperature", [1e-12, 1e-4, 0.07, 1e6])
def test_votes_are_finite_at_any_temperature(temperature: float) -> None:
    cosines = torch.tensor([[0.9, 0.8, 0.8, 0.7], [-0.1, -0.2, -0.2, -0.3]])
    neighbours = torch.tensor([[1, 0, 0, 2], [1, 0, 0, 2]])
    votes = weighted_votes(cosines, neighbours, 3, temperature)
    assert votes.isfinite().all()
    expected = np.exp((np.float64(cosines) - np.float64(cosines[:, :1])) / temperature)
    assert np.allclose(votes[:, 0], expected[:, 1] + expected[:, 2]) and np.allclose(votes[:, 1], 1)
    assert votes.argmax(1).tolist() == ([1, 1] if temperature < 0.1 else [0, 0])
