"""docs/cookbook.md: every query runs, in `preprocess sql` and in the plain shell, and its printed answer has the
query's columns.
"""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shard_factory import Built, preprocess

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "cookbook.md").read_text(encoding="utf8")
RECIPES = re.findall(r"^## (.*?)\n.*?```sql\n(.*?)\n```\n\n\|(.*?)\|\n", PAGE, re.DOTALL | re.MULTILINE)
# The small label dataset of the test has no such rows.
MAY_BE_EMPTY = {"What comes with a token", "Duplicates", "Word pairs", "One sample by its uid"}


def test_there_are_a_dozen_and_each_has_an_answer() -> None:
    assert len(RECIPES) >= 12
    assert len(RECIPES) == PAGE.count("```sql") == PAGE.count("\n## ")
    assert {title for title, _, _ in RECIPES} >= MAY_BE_EMPTY


@pytest.mark.parametrize(("title", "query", "header"), RECIPES, ids=[title for title, _, _ in RECIPES])
def test_a_query_runs_and_gives_the_columns_of_its_answer(finished: Built, title: str, query: str, header: str) -> None:
    ran = preprocess("sql", finished.out, query, "--format", "csv")
    assert ran.code == 0, ran.err
    rows = list(csv.reader(io.StringIO(ran.out)))
    assert rows[0] == [name.strip() for name in header.split("|")]
    assert len(rows) > 1 or title in MAY_BE_EMPTY


def test_all_run_in_the_plain_shell(finished: Built) -> None:
    shell = Path(sys.executable).with_name("duckdb")
    script = ";\n".join(query for _, query, _ in RECIPES)
    command = [str(shell), "-readonly", "-bail", "-csv", "idf.duckdb", "-c", script]
    ran = subprocess.run(command, cwd=finished.out, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr


def test_some_answers_by_hand(finished: Built) -> None:
    queries = {title: query for title, query, _ in RECIPES}

    def answer(title: str, *changes: tuple[str, str]) -> list[list[str]]:
        query = queries[title]
        for old, new in changes:
            assert old in query
            query = query.replace(old, new)
        ran = preprocess("sql", finished.out, query, "--format", "csv")
        assert ran.code == 0, ran.err
        return list(csv.reader(io.StringIO(ran.out)))[1:]

    # 22 captions; number n ends in n % 17, and number 1 is "two dogs, a cat and the sea 1".
    assert answer("The corpus")[0][0] == "22"
    assert answer("Reasons") == [["00000000", "caption is not UTF-8", "1"]]
    assert answer("Image sizes")[0][0] == "below 64"
    uid = re.search(r"uid = '(\w+)'", queries["One sample by its uid"])
    assert uid
    found = answer("One sample by its uid", (uid[1], f"{1:032x}"))
    assert found == [["000000001", "32", "32", "two</w> dogs</w> ,</w> a</w> cat</w> and</w> the</w> sea</w> 1</w>"]]
    # "a red cat" and "two dogs, a cat and the sea": 8 captions with cat, 4 of them with red, which comes nowhere else.
    assert ["red</w>", "4", str(round(22 / 8, 1))] in answer(
        "What comes with a token", ("flower", "cat"), (">= 5", ">= 4")
    )
    # Of neighbouring whole words, "two dogs" occurs in 4 captions, and each of its words only there: NPMI is 1.
    pairs = answer("Word pairs", (">= 20", ">= 4"), ("LIMIT 8", "LIMIT 100"))
    assert ["two</w> dogs</w>", "4", "4.0"] in pairs
