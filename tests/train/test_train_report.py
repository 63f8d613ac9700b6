"""`train report`: curves, recipes and results of runs on one page that stands alone, with the paper's figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from labels.config import dump_yaml, load_pipeline
from labels.settings import Pipeline
from labels.storage import UserError, write_json
from page_checks import CHROMIUM, check_page, shown_in_chromium
from train.cli import cli
from train.evals.measure import read_results
from train.report.page import measured, published
from train.report.runs import binned, differences, loss_curves, read_runs

STEPS, BATCH = 400, 64
LABELS = {"tokenizer": "clip", "stop_words": "keep", "idf": "smooth"}


def write_run(run: Path, *overrides: str, loss: float = 9.0, stop_words: str = "keep") -> Path:
    """A run of 400 steps: losses that fall by 1, 100 samples/s, then 300; step 7 skipped."""
    keys = [
        f"train.batch_size={BATCH}",
        f"train.samples={BATCH * STEPS}",
        "train.optimizer.warmup_samples=0",
        *overrides,
    ]
    run.mkdir(parents=True)
    dump_yaml(run / "config.yaml", load_pipeline(None, keys), exclude={"recipes": True})
    write_json(
        run / "data.json",
        {
            "samples": 7179,
            "vocabulary": 49408,
            "tokenizer": "clip",
            "label_options": LABELS | {"stop_words": stop_words},
        },
    )
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "samples": step * BATCH, "loss": loss - step / STEPS, "lr": 1e-3, "grad_norm": 1.0}
        lines.append(line | ({"loss": None, "skipped": True} if step == 7 else {}))
        if step % 200 == 0:
            fast = step > 200
            speed = {
                "samples_per_s": 300.0 if fast else 100.0,
                "data_wait": 0.3 if fast else 0.1,
                "mfu": 0.4,
                "bad_images": 2,
            }
            lines.append({"step": step, "samples": step * BATCH, **speed})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def result(encoder: str, variant: str, value: float, *, std: float | None = None, name: str = "top1") -> dict[str, Any]:
    return {
        "encoder": encoder,
        "variant": variant,
        "metrics": [name],
        name: value,
        f"{name}_std": std,
        "seeds": [{"seed": 0}, {"seed": 1}],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that differ in their loss, two of them in the seed alone; a suite's results, and a caption result."""
    folder = tmp_path_factory.mktemp("train-report")
    for name, overrides in (("soft", []), ("soft-1", ["train.runtime.seed=1"]), ("bce", ["train.loss.name=bce"])):
        write_run(folder / name, "train.loss.idf=false", *overrides, loss=5.0 if name == "bce" else 9.0)
    majority = result("majority class", "majority class", 0.25)
    probes = {"soft": 0.5, "soft-1": 0.54, "bce": 0.4}
    rows = [result(f"run:{folder}/{name}", "probe", value, std=0.01) for name, value in probes.items()]
    rows.append(result("pixels:16 <&>", "probe", 0.3))
    cells = [{"data": "imagenet:/data", **row, "cell": "0a"} for row in [majority, *rows]]
    write_json(folder / "results" / "suite.json", {"results": cells, "cells": ["0a"]})
    write_json(
        folder / "results" / "results" / "0a.json",
        {"data": "imagenet:/data", "protocol": "a probe in words", "results": rows},
    )
    caption = {
        "data": "coco:/data",
        "protocol": "greedy",
        "results": [result(f"run:{folder}/soft", "caption", 87.25, name="cider")],
    }
    write_json(folder / "results" / "caption.json", caption)
    tuned = {
        "data": "imagenet:/data",
        "protocol": "end to end",
        "results": [result(f"run:{folder}/soft", "fine-tuned", 0.61)],
    }
    write_json(folder / "results" / "finetune.json", tuned)
    write_json(folder / "results" / "other.json", {"results": 3})
    return folder


def report(folder: Path, *arguments: str) -> str:
    command = ["report", *arguments, "--out", str(folder / "page.html")]
    called = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert called.exit_code == 0, called.output
    return (folder / "page.html").read_text("utf8")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    runs = [str(folder / name) for name in ("soft", "soft-1", "bce")]
    return report(folder, *runs, "--results", str(folder / "results"))


