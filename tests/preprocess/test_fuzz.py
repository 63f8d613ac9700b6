"""A short stretch of the fuzz run; `python tests/helpers/fuzz.py` runs any number of inputs."""

from pathlib import Path

import pytest

from fuzz import fuzz


def test_a_short_fuzz_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    total = fuzz(400, 20_241_124, tmp_path)
    # A mutator that only ever broke the tars, or never did, would test nothing.
    assert total["labelled"] > 100 and total["tar cut or damaged"] > 20 and len(total) > 6
