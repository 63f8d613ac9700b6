"""Visual weights and validation where they are shown: both explain commands, and the report of a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from labels.config import load_pipeline
from labels.idf import combined, newest_visual, read_visual, target_weights
from labels.show.explanation import with_visual
from page_checks import CHROMIUM, check_page, shown_in_chromium
from preprocess.inspect.explain import explain
from shard_factory import preprocess
from train.cli import cli
from train.evals.predict import explain_with_predictions
from train.trainer import train_run
from trainer_factory import lines, small_config, small_out

KEYS = (
    "train.samples=480",
    "train.validation={held_out: 0.2, every_samples: 160, samples: 20}",
    "train.weights=visual",
    "train.visual={at: [0.25, 0.5], samples: 20, combination: gain, floor: 0.1}",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_out(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def run(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert train_run(out, folder / "run", load_pipeline(small_config(folder), KEYS))
    return folder / "run"


@pytest.fixture
def key(out: Path) -> str:
    """The key of a sample with several labels."""
    table = pq.read_table(out / "labels")
    sizes = [len(ids) for ids in table["label_ids"].to_pylist()]
    return table["key"][int(np.argmax(sizes))].as_py()


def train(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.mark.parametrize(("combination", "floor"), [("idf*gain", 0.01), ("idf*sqrt(gain)", 0.5), ("gain", 0.0)])
def test_targets_with_visual_weights_are_those_of_the_loss(
    out: Path, run: Path, key: str, combination: str, floor: float
) -> None:
    table = newest_visual(run)
    assert table is not None and table.name == "samples-000000000240.parquet"
    plain = explain(out, key)
    seen = with_visual(plain, out, table, combination, floor)  # type: ignore[arg-type]
    gains = read_visual(table)[0]["visual_gain"].to_numpy()
    ids = [label.token_id for label in plain.labels]
    idf = np.array([label.idf for label in plain.labels])
    expected = target_weights(combined(idf, gains[ids], combination, floor))  # type: ignore[arg-type]
    assert [label.visual_weight for label in seen.labels] == expected.tolist()
    assert [label.visual_gain for label in seen.labels] == gains[ids].tolist()
    assert [label.weight for label in seen.labels] == [label.weight for label in plain.labels]


def test_explain_shows_idf_and_visual_gain_in_one_table(out: Path, run: Path, key: str, tmp_path: Path) -> None:
    table = newest_visual(run)
    said = preprocess(
        "explain", out, key, "--visual", table, "--html", tmp_path / "x.html", "--png", tmp_path / "x.png"
    )
    assert said.code == 0, said.err
    for text in (said.out, check_page((tmp_path / "x.html").read_text("utf8")).text):
        assert "IDF" in text and "gain" in text and "visual t_c" in text
    narrow = (tmp_path / "x.html").read_text("utf8").partition('class="narrow"')[2]
    assert all(label.name in narrow for label in explain(out, key).labels) and narrow.count("visual t_c") == 2
    assert "visual t_c" not in preprocess("explain", out, key).out
    assert "no table of visual weights at" in preprocess("explain", out, key, "--visual", tmp_path / "none").err
    content, facts = read_visual(table)
    other = content.replace_schema_metadata(
        {b"superclass.visual": json.dumps(facts | {"tokenizer_fingerprint": "0"}).encode()}
    )
    pq.write_table(other, tmp_path / "other.parquet")
    assert "other tokens than the" in preprocess("explain", out, key, "--visual", tmp_path / "other.parquet").err


def test_train_explain_takes_the_runs_own_newest_table(out: Path, run: Path, key: str, tmp_path: Path) -> None:
    said = train("explain", out, key, "--checkpoint", run, "--top", 3)
    assert said.exit_code == 0, said.output
    assert "samples-000000000240.parquet" in said.output and said.output.count("visual t_c") == 3  # tables and note
    assert "(gain)" in said.output, "the run's own combination"
    shown = explain_with_predictions(out, key, run, top=3)
    assert all(guess.label.visual_gain is not None for guess in shown.guesses)
    assert all((guess.label.visual_weight is not None) == guess.hit for guess in shown.guesses)
    first = min((run / "visual").iterdir())
    assert first != newest_visual(run)
    assert first.name in train("explain", out, key, "--checkpoint", run, "--visual", first).output
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("visual"))
    assert "visual t_c" not in train("explain", out, key, "--checkpoint", bare).output


def page(folder: Path, *runs: Path) -> str:
    said = train("report", *runs, "--out", folder / "page.html")
    assert said.exit_code == 0, said.output
    return (folder / "page.html").read_text("utf8")


def test_the_report_has_validation_curves_and_the_extremes(out: Path, run: Path, tmp_path: Path) -> None:
    assert sum("validation_loss" in line for line in lines(run)) == 3
    markup = page(tmp_path, run)
    read = check_page(markup)
    assert "visual" in read.ids
    for text in ("Validation loss over samples seen", "Validation gain over samples seen", "Visual gain against IDF"):
        assert text in read.text, text
    content = read_visual(newest_visual(run) or out)[0]
    measured = content.filter(pa.compute.greater(content["samples"], 0))
    assert markup.count('class="dot"') == 2 * len(measured)
    order = np.argsort(-measured["visual_gain"].to_numpy(), kind="stable")
    most = read.text.partition("Most visible of the frequent tokens")[2].partition("Least visible")[0]
    least = read.text.partition("Least visible of the frequent tokens")[2].partition("Visual gain against")[0]
    names = measured["token"].to_pylist()
    assert names[order[0]] in most and names[order[-1]] in least and names[order[-1]] not in most
    if CHROMIUM:
        assert "CONSOLE" not in shown_in_chromium(tmp_path / "page.html", tmp_path / "shown")


def test_several_runs_have_a_curve_each_and_runs_without_have_none(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("visual"))
    kept = [line for line in lines(run) if "validation_loss" not in line]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    text = check_page(page(tmp_path, bare)).text
    assert "Validation" not in text and "Visual weights" not in text
    both = page(tmp_path, run, bare)
    assert check_page(both).text.count("Visual gain against IDF: run") == 3  # two drawings and the caption
