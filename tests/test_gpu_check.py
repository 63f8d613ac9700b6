"""benchmarks/gpu: every phase runs on a CPU at its smallest sizes, and the results are complete at any moment."""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from beton_factory import build_out

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture(scope="module", autouse=True)
def phases(one_thread: None) -> Iterator[None]:
    """The folder of the kit on the search path, and torch's precision restored."""
    sys.path.insert(0, str(GPU))
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    sys.path.remove(str(GPU))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs for the loader; no clip art, which takes processes of its own."""
    folder = tmp_path_factory.mktemp("kit")
    for name in ("photos-256", "photos-original"):
        (folder / name).mkdir()
        build_out(folder / name, [40])
    return folder


def run(phase: str, data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a phase by name."""
    kit = importlib.import_module("kit").Kit(torch.device("cpu"), True, data, folder, folder, time.monotonic() + 600)
    importlib.import_module(phase).run(kit)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row for row in rows if row["state"] != "done"] == []
    return {row["name"]: row for row in rows}


def test_correctness(data: Path, tmp_path: Path) -> None:
    rows = run("correctness", data, tmp_path)
    assert {name for name, row in rows.items() if not row["ok"]} == {"resume after SIGKILL"}
    assert rows["resume after SIGKILL"]["text"] == "no data"


def test_losses(data: Path, tmp_path: Path) -> None:
    rows = run("losses", data, tmp_path)
    assert len(rows) == 5
    assert all(spent > 0 for row in rows.values() for spent in row["figures"]["ms"].values())


def test_training_writes_a_profile(data: Path, tmp_path: Path) -> None:
    rows = run("training", data, tmp_path)
    assert all(row["figures"]["samples_per_s"] > 0 for row in rows.values())
    assert "aten::" in (tmp_path / "profile-small-ViT.txt").read_text()


def test_loading(data: Path, tmp_path: Path) -> None:
    rows = run("loading", data, tmp_path)
    alone = [row for name, row in rows.items() if "resamples" in name]
    assert len(alone) == 4
    assert all(row["figures"]["images_per_s"] > 0 for row in alone)


def test_a_demo_without_its_data_says_so(data: Path, tmp_path: Path) -> None:
    assert {row["text"] for row in run("demo", data, tmp_path).values()} == {"no data"}


def test_what_fails_or_does_not_fit_is_a_row(tmp_path: Path) -> None:
    module = importlib.import_module("kit")
    kit = module.Kit(torch.device("cpu"), True, tmp_path, tmp_path, tmp_path, time.monotonic() + 600)
    assert kit.item("late", lambda: module.Result("never"), seconds=6000) == {}
    assert kit.item("broken", lambda: 1 / 0) == {}
    assert kit.item("good", lambda: module.Result("fine", True, {"x": 1})) == {"x": 1}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["state"], row["ok"]) for row in rows] == [("skipped", None), ("failed", False), ("done", True)]
    assert rows[1]["text"] == "failed: ZeroDivisionError: division by zero"


def test_a_phase_that_takes_too_long_is_cut_and_the_table_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = importlib.import_module("check")
    monkeypatch.setattr(check, "PHASES", {"losses": 1, "demo": 0})
    monkeypatch.setattr(check, "GRACE_S", 0)
    out = tmp_path / "results"
    arguments = argparse.Namespace(device="cpu", small=True, kit=tmp_path, out=out, phases=["losses", "demo"])
    check.run_all(arguments)
    report = json.loads((out / "results.json").read_text())
    assert report["phases"]["losses"]["state"] == "cut: out of time"
    assert report["phases"]["demo"]["state"] == "not started: no time left"
    assert (out / "results.md").read_text() in capsys.readouterr().out


def test_the_table() -> None:
    row = {"name": "vit_b16", "text": "900 samples/s | MFU 51%", "goal": "MFU >= 50%", "ok": True, "seconds": 20.5}
    missed = row | {"name": "vit_l16", "ok": False, "text": "two\nlines"}
    report = {
        "device": "cuda",
        "small": False,
        "machine": {"gpu": "H200"},
        "phases": {"training": {"state": "running", "seconds": 31.0, "rows": [row, missed, missed | {"ok": None}]}},
    }
    text = importlib.import_module("summary").markdown(report)
    assert text.splitlines() == [
        "# Check on cuda",
        "",
        "- gpu: H200",
        "- goals: 1 met, 1 missed, not finished",
        "",
        "## c. Training step (running, 31.0 s)",
        "",
        "| | result | goal | met | s |",
        "|---|---|---|---|---|",
        r"| vit_b16 | 900 samples/s \| MFU 51% | MFU >= 50% | yes | 20.5 |",
        "| vit_l16 | two lines | MFU >= 50% | **no** | 20.5 |",
        "| vit_l16 | two lines | MFU >= 50% |  | 20.5 |",
    ]
