"""A wheel by pyproject.toml holds every module and every data file of the three packages, and nothing else."""

import subprocess
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.filterwarnings("ignore:.*Package 'labels.tokenizers.vocab'")  # a folder of data, listed in package-data
def test_the_wheel_has_every_file_of_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    build = build_py(distribution)
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    build.run()
    inside = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    listed = subprocess.run(
        ["git", "ls-files", "labels", "preprocess", "train"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert inside == {name for name in listed if (ROOT / name).is_file()}
