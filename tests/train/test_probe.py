"""The linear probe: the same minimum as scikit-learn, no look at the test part, honest counting."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from image_folders import encoded, write_folders
from labels.config import load_pipeline
from labels.settings import Features, Pipeline
from labels.storage import UserError
from run_factory import write_run
from train.encoders.encoder import EncoderSpec
from train.evals.data.sets import load_pair
from train.evals.features import Extractor, decode_crop
from train.evals.kinds import probe as probe_module
from train.evals.kinds.probe import (
    Axes,
    LinearProbe,
    MaeProbe,
    Probe,
    cached_epochs,
    draw_folds,
    fit,
    folded_probe,
    learning_rate,
    linear_probe,
    mae_probe,
    majority,
    make_optimizer,
    start_at_zero,
    stratified_split,
)
from train.evals.measure import run_protocol
from train.evals.protocol import top_k

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SETTINGS = Probe(weight_decay=[1e-1, 1e-2, 1e-3], seeds=[0, 1], max_iterations=100)


def blobs(n: int, width: int, classes: int, seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping Gaussian classes of unequal scale in each direction; the class means do not depend on `seed`."""
    centres = np.random.default_rng(99).normal(size=(classes, width))
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, n)
    return (centres[y] + spread * random.normal(size=(n, width))) * np.geomspace(0.01, 100, width) + 5, y


def test_blobs_are_deterministic_and_overlap() -> None:
    x, y = blobs(50, 6, 3, seed=0)
    assert np.array_equal(x, blobs(50, 6, 3, seed=0)[0]) and set(y) == {0, 1, 2}


@pytest.mark.parametrize("weight_decay", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("n", "width"), [(120, 12), (30, 50)])
def test_equal_to_scikit_learn_on_the_same_objective(weight_decay: float, n: int, width: int) -> None:
    x, y = blobs(n, width, 4, seed=1)
    raw = torch.from_numpy(x)
    axes = Axes.of(raw)
    found = fit(
        axes(raw),
        torch.from_numpy(y),
        weight_decay=weight_decay,
        curvature=axes.curvature,
        start=start_at_zero(width, 4, CPU),
        max_iterations=1000,
        tolerance=1e-6,
    )
    standard = (x - x.mean(0)) / x.std(0)
    reference = LogisticRegression(C=1 / (weight_decay * n), tol=1e-10, max_iter=20_000).fit(standard, y)
    weight = (axes.rotation @ found.weight).numpy()  # back to the standardised features
    assert np.allclose(
        weight, reference.coef_.T, atol=max(1e-4, 3e-7 / weight_decay)
    )  # error <= gradient / weight_decay
    probabilities = found.logits(axes(raw)).softmax(1).numpy()
    assert np.allclose(probabilities, reference.predict_proba(standard), atol=2e-5)
    for logged, coefficients, rounding in (
        (np.log(probabilities), weight, 1e-12),
        (reference.predict_log_proba(standard), reference.coef_, 1e-8),
    ):
        objective = -logged[np.arange(n), y].mean() + weight_decay / 2 * (coefficients**2).sum()
        assert found.loss == pytest.approx(objective, abs=rounding)


def test_float32_products_reach_the_same_minimum_in_chunks(monkeypatch) -> None:
    x, y = blobs(200, 10, 3, seed=2)
    raw, targets = torch.from_numpy(x), torch.from_numpy(y)
    losses = []
    for dtype, chunk in ((torch.float64, 2**25), (torch.float32, 2**25), (torch.float32, 3 * 7)):
        monkeypatch.setattr("train.evals.kinds.probe._CHUNK_LOGITS", chunk)
        axes = Axes.of(raw.to(dtype))
        options: dict[str, Any] = {"weight_decay": 1e-3, "curvature": axes.curvature, "max_iterations": 500}
        solution = fit(axes(raw.to(dtype)), targets, start=start_at_zero(10, 3, CPU), **options)
        assert solution.converged or dtype == torch.float32  # rounding may end the search a little earlier
        losses.append(solution.loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)


def test_constant_features_do_no_harm() -> None:
    x, y = blobs(100, 5, 3, seed=3)
    plain = linear_probe((x, y), (x, y), 3, SETTINGS, [0], CPU)
    flat = np.concatenate([x, np.full((100, 2), 0.1)], axis=1)
    assert linear_probe((flat, y), (flat, y), 3, SETTINGS, [0], CPU)[0].metrics == plain[0].metrics