def test_the_page_stands_alone_and_shows_everything(page: str) -> None:
    read = check_page(page)
    assert read.ids >= {"runs", "loss", "speed", "recipe", "results", "paper"}
    for text in ("train.loss.name", "bce", "pixels:16 <&>", "50.0 ± 1.0", "87.2", "a probe in words"):
        assert text in read.text, text
    # Published figures of the same protocol and data are there, those of others are not.
    assert "Published: linear probe, ImageNet-1k" in read.text and "Published: fine-tuned, ImageNet-1k" in read.text
    assert "Published: CIDEr" in read.text and "Published: 10-shot" not in read.text
    assert page.count('class="legend"') == 2 + 3, "a chart for each kind of loss, and three of speed"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_chromium_shows_it_without_a_complaint(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, "utf8")
    assert "CONSOLE" not in shown_in_chromium(tmp_path / "page.html", tmp_path / "shown")


def test_a_single_run_is_compared_with_the_defaults(folder: Path) -> None:
    text = check_page(report(folder, str(folder / "soft"))).text
    assert (
        "Keys that differ from the built-in defaults" in text
        and "No results: add --results" in text
        and "100% of the budget" in text
    )
    [run] = read_runs([folder / "soft"])
    assert dict(differences([run])) == {
        "train.samples": [BATCH * STEPS],
        "train.batch_size": [BATCH],
        "train.loss.idf": [False],
        "train.optimizer.warmup_samples": [0],
    }


def test_numbers_of_a_run(folder: Path) -> None:
    [run] = read_runs([folder / "soft"])
    half = BATCH * STEPS / 2
    assert run.seconds() == pytest.approx(half / 100 + half / 300)
    assert run.weighted_mean("data_wait") == pytest.approx(0.2) and run.weighted_mean("memory_gib") is None
    assert run.last_loss() == pytest.approx(9 - (397 + 398 + 399 + 400) / 4 / STEPS)
    assert (run.samples, run.budget, run.skipped, run.bad_images) == (BATCH * STEPS, BATCH * STEPS, 1, 2)
    raw, mean = loss_curves([run], [run])
    assert len(raw.xs) == STEPS - 1 and len(mean.xs) == 200 and (raw.kind, mean.kind) == ("faint", "")


def test_bad_images_are_counted_over_the_lives_of_a_run(folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for count in (1, 1, 4):  # a resumed process counts from 0
            file.write(
                json.dumps({"step": 401, "samples": BATCH * 401, "samples_per_s": 1.0, "bad_images": count}) + "\n"
            )
        file.write('{"step": 402, "sam')  # and was killed in the middle of a line
    [read] = read_runs([run])
    assert read.bad_images == 2 + 4


def test_bins_are_means_of_neighbours() -> None:
    assert binned(np.arange(6.0), 3).tolist() == [0.5, 2.5, 4.5]
    assert binned(np.arange(3.0), 200).tolist() == [0, 1, 2]
    assert len(binned(np.array([]), 4)) == 0


def test_results_are_kept_once(folder: Path) -> None:
    rows = read_results([folder / "results", folder / "results" / "caption.json"])
    assert len(rows) == 1 + 4 + 1 + 1
    assert {row.protocol for row in rows if row.variant == "probe"} == {"a probe in words"}


def test_the_papers_table_of_losses_shows_these_runs_too(folder: Path) -> None:
    runs, rows = read_runs([folder / name for name in ("soft", "soft-1", "bce")]), read_results([folder / "results"])
    tables = {ablation.title: measured(ablation, runs, rows) for ablation in published().ablations}
    losses = tables.pop("Losses")
    assert losses and losses.columns == [("imagenet:/data", "probe")]
    assert losses.cells == [["52.0 ± 2.8, 2 runs"], ["40.0 ± 1.0"], ["-"], ["-"], ["-"]]
    assert not any(tables.values()), "nothing else differs between them"


def test_conditions_of_published_lines_name_keys_that_runs_have(folder: Path) -> None:
    [run] = read_runs([folder / "soft"])
    conditions = [line.where for one in published().ablations for line in one.rows]
    assert {key for where in conditions for key in where} <= run.recipe.keys()
    assert all(len(line.published) == len(one.columns) for one in published().ablations for line in one.rows)


def test_arguments_of_the_trunk_are_a_difference(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "train.model.trunk_args={depth: 4}")
    assert ("train.model.trunk_args.depth", [4]) in differences(read_runs([run]))


def test_runs_of_one_name_are_distinguished(tmp_path: Path) -> None:
    for part in ("a", "b"):
        write_run(tmp_path / part / "run")
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "a" / ".." / "a" / "run"])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert differences(runs) == []


