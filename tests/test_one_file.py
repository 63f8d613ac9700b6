"""What CONTRIBUTING.md says of a loss, a family of tokenizers and an evaluator: one new file in the tree, and all
commands know it.

A folder with one new file is added to the `__path__` of each package of kinds, as if the file stood there; nothing else
is changed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from image_folders import write_folders
from labels.storage import UserError
from shard_factory import sample, write_tar
from train.cli import cli
from train.evals import protocol
from train.evals.protocol import load_protocol, protocol_names

ROOT = Path(__file__).parents[1]

BRIER = '''"""Squared errors of the sigmoid, summed over the classes: (s(x) - y)^2."""

import torch

from labels.settings import Loss
from train.losses.head import Classwise
from train.losses.head import Head
from train.losses.head import Positives

WHOLE_BATCH = True  # it is not; to see that the configuration asks the file


def batch_loss(settings: Loss, head: Head, labels: Positives) -> torch.Tensor:
    return head.mean(Classwise(negative, positive), labels)


def negative(x: torch.Tensor, gradient: bool) -> torch.Tensor:
    p = x.sigmoid()
    if gradient:
        x.copy_(2 * p * p * (1 - p))
    return p.square().sum(dim=1)


def positive(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = x.sigmoid()
    return (1 - p).square(), -2 * (1 - p) * p * (1 - p)
'''

LETTERS = '''"""The letters of a caption."""

import string

import numpy as np

from labels.storage import fingerprint
from labels.settings import Labels
from labels.arrays import unique_sorted


class Letters:
    name, path = "letters", "plain"

    def __init__(self) -> None:
        self.tokens = list(string.ascii_lowercase)
        self.excluded = np.empty(0, np.int32)
        self.fingerprint = fingerprint({"name": self.name, "tokens": self.tokens})

    @property
    def whole_words(self):
        return np.ones(26, np.bool_), np.ones(26, np.bool_)

    def clean(self, caption: str) -> str:
        return caption.lower()

    def encode(self, captions, limit):
        letters = [[letter for letter in self.clean(str(caption)) if letter in self.tokens] for caption in captions]
        rows = [[self.tokens.index(letter) for letter in row[:limit]] for row in letters]
        offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
        return np.array([number for row in rows for number in row], np.int32), offsets

    def encode_rows(self, captions, limit):
        ids, offsets = self.encode(captions, limit)
        return ids, offsets, *unique_sorted(ids, offsets, self.excluded)


def make(settings: Labels) -> Letters | None:
    return Letters() if settings.tokenizer == "letters" else None
'''

CENTROID = '''"""The class whose mean is nearest.

The second paragraph is not shown.
"""

import torch

from labels.settings import Section, Seeds
from train.evals.protocol import Evaluation, Score, accuracies


class Settings(Section):
    power: int = 2
    seeds: Seeds = [0]


class Centroid(Evaluation):
    name, takes, section = "centroid", "classes", Settings

    def describe(self, settings: Settings) -> str:
        return f"nearest mean, power {settings.power}"

    def scores(self, encoder, data, settings: Settings, extract, seeds) -> list[Score]:
        train_x, test_x = (torch.from_numpy(extract(encoder, part)) for part in (data.train, data.test))
        train_y, test_y = (torch.from_numpy(part.targets) for part in (data.train, data.test))
        means = torch.stack([train_x[train_y == label].mean(0) for label in range(len(data.classes))])
        far = (test_x[:, None] - means).abs().pow(settings.power).sum(-1)
        return [Score("nearest mean", seeds[0], accuracies(-far, test_y))]


EVALUATION = Centroid()
'''

ADDED = {
    "train.losses.kinds": ("brier.py", BRIER),
    "labels.tokenizers.kinds": ("letters.py", LETTERS),
    "train.evals.kinds": ("centroid.py", CENTROID),
}
EXTEND = f"""
import importlib
from pathlib import Path

for package in {list(ADDED)}:
    importlib.import_module(package).__path__.append(str(Path(__file__).parent / package))
"""
TRAIN = {
    "samples": 64,
    "batch_size": 16,
    "loss": {"name": "brier"},
    "optimizer": {"warmup_samples": 16},
    "model": {
        "trunk": "vit_tiny_patch16_224",
        "trunk_args": {"depth": 1, "embed_dim": 24, "num_heads": 2},
        "image_size": 32,
    },
    "runtime": {"threads": 1},
    "data": {"threads": 1},
    "log": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three files, sitecustomize.py that adds them in every process, `data`, `labelled` and
    pipeline.yaml.
    """
    tree = tmp_path_factory.mktemp("one_file")
    for package, (name, text) in ADDED.items():
        assert not ROOT.joinpath(*package.split("."), name).exists()
        (tree / package).mkdir()
        (tree / package / name).write_text(text)
    (tree / "sitecustomize.py").write_text(EXTEND)
    write_tar(
        tree / "data" / "00000.tar",
        [member for number in range(16) for member in sample(f"{number:05d}", f"cab {'ef'[number % 2]}")],
    )
    for part, start in (("train", 0), ("test", 8)):
        write_folders(tree / "labelled" / part, {"ab": 4, "yz": 4}, start)
    (tree / "pipeline.yaml").write_text(
        yaml.safe_dump({"labels": {"tokenizer": "letters"}, "build": {"workers": 1}, "train": TRAIN})
    )
    return tree