def test_the_test_part_never_moves_the_choice() -> None:
    x, y = blobs(150, 20, 7, seed=4, spread=3)
    test_x, test_y = blobs(60, 20, 7, seed=5, spread=3)
    results = [
        linear_probe((x, y), test, 7, SETTINGS, [0, 1], CPU)
        for test in ((test_x, test_y), (test_x * 1e3, (test_y + 1) % 7), (test_x[:1], test_y[:1]))
    ]
    keys = ("weight_decay", "validation", "evaluations")
    chosen = [[[score.detail[key] for key in keys] for score in scores] for scores in results]
    assert chosen[0] == chosen[1] == chosen[2]
    assert results[0][0].metrics["top1"] != results[1][0].metrics["top1"]


def test_the_choice_is_by_validation_accuracy_and_of_equals_the_strongest(monkeypatch) -> None:
    x, y = blobs(60, 4, 3, seed=6)
    shares = iter([0.5, 0.7, 0.7])
    monkeypatch.setattr(probe_module, "top_k", lambda *_: next(shares))
    monkeypatch.setattr(probe_module, "accuracies", lambda *_: {"top1": 0.0})
    (score,) = linear_probe((x, y), (x, y), 3, SETTINGS, [0], CPU)
    assert score.detail["weight_decay"] == 1e-2
    assert score.detail["validation"] == {"0.1": 0.5, "0.01": 0.7, "0.001": 0.7}


def test_linear_probe_equals_scikit_learns_whole_protocol() -> None:
    """Refit on the whole training part with the chosen weight decay: scikit-learn's accuracy on the test part."""
    x, y = blobs(200, 15, 6, seed=7, spread=2)
    test_x, test_y = blobs(100, 15, 6, seed=8, spread=2)
    scores = linear_probe((x, y), (test_x, test_y), 6, SETTINGS, [0, 1, 2], CPU)
    assert [score.seed for score in scores] == [0, 1, 2]
    for score in scores:
        reference = LogisticRegression(C=1 / (score.detail["weight_decay"] * 200), tol=1e-8, max_iter=5000)
        reference.fit((x - x.mean(0)) / x.std(0), y)
        logits = reference.decision_function((test_x - x.mean(0)) / x.std(0))
        assert score.metrics["top1"] == pytest.approx((logits.argmax(1) == test_y).mean())
        order = np.argsort(-logits, axis=1)
        top5 = np.mean([label in row[:5] for label, row in zip(test_y, order, strict=True)])
        assert score.metrics["top5"] == pytest.approx(top5)
        assert score.detail["at_edge"] == (score.detail["weight_decay"] in (1e-1, 1e-3))


def test_a_negative_weight_decay_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"probe\.weight_decay\.0: -1\.0 is not allowed: Input should be greater than or equal to 0"
    ):
        LinearProbe().settings(load_pipeline(overrides=["probe.weight_decay=[-1.0]"]))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.floats(0.05, 0.95), st.integers(0, 3))
def test_the_split_is_stratified_disjoint_and_seeded(labels: list[int], fraction: float, seed: int) -> None:
    y = np.array(labels)
    if np.bincount(y).max() < 2:
        with pytest.raises(UserError, match="no class of the training part has two samples"):
            stratified_split(y, fraction, seed)
        return
    fitting, validation = stratified_split(y, fraction, seed)
    assert sorted([*fitting, *validation]) == list(range(len(y)))
    assert set(y[fitting]) == set(labels)
    for label in set(labels):
        count, held = (y == label).sum(), (y[validation] == label).sum()
        assert held == 0 if count == 1 else 1 <= held <= count - 1 and abs(held - fraction * count) <= 1
    assert all(
        np.array_equal(a, b) for a, b in zip((fitting, validation), stratified_split(y, fraction, seed), strict=True)
    )


def test_other_seeds_split_otherwise() -> None:
    y = np.arange(100) % 4
    assert not np.array_equal(stratified_split(y, 0.2, 0)[1], stratified_split(y, 0.2, 1)[1])


def test_top_k_equals_a_naive_count() -> None:
    random = np.random.default_rng(0)
    logits, y = random.normal(size=(40, 8)), random.integers(0, 8, 40)
    for k in (1, 3, 5):
        naive = np.mean([y[row] in sorted(range(8), key=lambda c: -logits[row, c])[:k] for row in range(40)])
        assert top_k(torch.from_numpy(logits), torch.from_numpy(y), k) == pytest.approx(naive)


def test_majority_is_the_training_parts() -> None:
    train_y, test_y = np.array([2, 2, 2, 0, 1]), np.array([0, 0, 0, 2])
    assert majority(train_y, test_y, classes=3) == {"top1": 0.25, "top5": None}
    train_y = np.repeat(np.arange(7), [9, 8, 7, 6, 5, 1, 2])
    assert majority(train_y, np.array([0, 5, 6, 4]), classes=7) == {"top1": 0.25, "top5": 0.5}


