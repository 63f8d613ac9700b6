"""Compiled code that is kept between processes is made anew when any file changes that it was compiled from.

numba takes kept code for valid while the text of the function's own file is the same. So a function with `cache=True` that uses anything of
another file has to enclose a fingerprint of all such files, which the file lists as FILES.
"""

import ast
import importlib
from functools import cache
from pathlib import Path

import pytest
from numba import njit

from labels.files import fingerprint_of_sources

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("labels", "preprocess", "train")
Place = tuple[Path, str]


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf8"))


@cache
def imported(file: Path) -> dict[str, Place]:
    """Names that a file takes from files of this project: where they stand, under which name."""
    found = {}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            place = ROOT.joinpath(*node.module.split(".")).with_suffix(".py")
            found |= {name.asname or name.name: (place, name.name) for name in node.names if place.is_file()}
    return found


@cache
def defined(file: Path) -> dict[str, ast.stmt]:
    """What a file makes at its top level, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= dict.fromkeys(names, node)
    return found


def used(file: Path, code: ast.AST, seen: set[Place]) -> set[Path]:
    """Files of all that `code` is made of: functions, numbers, layouts, and what these are made of."""
    parts = code.body if isinstance(code, ast.FunctionDef) else [code]  # without annotations, which numba does not read
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, ast.Name):
            place, name = imported(file).get(node.id, (file, node.id))
            if name in defined(place) and (place, name) not in seen:
                seen.add((place, name))
                used(place, defined(place)[name], seen)
    return {place for place, _ in seen}


def kept() -> list[tuple[Path, ast.FunctionDef]]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [
        (file, node)
        for file in files
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef) and any("cache=True" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


@pytest.mark.parametrize(("file", "function"), kept(), ids=lambda value: getattr(value, "name", ""))
def test_kept_code_knows_all_files_it_is_made_of(file: Path, function: ast.FunctionDef) -> None:
    others = used(file, function, set()) - {file}
    if others:
        assert any(isinstance(node, ast.Name) and node.id == "sources" for node in ast.walk(function)), f"it uses {others}"
        module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        listed = {(file.parent / name).resolve() for name in module.FILES}
        assert others <= listed, f"FILES lacks {others - listed}"


def test_there_is_kept_code_of_several_files() -> None:
    assert sum(bool(used(file, function, set()) - {file}) for file, function in kept()) > 5


def test_what_a_function_encloses_is_part_of_numbas_key(tmp_path: Path) -> None:
    def compiled(sources: str) -> int:
        @njit(cache=True)
        def entry(number):  # noqa: ANN202
            _ = sources
            return number + 1

        entry(1)
        return sum(entry.stats.cache_hits.values())

    (tmp_path / "a.py").write_text("one")
    first = fingerprint_of_sources(str(tmp_path / "b.py"), ["a.py"])
    (tmp_path / "a.py").write_text("other")
    second = fingerprint_of_sources(str(tmp_path / "b.py"), ["a.py"])
    compiled(first + str(tmp_path))
    assert compiled(first + str(tmp_path)) == 1
    assert compiled(second + str(tmp_path)) == 0
