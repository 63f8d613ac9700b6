"""Worker processes: their environment, and where no server can be started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from preprocess.engine import start_server, worker_pool


def test_workers_have_the_environment_of_now_not_of_the_servers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_server() and "PYTHONSAFEPATH" not in os.environ
    monkeypatch.setenv("ONLY_NOW", "yes")
    with worker_pool(1) as pool:
        assert pool.submit(os.getenv, "ONLY_NOW").result() == "yes"


def test_a_folder_of_temporary_files_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    code = (
        "import os; from preprocess.engine import *; "
        "print(start_server()); print(worker_pool(1).submit(os.getenv, 'HERE').result())"
    )
    environment = {**os.environ, "TMPDIR": str(folder), "HERE": "yes"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "yes"]