def run(tree: Path, *words: str, exit_code: int = 0) -> str:
    """Output of a command, which must exit with the code `exit_code`."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{ROOT}", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_evaluators_bear_the_names_of_their_files() -> None:
    assert [load_protocol(name).name for name in protocol_names()] == protocol_names()


def test_a_command_that_takes_captions_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        protocol, "load_protocol", lambda _: load_protocol("caption")
    )  # in the place of one without a command of its own
    for named in ([], ["--train", "a", "--test", "b"]):
        with pytest.raises(UserError, match="the data is not named\n  allowed: --data coco:DIR"):
            CliRunner().invoke(cli, ["knn", "--encoder", "pixels:2", *named], catch_exceptions=False)


def test_a_new_file_of_each_kind_is_known_to_all_commands(tree: Path) -> None:
    run(tree, "-m", "preprocess", "build-labels", "data", "--out", "out")
    rows = pq.read_table(tree / "out" / "labels" / "00000.parquet")
    assert rows["token_ids"].to_pylist()[:2] == [[2, 0, 1, 4], [2, 0, 1, 5]] and rows["label_ids"].to_pylist()[0] == [
        0,
        1,
        2,
        4,
    ]
    assert json.loads((tree / "out" / "manifest.json").read_text())["tokenizer"]["name"] == "letters"

    run(tree, "-m", "train", "run", "--beton", "out", "--out", "run")
    losses = [
        json.loads(line)["loss"]
        for line in (tree / "run" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert len(losses) == 4 and losses[-1] < losses[0]

    measured = [
        "--data",
        "folders:labelled",
        "--encoder",
        "pixels:2",
        "--encoder",
        "run:run",
        "--set",
        "centroid.power=1",
    ]
    printed = run(tree, "-m", "train", "centroid", *measured, "--out", "results/centroid.json")
    found = json.loads((tree / "results" / "centroid.json").read_text())
    assert (
        found["protocol"] == "nearest mean, power 1"
        and found["settings"] == {"power": 1, "seeds": [0]}
        and "pixels:2" in printed
    )
    assert [row["top1"] for row in found["results"] if row["encoder"] == "pixels:2"] == [1.0]

    suite = {
        "encoders": ["pixels:2"],
        "data": ["folders:labelled"],
        "protocols": ["knn", {"protocol": "centroid", "set": {"power": 3}}],
    }
    (tree / "suite.yaml").write_text(yaml.safe_dump(suite))
    run(tree, "-m", "train", "eval", "--suite", "suite.yaml", "--out", "results/suite", "--set", "knn.k=[3]")
    assert "| 3-nn | 3-nn majority | nearest mean |" in (tree / "results" / "suite" / "table.md").read_text()
    cells = [
        json.loads(file.read_text())["settings"] for file in (tree / "results" / "suite" / "results").glob("*.json")
    ]
    assert {"power": 3, "seeds": [0]} in cells
    run(tree, "-m", "train", "report", "run", "--results", "results", "--out", "run.html")
    page = (tree / "run.html").read_text("utf8")
    assert "nearest mean, power" in page and "brier" in page


def test_the_gradient_of_a_new_loss(tree: Path) -> None:
    """Loss and gradients are those of the formula, in a process that knows the file."""
    script = """
import torch
from labels.settings import Loss
from train.losses.head import HeadLoss
x, w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (9, 3), (9,)))
ids = torch.tensor([[1, 5, -1], [0, -1, -1], [-1, -1, -1], [2, 3, 8]], dtype=torch.int32)
y = torch.zeros(4, 9, dtype=torch.float64)
y[[0, 0, 1, 3, 3, 3], [1, 5, 0, 2, 3, 8]] = 1
fused = HeadLoss(Loss(name="brier"), torch.ones(9))(x, w, b, ids)
dense = ((x @ w.T + b).sigmoid() - y).square().sum(1).mean()
torch.testing.assert_close(fused, dense)
for found, expected in zip(torch.autograd.grad(fused, (x, w, b)), torch.autograd.grad(dense, (x, w, b))):
    torch.testing.assert_close(found, expected)
print("compared", len(found), "x", found.sum().isfinite().item())
"""
    assert run(tree, "-c", script).strip() == "compared 9 x True"


def test_help_and_refusals_know_them_without_torch(tree: Path) -> None:
    script = """
import sys
from click.testing import CliRunner
from labels.config import load_pipeline
from labels.storage import UserError
from train.cli import cli

for words in (["--help"], ["centroid", "--help"]):
    print(CliRunner().invoke(cli, words).output)
for overrides in (["train.loss.name=briar"], ["centriod.power=1"]):
    try:
        load_pipeline(None, overrides)
    except UserError as error:
        print(error)
unwanted = ("torch", "train.losses.kinds.brier", "train.evals.kinds.centroid", "preprocess")
print([name for name in unwanted if name in sys.modules])
"""
    reported = run(tree, "-c", script)
    assert (
        "  centroid   The class whose mean is nearest.\n" in reported
        and "second paragraph" not in reported
        and reported.endswith("[]\n")
    )
    allowed = "Input should be 'asl', 'bce', 'brier', 'soft_margin', 'softmax' or 'two_way'"
    assert f"train.loss.name: 'briar' is not allowed: {allowed}" in reported
    assert "centriod: unknown key; did you mean 'centroid'?" in reported
    partial = ["run", "--beton", "out", "--out", "partial", "--set", "train.runtime.accumulation=2"]
    assert "loss.name is brier, which compares all samples of a batch" in run(
        tree, "-m", "train", *partial, exit_code=2
    )
    wrong = ["--data", "folders:labelled", "--encoder", "pixels:2", "--set", "centroid.pwoer=1"]
    assert "centroid.pwoer: unknown key; did you mean 'power'? allowed: power, seeds" in run(
        tree, "-m", "train", "centroid", *wrong, exit_code=2
    )