def write_colours(directory: Path, seed: int, per_class: int) -> Path:
    """Images whose mean colour gives the class away, with some noise."""
    random = np.random.default_rng(seed)
    write_folders(directory, {"blue": per_class, "green": per_class, "red": 2 * per_class}, start=seed * 1000)
    for file in sorted(directory.rglob("*.png")):
        colour = random.integers(0, 90, 3) + 120 * np.array(
            [file.parent.name == name for name in ("red", "green", "blue")]
        )
        file.write_bytes(encoded(tuple(int(value) for value in colour)))
    return directory


def run_probe(
    specs: list[str], train_dir: Path, test_dir: Path, probe: Probe, out: Path | None = None
) -> dict[str, Any]:
    pipeline = Pipeline(evaluators={"probe": probe.model_dump()})
    requested = [EncoderSpec(spec) for spec in specs]
    return run_protocol(
        LinearProbe(), requested, lambda: load_pair(train_dir, test_dir), pipeline, Extractor(CPU, Features()), out
    )


def test_run_probe_reports_every_encoder(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    train_dir, test_dir = write_colours(tmp_path / "train", 1, 8), write_colours(tmp_path / "test", 2, 4)
    write_run(tmp_path / "run", 5)
    out = tmp_path / "deep" / "probe.json"
    specs = [f"run:{tmp_path}/run", f"untrained:{tmp_path}/run", "pixels:4"]
    result = run_probe(specs, train_dir, test_dir, SETTINGS, out)
    assert json.loads(out.read_text()) == result
    assert result["protocol"] == "L-BFGS logistic regression on cached features, stand-in for MAE's recipe"
    assert result["classes"] == ["blue", "green", "red"] and result["train"]["samples"] == 32
    assert (
        result["test"]["samples_per_class"] == {"blue": 4, "green": 4, "red": 8} and result["test_images_in_train"] == 0
    )
    rows = {row["encoder"]: row for row in result["results"]}
    assert list(rows) == ["majority class", *specs]
    assert rows["majority class"]["top1"] == 0.5
    assert rows["pixels:4"]["top1"] > 0.9 and rows["pixels:4"]["description"]["architecture"] == "raw pixels"
    assert rows["pixels:4"]["description"]["layer"] == "none" and rows[specs[0]]["description"]["pool"] == "avg"
    drawn = {spec: {one["encoder_weights"] for one in rows[spec]["seeds"]} for spec in specs}
    assert [len(drawn[spec]) for spec in specs] == [1, 2, 1]  # only the untrained trunk is drawn again for each seed
    assert rows[specs[1]]["seed_varies"] == "initialisation and what is drawn"
    top1 = [one["top1"] for one in rows[specs[1]]["seeds"]]
    assert rows[specs[1]]["top1"] == pytest.approx(np.mean(top1))
    assert rows[specs[1]]["top1_std"] == pytest.approx(np.std(top1, ddof=1))
    printed = capsys.readouterr().out
    assert "majority class" in printed and "pixels:4" in printed and "50.0" in printed


def test_the_validation_part_is_stored_with_the_result(tmp_path: Path) -> None:
    train_dir, test_dir = write_colours(tmp_path / "train", 1, 5), write_colours(tmp_path / "test", 2, 2)
    result = run_probe(["pixels:2"], train_dir, test_dir, SETTINGS, tmp_path / "probe.json")
    table = pq.read_table(tmp_path / "probe.splits.parquet").to_pylist()
    data, seeds = load_pair(train_dir, test_dir), result["results"][1]["seeds"]
    for seed, one in zip((0, 1), seeds, strict=True):
        rows = stratified_split(data.train.targets, SETTINGS.validation_fraction, seed)[1]
        assert [row["key"] for row in table if row["seed"] == seed] == [data.train.keys[row] for row in rows]
        assert one["split"] == len(rows)
    assert all(row["class"] == row["key"].split("/")[0] and row["encoder"] == "pixels:2" for row in table)
    assert seeds[0]["split_fingerprint"] != seeds[1]["split_fingerprint"]


def test_run_probe_refuses_before_it_works(tmp_path: Path) -> None:
    train_dir, test_dir = write_colours(tmp_path / "train", 1, 2), write_colours(tmp_path / "test", 2, 1)
    with pytest.raises(UserError, match="is a directory"):
        run_probe(["pixels:4"], train_dir, test_dir, SETTINGS, tmp_path)
    single = write_folders(tmp_path / "single", {"blue": 1, "green": 1})
    with pytest.raises(UserError, match="no class of the training part has two samples"):
        run_probe(["pixels:4"], single, write_folders(tmp_path / "held", {"blue": 1}, start=70), SETTINGS)


MAE = MaeProbe(epochs=20, batch_size=40, base_lr=0.1, warmup_epochs=4, augment=False)


def test_maes_schedule() -> None:
    settings = MaeProbe()
    peak = 0.1 * 16_384 / 256
    assert [learning_rate(settings, 16_384, epoch) for epoch in (0, 5, 10, 50, 90)] == pytest.approx(
        [0, peak / 2, peak, peak / 2, 0]
    )
    with pytest.raises(UserError, match="warmup_epochs is 90, epochs 90"):
        LinearProbe().settings(load_pipeline(overrides=["probe.mae.warmup_epochs=90"]))


def test_lars_takes_maes_steps() -> None:
    """main_linprobe.py's util/lars.py: trust ratio and momentum for matrices, momentum alone for vectors."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3)
    optimizer = make_optimizer(linear)
    weights = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}
    moments = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step, rate in enumerate((0.5, 2.0, 1.0)):
        gradients = {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(step))
            for name, value in weights.items()
        }
        for name, parameter in linear.named_parameters():
            parameter.grad = gradients[name].clone()
            ratio = 0.001 * weights[name].norm() / gradients[name].norm() if parameter.ndim > 1 else 1.0
            moments[name] = 0.9 * moments[name] + gradients[name] * ratio
            weights[name] = weights[name] - rate * moments[name]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for name, parameter in linear.named_parameters():
        assert torch.allclose(parameter, weights[name], atol=1e-6)


def test_mae_probe_equals_a_plain_loop() -> None:
    x, y = blobs(90, 6, 3, seed=1)
    test_x, test_y = blobs(60, 6, 3, seed=2)
    x, test_x = x.astype(np.float32), test_x.astype(np.float32)
    settings = MAE.model_copy(update={"epochs": 5, "warmup_epochs": 2})
    score = mae_probe(cached_epochs(x, CPU), y, (test_x, test_y), 3, settings, 7, CPU)

    weight = torch.empty(3, 6)
    torch.nn.init.trunc_normal_(weight, std=0.01, generator=torch.Generator().manual_seed(7))
    bias, moments = torch.zeros(3), [torch.zeros(3, 6), torch.zeros(3)]
    mean, variance = torch.zeros(6), torch.ones(6)
    for epoch in range(5):
        order = np.random.default_rng([7, epoch]).permutation(90)
        for step in range(2):  # ten of ninety sit out
            rows = order[40 * step : 40 * step + 40]
            batch, targets = torch.from_numpy(x[rows]), torch.from_numpy(y[rows])
            mean = 0.9 * mean + 0.1 * batch.mean(0)
            variance = 0.9 * variance + 0.1 * batch.var(0)
            normed = (batch - batch.mean(0)) / (batch.var(0, correction=0) + 1e-6).sqrt()
            error = (normed @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(targets, 3)
            gradients = [error.T @ normed / 40, error.mean(0)]
            gradients[0] = gradients[0] * 0.001 * weight.norm() / gradients[0].norm()
            moments = [0.9 * moment + gradient for moment, gradient in zip(moments, gradients, strict=True)]
            rate = learning_rate(settings, 40, epoch + step / 2)
            weight, bias = weight - rate * moments[0], bias - rate * moments[1]
    logits = (torch.from_numpy(test_x) - mean) / (variance + 1e-6).sqrt() @ weight.T + bias
    assert score.metrics["top1"] == pytest.approx(top_k(logits, torch.from_numpy(test_y), 1))
    assert score.detail["batch_size"] == 40
    loss = torch.nn.functional.cross_entropy(
        normed @ (weight + rate * moments[0]).T + bias + rate * moments[1], targets
    )
    assert score.detail["final_loss"] == pytest.approx(float(loss), abs=1e-5)


def test_maes_recipe_learns_with_and_without_augmentation(tmp_path: Path, monkeypatch) -> None:
    train_dir, test_dir = write_colours(tmp_path / "train", 1, 4), write_colours(tmp_path / "test", 2, 4)
    draws = []

    def crop(encoded: bytes, side: int, *draw: int) -> np.ndarray:
        draws.append(draw)
        return decode_crop(encoded, side, *draw)

    monkeypatch.setattr(probe_module, "decode_crop", crop)
    mae = MaeProbe(epochs=60, batch_size=4, base_lr=200.0, warmup_epochs=4)
    variants = set()
    for augment in (False, True):
        result = run_probe(
            ["pixels:2"],
            train_dir,
            test_dir,
            Probe(recipe="mae", seeds=[3], mae=mae.model_copy(update={"augment": augment})),
        )
        assert ("random resized crops and flips" in result["protocol"]) == augment and "LARS" in result["protocol"]
        row = result["results"][1]
        assert row["top1"] > 0.8 and "split" not in row["seeds"][0]
        variants.add(row["variant"])
    assert len(variants) == 2
    assert sorted(draws) == [
        (3, epoch, row) for epoch in range(60) for row in range(16)
    ]  # every image once an epoch, with its own crop


@given(st.lists(st.integers(0, 3), min_size=6, max_size=60), st.integers(2, 5), st.integers(0, 9))
def test_folds_are_even_in_each_class_and_keep_groups_together(labels: list[int], folds: int, seed: int) -> None:
    y = np.array(labels)
    alone = draw_folds(y, np.arange(len(y)), folds, seed)
    for rows in (alone, *(alone[y == label] for label in set(labels))):
        counts = np.bincount(rows, minlength=folds)
        assert counts.max() - counts.min() <= 1
    groups = np.unique(np.random.default_rng(seed).integers(0, len(y), len(y)), return_inverse=True)[1]
    together = draw_folds(y, groups, folds, seed)
    assert all(len(set(together[groups == group].tolist())) == 1 for group in groups)


def test_each_image_is_tested_once_by_a_probe_of_the_other_folds() -> None:
    (x, y), settings = blobs(90, 6, 3, seed=1), SETTINGS.model_copy(update={"folds": 3})
    groups = np.arange(90)
    scores = folded_probe((x, y), groups, 3, settings, [0, 1], CPU)
    assert len(scores) == 2 and scores[0].trials == 90 and scores[0].variant == "probe, 3 folds"
    for score in scores:
        folds, expected = draw_folds(y, groups, 3, score.seed), np.zeros(90, bool)
        for fold in range(3):
            other, tested = folds != fold, folds == fold
            decay = score.detail["weight_decay"][fold]
            own = stratified_split(y[other], settings.validation_fraction, score.seed)
            raw = torch.from_numpy(x[other])
            axes = Axes.of(raw)
            chosen = probe_module.sweep(axes(raw), y[other], own, 3, axes.curvature, settings)
            assert decay == max(chosen, key=lambda value: (chosen[value], value))
            scaled = [(part - x[other].mean(0)) / x[other].std(0) for part in (x[other], x[tested])]
            reference = LogisticRegression(C=1 / (decay * other.sum()), max_iter=5000, tol=1e-8)
            expected[tested] = reference.fit(scaled[0], y[other]).predict(scaled[1]) == y[tested]
        assert score.correct is not None and np.array_equal(score.correct, expected)
        assert score.metrics == {"top1": expected.mean(), "top5": None}


def test_folds_take_both_parts_and_keep_equal_images_together(tmp_path: Path) -> None:
    train_dir, test_dir = (write_colours(tmp_path / name, seed, 6) for name, seed in (("train", 0), ("test", 1)))
    twin = next((train_dir / "red").iterdir())
    (twin.parent / f"twin{twin.suffix}").write_bytes(twin.read_bytes())
    settings = Probe(folds=4, seeds=[0], weight_decay=[0.1])
    content = run_probe(["pixels:2"], train_dir, test_dir, settings, tmp_path / "probe.json")
    data = load_pair(train_dir, test_dir)
    images = len(data.train) + len(data.test)
    assert len(data.groups) == images and data.groups.max() + 2 == images
    twins = [data.train.keys.index(f"red/{name}") for name in (twin.name, f"twin{twin.suffix}")]
    assert data.groups[twins[0]] == data.groups[twins[1]]
    row = content["results"][1]
    assert row["variant"] == "probe, 4 folds" and row["seeds"][0]["folds"] == 4 and content["settings"]["folds"] == 4
    assert "4 folds over both parts" in content["protocol"]
    assert row["top1_standard_error"] == pytest.approx((row["top1"] * (1 - row["top1"]) / images) ** 0.5)


def test_folds_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folds is 3, recipe mae; allowed: folds with the recipe lbfgs"):
        LinearProbe().settings(load_pipeline(None, ["probe.folds=3", "probe.recipe=mae"]))
    folders = (write_colours(tmp_path / name, seed, 1) for name, seed in (("train", 0), ("test", 1)))
    data = load_pair(*folders)
    with pytest.raises(UserError, match=r"probe.folds is 99, the data has \d+ different images"):
        LinearProbe().check(data, Probe(folds=99))
