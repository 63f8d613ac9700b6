"""Short stretches of the fuzz runs; `python tests/helpers/fuzz.py`, fuzz_{paths,tables,tars}.py run any number."""

from pathlib import Path

import pytest

from fuzz import fuzz
from fuzz_paths import fuzz_paths
from fuzz_tables import fuzz_tables
from fuzz_tars import fuzz_tars


def test_a_short_fuzz_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    total = fuzz(400, 20_241_124, tmp_path)
    # A mutator that only ever broke the tars, or never did, would test nothing.
    assert total["labelled"] > 100 and total["tar cut or damaged"] > 20 and len(total) > 6


def test_a_short_fuzz_run_over_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    total = fuzz_tables(200, 20_241_124, tmp_path)
    assert total["unquoted, labelled"] > 100 and total["unquoted, read as quoted=False"] > 10
    assert total["quoted, labelled"] > 100 and total["quoted, read as quoted=True"] > 10
    assert total["mixed, refused: " + 'the quote (") that begins a field in line N does not end wit'] > 3


def test_a_short_fuzz_run_over_names(tmp_path: Path) -> None:
    total = fuzz_paths(60, 2, 20_241_130, tmp_path)
    assert total["read"] > 50 and total["ignored"] > 5 and total["built"] > 0


def test_a_short_fuzz_run_over_the_structure_of_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    total = fuzz_tars(400, 20_261_130, tmp_path)
    assert min(total[reason] for reason in ("labelled", "sparse member", "link", "tar cut or damaged")) > 5
    assert min(total[reason] for reason in ("bytes after the end of the tar", "members not adjacent")) > 5
