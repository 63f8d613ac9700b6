"""What the README says is true: its SQL runs verbatim, its tree is the tree. Its commands: test_docs.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from beton_factory import build_out
from click.testing import CliRunner

import preprocess.cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
QUERIES = re.findall(r"```sql\n(.*?)\n```", README, re.DOTALL)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_out(tmp_path_factory.mktemp("readme"), [30, 20])


def test_there_are_queries() -> None:
    assert len(QUERIES) >= 3


@pytest.mark.parametrize("query", QUERIES)
def test_sql_examples_run_verbatim_in_both_ways(out: Path, query: str) -> None:
    csv = CliRunner().invoke(preprocess.cli.cli, ["sql", str(out), query, "--format", "csv"], catch_exceptions=False)
    assert csv.exit_code == 0
    shell = Path(sys.executable).with_name("duckdb")
    printed = subprocess.run(
        [shell, "-readonly", "-csv", "idf.duckdb", query], cwd=out, capture_output=True, text=True, check=False, timeout=60
    )
    assert printed.returncode == 0, printed.stderr
    assert len(csv.output.splitlines()) > 1
    assert len(printed.stdout.splitlines()) == len(csv.output.splitlines())


def test_the_tree_is_the_tree() -> None:
    block = README.split("## The tree")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in block.strip().splitlines()[1:] if not line.startswith(" ")}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert named == {path.split("/")[0] for path in listed} - {"README.md", ".gitignore"}


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")
    for package in ("labels", "preprocess", "train"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT / package))
            known = name in text or (path.name in text and f"{package}/{path.parent.name}/" in text)
            known = known or (path.parent.name == "kinds" and f"{path.parent.parent.name}/kinds/*.py" in text)  # a new one is no new line
            assert path.name.startswith("__") or name == "cli.py" or known, f"{package}/{name}"


def test_architecture_names_each_module_once_and_none_that_is_gone() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8").split("## Modules")[1].split("## Decisions")[0]
    there = {path.name for package in ("labels", "preprocess", "train") for path in (ROOT / package).rglob("*.py")}
    for section in re.split(r"^\| \*\*", table, flags=re.MULTILINE)[1:]:
        rows = [line.split("|")[1] for line in section.splitlines()[1:] if line.startswith("| ")]
        named = [name for row in rows for name in re.findall(r"[\w/]+\.py", row)]
        assert len(named) == len(set(named)), sorted(name for name in set(named) if named.count(name) > 1)
        assert {name.rpartition("/")[2] for name in named} <= there
