"""`train eval --suite`: every encoder by every protocol, once; features shared; finished cells are skipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from timm import create_model

from image_folders import colours
from labels.storage import UserError
from run_factory import MODEL, write_run
from train.cli import cli
from train.evals import features, suite
from train.evals.suite import read_suite

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, a run, random weights of a ViT built as DINOv2's, and a suite over all of them."""
    folder = tmp_path_factory.mktemp("suite")
    for name, labels in (("two", ("blue", "red")), ("three", ("blue", "green", "red"))):
        colours(folder / name, labels)
    write_run(folder / "run", 3)
    torch.manual_seed(5)
    save_file(create_model("test_vit", num_classes=0).state_dict(), folder / "vit.safetensors")
    assert MODEL.image_size == 32
    content = {
        "encoders": [
            "pixels:2",
            f"untrained:{folder}/run",
            {"encoder": "timm:test_vit", "weights": str(folder / "vit.safetensors")},
            {"encoder": "timm:test_vit", "weights": str(folder / "vit.safetensors"), "layer": -2, "pool": "avg"},
        ],
        "data": [f"folders:{folder}/two", f"folders:{folder}/three"],
        "protocols": [
            "probe",
            {"protocol": "probe", "set": {"recipe": "mae", "mae": {"augment": False, "epochs": 2, "warmup_epochs": 1}}},
            {"protocol": "fewshot", "set": {"shots": [2], "seeds": [0, 1]}},
            {"protocol": "knn", "name": "near", "set": {"k": [3]}},
            "zeroshot",
        ],
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder


def evaluate(folder: Path, out: Path, *more: str) -> str:
    arguments = [
        "eval",
        "--suite",
        str(folder / "suite.yaml"),
        "--out",
        str(out),
        "--set",
        "probe.seeds=[0,1]",
        "--set",
        "features.threads=2",
    ]
    said = CliRunner().invoke(cli, [*arguments, *more], catch_exceptions=False, env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    return said.output


@pytest.fixture(scope="module")
def measured(folder: Path) -> tuple[Path, str]:
    return folder / "out", evaluate(folder, folder / "out")


def test_one_table_of_all_cells(measured: tuple[Path, str]) -> None:
    out, printed = measured
    found = json.loads((out / "suite.json").read_text())
    variants = ["probe", "probe, MAE's head", "2-shot", "near: 3-nn", "near: 3-nn majority"]
    assert list(dict.fromkeys(row["variant"] for row in found["results"])) == ["majority class", *variants]
    encoders = list(dict.fromkeys(row["encoder"] for row in found["results"]))
    assert encoders[0] == "majority class" and encoders[3:] == ["timm:test_vit", "timm:test_vit, layer -2, avg"]
    assert len(found["results"]) == 2 * (1 + 4 * len(variants)) and len(found["cells"]) == 2 * 4 * 4
    for row in found["results"][1:]:
        assert row["encoder"] == "majority class" or {"pool", "layer", "weights"} <= row["description"].keys()
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "| data | encoder | " + " | ".join(variants) + " |" and len(lines) == 2 + 2 * 5
    row = next(row for row in found["results"] if row["encoder"] == "pixels:2" and row["variant"] == "2-shot")
    assert f"{100 * row['top1']:.1f} ± {100 * row['top1_std']:.1f}" in lines[3]
    assert (
        "skipped: zeroshot of timm:test_vit: it has no text tower and no pre-training head" in printed
        and "train lit" in printed
    )


def test_features_are_extracted_once_for_each_encoder_and_part(measured: tuple[Path, str]) -> None:
    out, _ = measured
    drawn = 3  # the untrained trunk of every seed: 0 and 1 of probe and fewshot, 0 to 2 of knn
    assert len(list((out / "features").glob("*.npy"))) == 2 * 2 * (3 + drawn)


def test_what_is_finished_is_not_measured_again(measured: tuple[Path, str], folder: Path, monkeypatch) -> None:
    out, _ = measured
    before = (out / "suite.json").read_bytes()
    cell = sorted((out / "results").glob("*.json"))[3]
    content = json.loads(cell.read_text())
    cell.unlink()
    monkeypatch.setattr(features, "decoded_batches", lambda *_: pytest.fail("extracted again"))
    calls = []
    real = suite.measure

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(suite, "measure", counted)
    evaluate(folder, out)
    again = json.loads(cell.read_text())
    assert len(calls) == 1
    for one in (content, again):
        for row in one["results"]:
            row.pop("seconds")
    assert again == content
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("measured again"))
    evaluate(folder, out)
    assert json.loads(before)["cells"] == json.loads((out / "suite.json").read_text())["cells"]
    with pytest.raises(pytest.fail.Exception, match="measured again"):  # other settings are other cells
        evaluate(folder, out, "--set", "knn.temperature=0.1")


def test_equal_names_are_made_unique(folder: Path, tmp_path: Path) -> None:
    """Two weight files of one architecture, and one protocol with two settings: a row and a column for each, none hides
    another.
    """
    torch.manual_seed(6)
    save_file(create_model("test_vit", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    files = [str(folder / "vit.safetensors"), str(tmp_path / "other.safetensors")]
    content = {
        "encoders": [*({"encoder": "timm:test_vit", "weights": file} for file in files), "pixels:2"],
        "data": [f"folders:{folder}/two"] * 2,
        "protocols": [{"protocol": "fewshot", "set": {"shots": [2], "l2": l2}} for l2 in (1.0, 1e9)],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    evaluate(tmp_path, tmp_path / "out")
    header, _, *lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert header == "| data | encoder | 2-shot | 2-shot (2) |"
    assert [line.split(" | ")[1] for line in lines] == [
        "majority class",
        *(f"timm:test_vit, {file}" for file in files),
        "pixels:2",
    ]
    rows = json.loads((tmp_path / "out" / "suite.json").read_text())["results"]
    assert len(rows) == 1 + 3 * 2 and len({row["cell"] for row in rows[1:]}) == 6
    weights = {row["encoder"]: row["description"]["weights"] for row in rows[1:]}
    assert len(set(weights.values())) == 3


def test_shots_are_stored_with_their_cell(measured: tuple[Path, str]) -> None:
    out, _ = measured
    splits = list((out / "results").glob("*.splits.parquet"))
    assert len(splits) == 2 * 4 * 2  # fewshot and the L-BFGS probe
    assert all(file.with_name(file.name.replace(".splits.parquet", ".json")).is_file() for file in splits)


def test_a_damaged_cell_is_named(measured: tuple[Path, str], folder: Path) -> None:
    out, _ = measured
    cell = sorted((out / "results").glob("*.json"))[0]
    whole = cell.read_bytes()
    cell.write_bytes(whole[:50])
    with pytest.raises(UserError, match=r"is damaged[\s\S]*remove it; the same command measures it again"):
        evaluate(folder, out)
    cell.write_bytes(whole)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: [a]\nprotocols: [probe]", "encoders: Field required"),
        ("encoders: []\ndata: [a]\nprotocols: [probe]", "encoders: List should have at least 1 item"),
        (
            "encoders: [{encoder: a, wieghts: b}]\ndata: [a]\nprotocols: [probe]",
            "encoders.0.wieghts: Extra inputs are not permitted",
        ),
        ("encoders: [a]\ndata: [{trian: b}]\nprotocols: [probe]", "data.0.trian: Extra inputs are not permitted"),
        ("encoders: [a]\nencoders: [b]", "'encoders' is given twice"),
    ],
)
def test_mistakes_in_the_suite_file(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_suite(tmp_path / "s.yaml")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"protocols": ["prob"]}, "the protocol 'prob' is unknown"),
        ({"protocols": [{"protocol": "knn", "set": {"kk": 3}}]}, "knn.kk: unknown key"),
        ({"protocols": [{"protocol": "fewshot", "set": {"shots": [6]}}]}, "have less than 6 training images"),
        ({"encoders": ["pixels:2", "timm:test_vit"]}, "has no weights"),
        ({"data": ["folders:gone"]}, "no directory at gone"),
        ({"data": [{"data": "pets:.", "class_key": "colour"}]}, "--class-key colour with pets:."),
        ({"data": [{"train": "gone"}]}, "the data is not named"),
    ],
)
def test_everything_is_checked_before_the_first_is_measured(
    folder: Path, tmp_path: Path, monkeypatch, change: dict, expected: str
) -> None:
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("measured"))
    content = yaml.safe_load((folder / "suite.yaml").read_text()) | change
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(
            cli, ["eval", "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "o")], catch_exceptions=False
        )
    assert expected in str(caught.value)


def test_a_command_of_its_own(folder: Path, tmp_path: Path) -> None:
    """knn as a user types it, with --data and with --train and --test: the same figures."""
    expected = []
    for number, where in enumerate(
        (["--data", f"folders:{folder}/two"], ["--train", f"{folder}/two/train", "--test", f"{folder}/two/test"])
    ):
        out = tmp_path / f"{number}.json"
        command = ["knn", *where, "--encoder", "pixels:2", "--set", "knn.k=[3]", "--out", str(out)]
        said = CliRunner().invoke(cli, command, catch_exceptions=False, env={"COLUMNS": "200"})
        assert said.exit_code == 0 and "3-nn majority" in said.output
        expected.append([(row["variant"], row["top1"]) for row in json.loads(out.read_text())["results"]])
    assert expected[0] == expected[1]
    with pytest.raises(UserError, match="the data is not named"):
        CliRunner().invoke(cli, ["knn", "--encoder", "pixels:2"], catch_exceptions=False)
    layered = ["knn", "--data", f"folders:{folder}/two", "--encoder", "pixels:2", "--layer", "1"]
    with pytest.raises(UserError, match="has no layers to choose from"):
        CliRunner().invoke(cli, layered, catch_exceptions=False)
