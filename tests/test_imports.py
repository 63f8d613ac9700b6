"""The rules of import (docs/architecture.md): read from all import statements, also those inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top down: a module imports modules of lower layers and of its own folder or file.
LAYERS = [
    {"train.__main__"},
    {"train.cli"},
    {"train.llava"},
    {"train.export", "train.report"},
    {"train.evals"},
    {"train.encoders", "train.bench"},
    {"train.clip"},
    {"train.trainer"},
    {"train"},  # all else: data, losses, model, loop, optim, ...
    {"labels"},
]
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "ffcv",
    "tensorboard",
    "safetensors",
    "matplotlib",
    "open_clip",
    "transformers",
}
TEXT = {"duckdb", "fsspec", "ftfy", "regex", "tokenizers"}
NEVER = {
    "labels": {"preprocess", "train", "tests", "ray", "click", *HEAVY},
    "preprocess": {"train", "tests", *HEAVY},
    "train": {"preprocess", "tests", "tokenizers", "ftfy"},
}


def module_files() -> dict[str, Path]:
    files = {}
    for path in (path for package in NEVER for path in (ROOT / package).rglob("*.py")):
        files[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return files


FILES = module_files()


def imports(tree: ast.AST) -> set[str]:
    """Every module that the statements name; of `from package import name`, package.name if that is a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "a relative import"
            full_names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            names |= {full if full in FILES else module for full, module in full_names}
    return names


IMPORTS = {module: imports(ast.parse(path.read_text("utf8"))) - {module} for module, path in FILES.items()}


def group_and_layer(module: str) -> tuple[str, int]:
    """The folder or file that LAYERS lists, and its layer from the top; `train` for a module that is not listed."""
    for layer, groups in enumerate(LAYERS):
        for group in groups:
            if module == group or module.startswith(f"{group}."):
                return group, layer
    raise AssertionError(f"{module} is in no layer")


def test_the_stages_never_import_each_other_and_labels_imports_neither() -> None:
    for module, names in IMPORTS.items():
        forbidden = {name.partition(".")[0] for name in names} & NEVER[module.partition(".")[0]]
        assert not forbidden, f"{module} imports {forbidden}"


def test_imports_within_train_point_down() -> None:
    for module in (module for module in IMPORTS if module.startswith("train.")):
        group, layer = group_and_layer(module)
        for imported in IMPORTS[module] & FILES.keys():
            its_group, its_layer = group_and_layer(imported)
            assert its_layer > layer or its_group == group, f"{module} imports {imported}"


def test_there_are_no_circles() -> None:
    graph = {module: IMPORTS[module] & FILES.keys() for module in FILES}
    while leaves := {module for module, names in graph.items() if not names}:
        graph = {module: names - leaves for module, names in graph.items() if module not in leaves}
    assert not graph, "import circles among these modules, or modules above them"


@pytest.mark.parametrize("package", ["labels", "train"])
def test_a_training_node_needs_no_package_for_text(package: str) -> None:
    for module in (module for module in FILES if module.startswith(package)):
        statements = [
            node for node in ast.parse(FILES[module].read_text("utf8")).body if "Import" in type(node).__name__
        ]
        assert not imports(ast.Module(statements, [])) & TEXT, module


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import preprocess.cli, preprocess.build, preprocess.shard", HEAVY | {"train"}),
        ("import labels.beton, labels.config, labels.idf, labels.arrays", HEAVY | {"preprocess", "train"}),
        ("import labels.subset", HEAVY | TEXT),
        ("import labels.tokenizers.kinds.clip, labels.tokenizers.kinds.subword", HEAVY | TEXT),
        ("import labels.tokenizers.kinds.catlip", HEAVY | TEXT),
        ("from preprocess.cli import cli; cli(['--help'], standalone_mode=False)", HEAVY | TEXT | {"numba", "pyarrow"}),
        ("from train.cli import cli; cli(['--help'], standalone_mode=False)", HEAVY | TEXT | {"numba"}),
    ],
)
def test_nothing_heavy_is_loaded(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(sorted(sys.modules.keys() & {absent!r}))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
