"""labels/native.py: cached machine code is valid for the sources that it was compiled from, wherever it is kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labels.native import SourceLocator, source_stamp

ROOT = Path(__file__).resolve().parent.parent
KERNEL = """
from labels.native import njit
from train.layout import STEP
from train import parts
@njit(cache=True)
def kernel(number):
    return parts.add(number, STEP)
"""
PARTS = """
from labels.native import njit
@njit
def add(one, other):
    return one + other
"""
CALL = """
import json
from train.kernel import kernel
result = kernel(1)
print(json.dumps([result, sum(kernel.stats.cache_hits.values()), kernel._cache.cache_path]))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of labels/native.py under a package with a kernel that is made of three files."""
    root = tmp_path / "tree"
    for package in ("labels", "train"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
    for name in ("native.py", "storage.py"):
        shutil.copy(ROOT / "labels" / name, root / "labels" / name)
    for name, text in {"kernel": KERNEL, "parts": PARTS, "layout": "STEP = 10\n", "cli": "# other\n"}.items():
        (root / f"train/{name}.py").write_text(text)
    return root


def call(root: Path, **environment: str) -> tuple[int, int, Path | None]:
    """In a process of its own: the kernel's result, how often it came from the cache, and the cache's folder."""
    variables = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", CALL], cwd=root, env=variables | environment, text=True, capture_output=True, check=True
    )
    result, hits, folder = json.loads(done.stdout)
    return result, hits, Path(folder) if folder else None


def test_an_edit_of_any_source_compiles_again_and_nothing_else_does(tree: Path) -> None:
    assert call(tree) == (11, 0, tree / "train/__pycache__")
    (tree / "train/cli.py").write_text("# an edit of a file that the kernel is not made of\n")
    for file in tree.rglob("*.py"):
        os.utime(file, (1, 1))  # as after a checkout
    assert call(tree)[:2] == (11, 1)
    (tree / "train/layout.py").write_text("STEP = 20\n")  # the same size
    assert call(tree)[:2] == (21, 0)
    assert call(tree)[:2] == (21, 1)
    (tree / "train/parts.py").write_text(PARTS.replace("one + other", "one - other"))
    assert call(tree)[:2] == (-19, 0)


def test_a_tree_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / "train/__pycache__", ignore_errors=True)
    (tree / "train/__pycache__").write_text("no folder, so that root cannot write here either")
    missing, temporary = "/dev/null/home", tmp_path / "tmp"
    temporary.mkdir()
    kept = call(tree, NUMBA_CACHE_DIR=str(tmp_path / "numba"))
    assert kept[2] and kept[2].parent == tmp_path / "numba"
    in_home = call(tree, HOME=str(tmp_path / "home"))
    assert in_home[2] and in_home[2].parent == tmp_path / "home/.cache/superclass/numba"
    in_temporary = call(tree, HOME=missing, TMPDIR=str(temporary))
    assert in_temporary[2] and in_temporary[2].is_relative_to(temporary)
    assert call(tree, HOME=missing, TMPDIR=str(temporary))[1] == 1


def test_a_temporary_folder_of_somebody_else_is_not_used(tree: Path, tmp_path: Path) -> None:
    (tree / "train/__pycache__").write_text("")
    folder = tmp_path / f"superclass-numba-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert call(tree, HOME="/dev/null/home", TMPDIR=str(tmp_path)) == (11, 0, None)
    assert [path.name for path in folder.iterdir()] == []


def test_without_any_folder_all_is_compiled_each_time(tree: Path) -> None:
    (tree / "train/__pycache__").write_text("")
    nowhere = dict.fromkeys(("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR"), "/dev/null/none")
    mounted = "import os, tempfile\ntempfile.gettempdir = lambda: '/dev/null/none'\n"  # as if /tmp were read-only
    (tree / "sitecustomize.py").write_text(mounted)
    assert call(tree, PYTHONPATH=str(tree), **nowhere) == (11, 0, None)


def test_functions_of_others_keep_numbas_locator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebody_elses.py").write_text("import numba\n@numba.njit(cache=True)\ndef f(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    from somebody_elses import f  # pyright: ignore[reportMissingImports]

    from train.data.order import _fill

    assert not isinstance(f._cache._impl.locator, SourceLocator)
    assert isinstance(_fill._cache._impl.locator, SourceLocator)


def test_the_stamp_reaches_what_the_decoder_is_made_of() -> None:
    from labels import native

    files, waiting = set(), [ROOT / "train/data/decode.py"]
    while waiting:
        file = waiting.pop()
        files.add(str(file.relative_to(ROOT)))
        waiting += [path for path in native._read_source(file)[1] if str(path.relative_to(ROOT)) not in files]
    assert {
        "train/data/decode.py",
        "train/data/resize.py",
        "labels/beton.py",
        "labels/manifest.py",
        "labels/native.py",
    } <= files
    assert len(source_stamp(ROOT / "train/data/decode.py")) == 64
