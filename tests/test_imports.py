"""The walls: labels <- preprocess, labels <- train, never preprocess <-> train; read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "torchvision", "timm", "ffcv", "tensorboard", "safetensors", "matplotlib", "open_clip"]
# A package, and what it may not import.
WALLS = {
    "labels": ["preprocess", "train", "tests", "ray", "click", *HEAVY],
    "preprocess": ["train", "tests", *HEAVY],
    "train": ["preprocess", "tests", "tokenizers", "ftfy"],
}


def imported(source: str) -> set[str]:
    """Top-level names of everything a module imports, at its head or inside functions; `.` for relative imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", WALLS)
def test_the_walls_stand(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    for module in modules:
        forbidden = imported(module.read_text(encoding="utf8")) & {*WALLS[package], "."}
        assert not forbidden, f"{module.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"


@pytest.mark.parametrize("package", ["labels", "train"])
def test_a_training_node_needs_no_package_for_text(package: str) -> None:
    for module in (ROOT / package).rglob("*.py"):
        head = [
            node
            for node in ast.parse(module.read_text(encoding="utf8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {name for node in head for name in imported(ast.unparse(node))}
        assert not names & {"duckdb", "fsspec", "ftfy", "tokenizers", "regex"}, module


def test_a_breach_would_be_seen() -> None:
    source = "import numpy\ndef f():\n    from train.loop import x\n    import torch.nn as nn\nfrom . import y\n"
    assert imported(source) == {"numpy", "train", "torch", "."}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import preprocess, preprocess.cli, preprocess.build, preprocess.preload", [*HEAVY, "train"]),
        (
            "import labels.beton, labels.config, labels.idf, labels.manifest, labels.manifest, labels.arrays",
            [*HEAVY, "train", "preprocess"],
        ),
        (
            "import labels.subset, labels.tokenizers.kinds.clip, labels.tokenizers.kinds.subword, labels.tokenizers.kinds.catlip",
            [*HEAVY, "duckdb", "fsspec", "ftfy", "regex", "tokenizers"],
        ),
    ],
)
def test_importing_loads_nothing_heavy(statement: str, absent: list[str]) -> None:
    command = f"{statement}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