def test_labels_differ_where_only_the_stop_words_do(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", stop_words="remove")
    assert differences(read_runs([tmp_path / "a", tmp_path / "b"])) == [("labels.stop_words", ["keep", "remove"])]


def test_mistakes_are_reported(folder: Path, tmp_path: Path) -> None:
    def refusal(call: Any, *paths: Path) -> str:
        with pytest.raises(UserError) as caught:
            call(paths)
        return str(caught.value)

    assert "is not a run: there is no such folder" in refusal(read_runs, tmp_path / "gone")
    assert "is not a run: it has no config.yaml" in refusal(read_runs, tmp_path)
    run = write_run(tmp_path / "run")
    for content in ("[1]", "3", '{"label_options": 3}', '{"lab'):
        (run / "data.json").write_text(content)
        assert "data.json is damaged" in refusal(read_runs, run)
    (run / "data.json").unlink()
    assert "there is no" in refusal(read_results, tmp_path / "gone")
    assert "other.json is not a result" in refusal(read_results, folder / "results" / "other.json")
    assert "has no result" in refusal(read_results, run)
    (tmp_path / "cut.json").write_text('{"results": [')
    assert "cut.json is damaged" in refusal(read_results, tmp_path / "cut.json")


DAMAGE = {
    "other bytes": b'{"step": 3, "samples": 192, "caf\xe9": 1}',
    "cut": b'{"step": 3, "sam',
    "nothing": b"",
    "NaN": b'{"step": 3, "samples": 192, "loss": NaN, "lr": 1e-3}',
    "Infinity": b'{"step": 3, "samples": 192, "samples_per_s": Infinity}',
    "too large": b'{"step": 3, "samples": 192, "loss": 1e999}',
    "a word": b'{"step": 3, "samples": 192, "loss": "low"}',
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "no samples": b'{"step": 3, "loss": 9.0}',
    "null samples": b'{"step": 3, "samples": null, "loss": 9.0}',
    "rate 0": b'{"step": 3, "samples": 192, "samples_per_s": 0.0}',
    "deep": b"[" * 100_000,
    "zeros": b"\0" * 50,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_lines_are_named_and_the_rest_is_shown(case: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    file = run / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[:2], DAMAGE[case], *lines[3:200], DAMAGE[case], *lines[200:]]))
    called = CliRunner().invoke(cli, ["report", str(run), "--out", str(tmp_path / "page.html")], catch_exceptions=False)
    said = f"{file}: damaged lines, not shown (2): 3, 201"
    assert called.exit_code == 0 and said in called.output
    assert said in check_page((tmp_path / "page.html").read_text("utf8")).text
    [read] = read_runs([run])
    assert [line["step"] for line in read.steps] == [1, 2, *range(4, STEPS + 1)]


def test_a_line_that_is_being_written_is_no_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 401, "caf\xc3')
    assert not read_runs([run])[0].damaged


@pytest.mark.parametrize(
    "name",
    ["loss=bce,lr=1e-3", "a, b", "run:1", "x, layer 2", "50% <b>|\"'", "line\nbreak", "café", " space ", "=", "a:b,c"],
)
def test_runs_of_any_name_are_next_to_the_papers_losses(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    runs = {name: "bce", "other": "soft_margin"}
    for run, loss in runs.items():
        write_run(tmp_path / run, "train.loss.idf=false", f"train.loss.name={loss}")
    # as --encoder names them: with and without `run:`, relative and absolute; a layer is not the run's own output
    specs = [f"run:{name}", f"{tmp_path}/other", "run:other, layer 1, avg"]
    rows = [result(spec, "probe", value) for spec, value in zip(specs, (0.5, 0.4, 0.1), strict=True)]
    write_json(tmp_path / "r.json", {"data": "imagenet:/data", "protocol": "p", "results": rows})
    losses = {ablation.title: ablation for ablation in published().ablations}["Losses"]
    found = measured(losses, read_runs([tmp_path / run for run in runs]), read_results([tmp_path / "r.json"]))
    assert found and sorted(cell for line in found.cells for cell in line if cell != "-") == ["40.0", "50.0"]
    text = check_page(report(tmp_path, str(tmp_path / name), str(tmp_path / "other"), "--results", "r.json")).text
    assert " ".join(name.split()) in " ".join(text.split())


def test_defaults_are_no_difference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    dump_yaml(run / "config.yaml", Pipeline(), exclude={"recipes": True})
    (run / "metrics.jsonl").write_text("")
    text = check_page(report(tmp_path, str(run))).text
    assert (
        "The built-in defaults." in text and "No step is logged yet." in text and "No throughput is logged yet." in text
    )
