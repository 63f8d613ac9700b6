"""Held-out samples, the validation loss, visual weights: sums and calibration against naive ones, and whole runs."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from labels.config import load_pipeline
from labels.idf import Sums, calibrate, combined, read_visual
from labels.manifest import PAD_ID
from labels.settings import Loss, Validation
from labels.storage import UserError
from train import trainer
from train.checkpoint import checkpoint_folders
from train.data.dataset import BetonSet
from train.data.open import subset_samples
from train.data.order import Order
from train.distributed import World
from train.held_out import hold_out
from train.losses.gains import GainSums
from train.losses.head import HeadLoss
from train.trainer import train_run
from trainer_factory import SAMPLES, assert_same_run, lines, losses, small_config, small_out
from trainer_process import train

HELD_OUT = ("train.validation={held_out: 0.2, every_samples: 480, samples: 20}",)
VISUAL = (*HELD_OUT, "train.weights=visual", "train.visual={at: [0.25, 0.5], samples: 20}")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_out(tmp_path_factory.mktemp("visual"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def reference(out: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with visual weights that nothing disturbed."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert train_run(out, run, load_pipeline(config, VISUAL))
    return run


# -- the sums and their calibration


def random_batch(random: np.random.Generator, rows: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    label_ids = np.full((rows, 5), PAD_ID, np.int32)
    for row in label_ids[: rows - 1]:  # the last one has no label
        count = random.integers(1, 6)
        row[:count] = random.choice(vocabulary, count, replace=False)
    features, weight = random.standard_normal((rows, 8)), random.standard_normal((vocabulary, 8))
    return *(torch.tensor(part, dtype=torch.float32) for part in (features, weight)), torch.tensor(label_ids)


@pytest.mark.parametrize("distribution", [True, False])
@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_sums_equal_a_naive_computation_in_float64(distribution: bool, memory: int) -> None:
    features, weight, label_ids = random_batch(np.random.default_rng(0), rows=40, vocabulary=12)
    bias = torch.linspace(-1, 1, 12)
    parts, backwards = [], torch.arange(40).flip(0)
    for order in (torch.arange(40), backwards):
        sums = GainSums(12, torch.device("cpu"), distribution=distribution, memory=memory)
        for batch in order.split(7):
            sums.add(features[batch], weight, bias, label_ids[batch])
        parts.append(sums.of_all_ranks())
    logits = features.double() @ weight.double().T + bias.double()
    log_p = (logits.log_softmax(1) if distribution else functional.logsigmoid(logits)).numpy()
    has = np.array([[token in row for token in range(12)] for row in label_ids.tolist()])
    gains = calibrate(parts[0], has.sum(0))
    for token in range(12):
        own = log_p[has[:, token], token]
        assert gains.gain[token] == pytest.approx(own.mean() - log_p[:39, token].mean(), abs=1e-5)
        assert gains.standard_error[token] == pytest.approx(own.std(ddof=1) / len(own) ** 0.5, rel=1e-4)
    assert parts[0].samples == 39 and np.array_equal(parts[0].count, has.sum(0))
    np.testing.assert_allclose(parts[0].bearing, parts[1].bearing, rtol=1e-12)
    np.testing.assert_allclose(parts[0].everywhere, parts[1].everywhere, rtol=1e-12)


def test_rare_tokens_are_pulled_towards_the_mean_of_their_frequency() -> None:
    """Of 400 tokens half are visible by 1 nat; the calibrated gains are nearer to the truth than the measured ones."""
    random = np.random.default_rng(0)
    truth = np.repeat([0.0, 1.0], 200)
    count = random.integers(1, 12, 400)
    values = [truth[token] + random.normal(0, 2, count[token]) for token in range(400)]
    bearing, squares = (np.array([(value**power).sum() for value in values]) for power in (1, 2))
    frequency = np.full(400, 100)
    sums = Sums(1000, np.zeros(400), count, bearing, squares)
    gains = calibrate(sums, frequency)
    errors = [((found - truth) ** 2).mean() for found in (gains.visual_gain, np.maximum(gains.gain, 0))]
    assert errors[0] < 0.5 * errors[1]
    assert np.abs(gains.visual_gain[count == 1] - 0.5).mean() < np.abs(gains.visual_gain[count > 8] - 0.5).mean()
    unseen = calibrate(Sums(1000, np.zeros(400), np.where(truth == 1, count, 0), bearing, squares), frequency)
    assert (unseen.visual_gain[:200] == unseen.visual_gain[0]).all() and unseen.visual_gain[0] > 0.5
    assert np.isnan(unseen.gain[0])


def test_weights_are_the_product_with_idf_or_another_combination() -> None:
    idf, gain = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.25, 1.0])
    assert combined(idf, gain, "idf*gain", 0.0).tolist() == [0.0, 0.5, 3.0]
    assert combined(idf, gain, "idf*sqrt(gain)", 0.0).tolist() == [0.0, 1.0, 3.0]
    assert combined(idf, gain, "gain", 0.0).tolist() == [0.0, 0.25, 1.0]
    assert combined(idf, np.zeros(3), "idf*gain", 0.01) == pytest.approx(0.01 * idf), "no gain: as IDF"


def test_an_observed_head_has_no_loss_and_is_itself_again_afterwards() -> None:
    features, weight, label_ids = random_batch(np.random.default_rng(1), rows=6, vocabulary=12)
    head, bias, seen = HeadLoss(Loss(), torch.ones(12)), torch.zeros(12), []
    before = head(features, weight, bias, label_ids)
    with torch.no_grad(), head.observed(lambda *operands: seen.append(operands)):
        assert head(features, weight, bias, label_ids) == 0
    assert len(seen) == 1 and torch.equal(head(features, weight, bias, label_ids), before)


# -- which samples are held out


def numbers(betons: BetonSet) -> list[int]:
    samples, _ = Order(betons.sizes, betons.quotas).take(0, betons.samples)
    return sorted(betons.file_samples(samples).tolist())


@pytest.mark.parametrize("subset", [None, "width >= 0", "key < '3'"])
@pytest.mark.parametrize("held_out", [0.5, 0.1, 0.02, "key LIKE '%7'"])
def test_training_and_held_out_samples_are_all_samples_and_have_none_in_common(
    out: Path, subset: str | None, held_out: float | str
) -> None:
    betons = BetonSet(out)
    if subset:
        betons.restrict(*subset_samples(betons, subset, None))
    everything = numbers(betons)
    pipeline = load_pipeline()
    settings = pipeline.train.model_copy(update={"validation": Validation(held_out=held_out)})
    before = betons.identity
    held = hold_out(betons, settings, World(0, 1, torch.device("cpu")), lambda: False)
    assert held is not None and betons.identity != before
    trained, kept_out = numbers(betons), numbers(held)
    assert not set(trained) & set(kept_out)
    if isinstance(held_out, float):
        assert sorted(trained + kept_out) == everything
        assert len(kept_out) == pytest.approx(held_out * len(everything), abs=2 + 0.2 * len(everything) * bool(subset))


def test_a_repeated_sample_is_wholly_on_one_side(out: Path) -> None:
    betons = BetonSet(out)
    betons.restrict(np.repeat(np.arange(SAMPLES), 3), "three times")
    held = betons.hold_out(4)
    assert not set(numbers(betons)) & set(numbers(held))
    assert (betons.samples, held.samples) == (225, 75)


# -- whole runs


def test_validation_does_not_change_what_is_trained(out: Path, config: Path, tmp_path: Path) -> None:
    for name, every in (("often", 96), ("never", 10**9)):
        settings = f"train.validation={{held_out: 0.2, every_samples: {every}, samples: 20}}"
        assert train_run(out, tmp_path / name, load_pipeline(config, [settings]))
    assert_same_run(tmp_path / "often", tmp_path / "never")
    found = [line for line in lines(tmp_path / "often") if "validation_loss" in line]
    assert [line["step"] for line in found] == list(range(6, 121, 6))
    assert found[-1]["validation_loss"] < found[0]["validation_loss"]
    assert found[-1]["validation_gain"] - found[0]["validation_gain"] == pytest.approx(
        found[0]["validation_loss"] - found[-1]["validation_loss"]
    )
    assert len([line for line in lines(tmp_path / "never") if "validation_loss" in line]) == 1, "after the last step"


def test_visual_weights_come_after_their_share_of_the_budget(reference: Path, out: Path) -> None:
    names = [path.name for path in sorted((reference / "visual").iterdir())]
    assert names == ["samples-000000000480.parquet", "samples-000000000960.parquet"]
    table, facts = read_visual(reference / "visual" / names[0])
    assert facts["samples_seen"] == 480 and facts["tokenizer_fingerprint"]
    idf = pq.read_table(out / "idf.parquet")
    assert table["token"].to_pylist() == idf["token"].to_pylist()
    assert np.allclose(table["weight"], table["idf"].to_numpy() * table["visual_gain"].to_numpy())
    assert [line["step"] for line in lines(reference) if "visible_tokens" in line] == [30, 60]


@contextmanager
def stopping_after(step: int) -> Iterator[Callable[[], bool]]:
    """In place of `stop_signals`: it is asked after each step."""
    calls = iter(range(step - 1))
    yield lambda: next(calls, None) is None


def test_a_run_with_visual_weights_resumes_to_the_bit(
    reference: Path, out: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From checkpoints before, between and after the two measurements, also right before one."""
    for step in (12, 30, 36, 66):
        run = tmp_path / str(step)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "stop_signals", lambda step=step: stopping_after(step))
            assert not train_run(out, run, load_pipeline(config, VISUAL))
        assert len(losses(run)) == step
        assert train_run(out, run, load_pipeline(config, VISUAL))
        assert_same_run(run, reference)
        first = sorted((run / "visual").iterdir())[0]
        assert first.read_bytes() == (reference / "visual" / first.name).read_bytes()


