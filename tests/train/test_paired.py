"""Encoders compared image by image: the bootstrap against a plain one, and where its result is shown."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import binomtest

from image_folders import colours
from page_checks import check_page
from run_factory import write_run
from train.cli import cli
from train.evals.measure import read_results
from train.evals.paired import PerImage, Versus, compare, mcnemar, pack, paired_difference, unpack

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(images: int, share: float, seeds: int, seed: int) -> np.ndarray:
    """Seeds that agree in most images: bool [seeds, images]."""
    random = np.random.default_rng(seed)
    common = random.random(images) < share
    return np.stack([common ^ (random.random(images) < 0.1) for _ in range(seeds)])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_packed_bits_are_the_images(count: int) -> None:
    correct = np.random.default_rng(count).random(count) < 0.5
    assert np.array_equal(unpack(pack(correct), count), correct)


@pytest.mark.parametrize(("seeds", "others"), [(1, 1), (3, 2)])
def test_interval_and_p_are_those_of_a_plain_bootstrap(seeds: int, others: int) -> None:
    first, other = drawn(400, 0.5, seeds, 1), drawn(400, 0.55, others, 2)
    found = paired_difference("a", first, other)
    per_image = other.mean(0) - first.mean(0)
    assert found.difference == pytest.approx(per_image.mean()) and found.images == 400
    means = per_image[np.random.default_rng(5).integers(0, 400, (10_000, 400))].mean(1)
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.004)
    assert found.p == pytest.approx(2 * min((means <= 0).mean(), (means >= 0).mean()), abs=0.02)
    assert found == paired_difference("a", first, other), "a function of its arguments"
    assert (found.mcnemar_p is None) == (seeds > 1)


def test_pairs_are_kept_and_not_only_the_accuracies() -> None:
    """99 images more right, and none lost: certain. The same accuracies on independent images: unknown."""
    first, other = np.zeros((1, 2000), bool), np.zeros((1, 2000), bool)
    first[0, :1000], other[0, :1010] = True, True
    paired = paired_difference("a", first, other)
    assert paired.p < 0.001 and paired.low > 0 and paired.mcnemar_p == pytest.approx(2 * 0.5**10)
    shuffled = paired_difference("a", first, np.random.default_rng(0).permutation(other, axis=1))
    assert shuffled.difference == pytest.approx(paired.difference) and shuffled.p > 0.1 > 0 > shuffled.low
    same = paired_difference("a", first, first)
    assert (same.difference, same.low, same.high, same.p, same.mcnemar_p) == (0, 0, 0, 1, 1)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (5, 5), (3, 17), (400, 330), (9000, 8800)])
def test_mcnemars_p_is_exact(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_only_rows_of_the_same_images_and_variant_are_compared() -> None:
    correct = [pack(np.array([True, False, True]))]
    rows = [
        None,
        PerImage("d", "probe", "a", "x", 3, correct),
        PerImage("d", "10-nn", "b", "x", 3, correct),
        PerImage("d", "probe", "b", "y", 3, correct),  # other images
        PerImage("e", "probe", "b", "x", 3, correct),  # other data
        PerImage("d", "probe", "c", "x", 3, [pack(np.array([True, True, True]))]),
    ]
    *others, last = compare(rows)
    assert others == [None] * 5
    assert last is not None and (last.encoder, last.difference) == ("a", pytest.approx(1 / 3))


def test_cells_are_percentage_points() -> None:
    assert Versus("a", 0.0312, -0.001, 0.07, 0.0421, None, 9).cells() == ["+3.1", "-0.1 to +7.0", "0.042"]
    assert Versus("a", -0.0312, -0.05, -0.01, 2 / 10_001, None, 9).cells()[2] == "< 0.001"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paired")
    colours(folder / "data", ("blue", "green", "red"))
    return folder


def evaluate(command: str, folder: Path, *more: str) -> str:
    encoders = ["--encoder", "pixels:1", "--encoder", "pixels:4"]
    data = ["--data", f"folders:{folder}/data", *encoders, "--out", f"{folder}/{command}.json"]
    said = CliRunner().invoke(cli, [command, *data, *more], catch_exceptions=False, env={"COLUMNS": "250"})
    assert said.exit_code == 0, said.output
    return said.output


@pytest.mark.parametrize(
    ("command", "more", "images"),
    [
        ("probe", ["probe.weight_decay=[0.1]"], 9),
        ("probe", ["probe.folds=3", "probe.weight_decay=[0.1]"], 24),
        (
            "probe",
            ["probe.recipe=mae", "probe.mae.augment=false", "probe.mae.epochs=2", "probe.mae.warmup_epochs=1"],
            9,
        ),
        ("knn", ["knn.k=[3]"], 9),
        ("fewshot", ["fewshot.shots=[2]"], 9),
    ],
)
def test_results_keep_each_image_and_tables_the_difference(
    folder: Path, command: str, more: list[str], images: int
) -> None:
    printed = evaluate(command, folder, *(word for key in more for word in ("--set", key)))
    assert "difference to first" in printed and "95% interval" in printed
    _, *rows = json.loads((folder / f"{command}.json").read_text())["results"]
    for row in rows:
        assert row["tested"]["count"] == images
        shares = [unpack(seed["correct"], images).mean() for seed in row["seeds"]]
        assert shares == pytest.approx([seed["top1"] for seed in row["seeds"]])
        same = [other for other in rows if other["variant"] == row["variant"]]
        assert ("versus" in row) == (row is not same[0])
        if "versus" in row:
            assert row["versus"]["encoder"] == "pixels:1" and row["versus"]["images"] == images
            assert row["versus"]["difference"] == pytest.approx(row["top1"] - same[0]["top1"])


def test_the_report_compares_results_of_several_files(folder: Path) -> None:
    for number, encoder in enumerate(("pixels:1", "pixels:4")):
        data = ["--data", f"folders:{folder}/data", "--encoder", encoder, "--set", "knn.k=[3]"]
        command = ["knn", *data, "--out", str(folder / "results" / f"{number}.json")]
        assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    tested = [row.tested for row in read_results([folder / "results"])]
    assert sum(versus is not None for versus in compare(tested)) == 2  # 3-nn, 3-nn majority
    write_run(folder / "run", 3)
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "samples": 8, "loss": 2.0}\n')
    command = ["report", str(folder / "run"), "--results", str(folder / "results"), "--out", str(folder / "page.html")]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    text = check_page((folder / "page.html").read_text("utf8")).text
    assert "Difference to the first encoder" in text and "not over training seeds" in text


def test_a_suite_compares_the_encoders_of_each_data_set(folder: Path) -> None:
    (folder / "suite.yaml").write_text(
        f"encoders: [pixels:1, pixels:4]\ndata: [{{data: 'folders:{folder}/data'}}]\n"
        "protocols: [{protocol: knn, name: near, set: {k: [3]}}]\n"
    )
    command = ["eval", "--suite", str(folder / "suite.yaml"), "--out", str(folder / "suite")]
    said = CliRunner().invoke(cli, command, catch_exceptions=False, env={"COLUMNS": "250"})
    assert "difference to the first encoder in percentage points" in said.output
    _, first, _, second, _ = json.loads((folder / "suite" / "suite.json").read_text())["results"]
    assert "versus" not in first and second["versus"]["encoder"] == "pixels:1"
    assert (
        "| data | encoder | variant | difference | 95% interval | p |"
        in (folder / "suite" / "differences.md").read_text()
    )