def test_a_lost_table_of_weights_is_an_error(reference: Path, out: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    shutil.rmtree(checkpoint_folders(run)[-1])
    shutil.rmtree(run / "visual")
    with pytest.raises(UserError, match=r"samples-000000000960\.parquet is missing"):
        train_run(out, run, load_pipeline(config, VISUAL))


def test_weigh_measures_the_held_out_samples_and_a_run_takes_the_table(
    reference: Path, out: Path, config: Path, tmp_path: Path
) -> None:
    table = tmp_path / "visual.parquet"
    code, said = train("weigh", reference, "--out", table, output=tmp_path / "said")
    assert code == 0 and "20 samples" in said and "most visible of the frequent tokens" in said, said
    weighted = load_pipeline(config, [f"train.weights={table}"])
    assert train_run(out, tmp_path / "run", weighted)
    assert train_run(out, tmp_path / "plain", load_pipeline(config))
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")
    state = json.loads((checkpoint_folders(tmp_path / "run")[-1] / "state.json").read_text())
    assert state["idf"] != json.loads((checkpoint_folders(tmp_path / "plain")[-1] / "state.json").read_text())["idf"]
    code, said = train("weigh", tmp_path / "plain", output=tmp_path / "said")
    assert code == 2 and "has no held-out samples" in said and "--on OTHER_OUT" in said
    code, said = train("weigh", tmp_path / "plain", "--on", out, output=tmp_path / "said")
    assert code == 2 and "shares 3 of its 3 shards with the training set" in said


def test_visual_weights_without_held_out_samples_are_refused(config: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.held_out is null"):
        load_pipeline(config, ["train.weights=visual"])


@pytest.mark.parametrize(("key", "value"), [("train.validation.held_out", "0.2"), ("train.weights", "visual.parquet")])
def test_held_out_samples_and_weights_are_those_of_classification(
    out: Path, config: Path, tmp_path: Path, key: str, value: str
) -> None:
    code, said = train(
        "clip",
        "--beton",
        out,
        "--out",
        tmp_path / "run",
        "--config",
        config,
        "--set",
        f"{key}={value}",
        output=tmp_path / "said",
    )
    assert code == 2 and f"{key} is set, but `train clip` has no classification head" in said, said
