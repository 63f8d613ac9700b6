"""`preprocess sql`: three formats, read-only, nothing outside the label dataset; and the plain DuckDB shell."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len

from labels.idf import Gains, Sums, write_visual
from shard_factory import Built, contents, flip_bit, preprocess

SHELL = Path(sys.executable).parent / "duckdb"
TOP = "SELECT token, document_frequency AS df, idf FROM tokens ORDER BY df DESC, token_id LIMIT 3"


def asked(out: Path, query: str, form: str = "csv") -> str:
    said = preprocess("sql", out, query, "--format", form)
    assert said.code == 0, said.err
    return said.out


def denied(out: Path, query: str) -> str:
    said = preprocess("sql", out, query)
    assert said.code == 2 and not said.out
    return said.err


def test_csv(finished: Built) -> None:
    rows = list(csv.reader(io.StringIO(asked(finished.out, TOP))))
    assert rows[0] == ["token", "df", "idf"] and len(rows) == 4 and int(rows[1][1]) >= int(rows[2][1])
    assert asked(finished.out, "SELECT NULL AS a, 'x,\"y' AS b") == 'a,b\n,"x,""y"\n'


def test_json(finished: Built) -> None:
    rows = json.loads(asked(finished.out, TOP, "json"))
    assert [list(row) for row in rows] == [["token", "df", "idf"]] * 3
    assert json.loads(asked(finished.out, "SELECT * FROM tokens WHERE false", "json")) == []
    assert len(json.loads(asked(finished.out, "SELECT token_id FROM tokens", "json"))) == 49408
    found = json.loads(asked(finished.out, "SELECT [1, 2] AS l, NULL AS n, DATE '2024-01-02' AS d, '犬' AS s", "json"))
    assert found == [{"l": [1, 2], "n": None, "d": "2024-01-02", "s": "犬"}]


def test_table(finished: Built) -> None:
    found = asked(finished.out, TOP, "table")
    assert all(word in found for word in ("token", "df", "idf", "│"))
    assert "NULL" in asked(finished.out, "SELECT NULL AS n", "table") and "0.333333" in asked(
        finished.out, "SELECT 1/3 AS f", "table"
    )
    long = asked(finished.out, "SELECT repeat('x', 300) AS x", "table")
    assert long.count("x") == 301, "wrapped, not shortened"


@pytest.mark.parametrize(
    ("query", "block"),
    [
        ("SELECT 1 AS a, repeat('x', 300) AS b", ["a | 1", f"b | {76 * 'x'}", f"  | {76 * 'x'}"]),
        ("SELECT * FROM labels LIMIT 2", ["key       | 000000000"]),
        (f"SELECT {', '.join(f'{n} AS column_{n:02d}' for n in range(30))}", ["column_00 | 0", "column_29 | 29"]),
        (f"SELECT 7 AS {'n' * 60}", [f"{'n' * 60}"]),
        (f"SELECT 7 AS {'n' * 90}", [f"{'n' * 40} | 7"]),
        ("SELECT repeat('猫', 60) AS cats, 1 AS a", [f"cats | {'猫' * 36}", f"     | {'猫' * 24}"]),
    ],
)
def test_a_row_wider_than_the_terminal_is_a_block(
    finished: Built, monkeypatch: pytest.MonkeyPatch, query: str, block: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = asked(finished.out, query, "table").splitlines()
    wide = lines[0].startswith("-[ record 1 ]---")
    assert wide != query.endswith(" " + "n" * 60) and max(map(cell_len, lines)) <= 80
    assert all(any(line in found for found in lines) for line in block)


def test_the_rows_that_are_shown_are_counted(finished: Built) -> None:
    assert "only the first 1000 rows are shown" in asked(finished.out, "SELECT token_id FROM tokens", "table")
    assert "only the first" not in asked(finished.out, "SELECT token_id FROM tokens LIMIT 1000", "table")


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("SELECT captions FROM corpus", "22"),
        ("SELECT sum(rows) FROM shards", "22"),
        ("SELECT count(*) FROM labels", "22"),
        ("SELECT count(DISTINCT key) FROM labels WHERE len(label_ids) > 0", "22"),
        (
            "WITH l AS (SELECT unnest(label_ids) FROM labels) SELECT count(*) = (SELECT labels FROM corpus) FROM l",
            "True",
        ),
        ("FROM corpus SELECT vocabulary;", "49408"),
        ("SELECT reasons['caption is not UTF-8'] FROM shards ORDER BY shard", "1"),
        ("DESCRIBE tokens", "token_id,INTEGER,YES,,,"),
        ("/* a remark */ SELECT 7", "7"),
    ],
)
def test_reading(finished: Built, query: str, first: str) -> None:
    assert asked(finished.out, query).splitlines()[1] == first


@pytest.mark.parametrize(
    "query",
    [
        "CREATE TABLE t AS SELECT 1",
        "CREATE TEMP TABLE t AS SELECT 1",
        "DROP TABLE tokens",
        "INSERT INTO corpus SELECT * FROM corpus",
        "UPDATE tokens SET idf = 0",
        "DELETE FROM shards",
        "COPY tokens TO '{out}/labels/evil.parquet'",
        "COPY tokens TO '/tmp/evil.parquet'",
        "EXPLAIN ANALYZE COPY tokens TO '{out}/evil.parquet'",
        "EXPORT DATABASE '{out}/evil'",
        "ATTACH '{out}/evil.duckdb' AS e",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "RESET enable_external_access",
        "PRAGMA enable_profiling",
        "CALL pragma_version()",
        "SELECT 1; DROP TABLE tokens",
        "SELECT 1; SELECT 2",
        "",
        ";",
        "/* nothing */",
    ],
)
def test_a_query_that_writes_is_refused(built: Built, query: str) -> None:
    before = contents(built.out)
    found = denied(built.out, query.format(out=built.out))
    assert found.startswith("error: the query is not one that only reads: ") and "allowed: one SELECT" in found
    assert contents(built.out) == before


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT * FROM read_csv('/etc/passwd')", "Permission Error"),
        ("SELECT * FROM '/etc/passwd'", "/etc/passwd does not exist"),
        ("SELECT * FROM read_text('{out}/../secret')", "Permission Error"),
        ("SELECT * FROM read_text('{out}-other/secret')", "Permission Error"),
        ("SELECT * FROM glob('/*')", "Permission Error"),
        ("SELECT * FROM read_csv('https://example.com/x.csv')", "Permission Error"),
        ("SELECT * FROM nothing", "Table with name nothing does not exist"),
        ("SELECT nonsense FROM tokens", "nonsense"),
        ("SELEC 1", "syntax error"),
        ("SELECT CAST(token AS INT) FROM tokens", "Could not convert string"),
    ],
)
def test_a_failing_query_is_reported(built: Built, query: str, message: str) -> None:
    (built.out.parent / "secret").write_text("secret")
    (built.out.parent / f"{built.out.name}-other").mkdir()
    (built.out.parent / f"{built.out.name}-other" / "secret").write_text("secret")
    found = denied(built.out, query.format(out=built.out))
    assert found.startswith("error: the query failed: ") and message in found and "Traceback" not in found


def test_a_missing_or_broken_folder_is_reported(built: Built, tmp_path: Path) -> None:
    assert "has no idf.duckdb" in denied(tmp_path / "nowhere", "SELECT 1")
    shutil.rmtree(built.out / "labels")
    assert "labels cannot be read" in denied(built.out, "SELECT 1")
    (built.out / "idf.duckdb").write_bytes(b"nonsense" * 1000)
    assert "idf.duckdb cannot be opened" in denied(built.out, "SELECT 1")


def test_nothing_is_left_behind(built: Built) -> None:
    before = contents(built.out)
    asked(built.out, "SELECT count(*) FROM labels, labels, labels")
    assert contents(built.out) == before


def test_a_relative_out(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built.out.parent)
    assert asked(Path(built.out.name), "SELECT count(*) FROM labels").splitlines()[1] == "22"
    monkeypatch.chdir(built.out)
    assert asked(Path("."), "SELECT count(*) FROM labels").splitlines()[1] == "22"


def in_shell(out: Path, query: str) -> str:
    command = [str(SHELL), "-readonly", "-csv", "-noheader", "idf.duckdb", "-c", query]
    return subprocess.run(command, cwd=out, capture_output=True, text=True, check=True).stdout


def test_the_plain_shell_and_a_moved_out(built: Built, tmp_path: Path) -> None:
    expected = asked(built.out, TOP)
    assert in_shell(built.out, "SELECT count(*) FROM labels").strip() == "22"
    moved = tmp_path / "elsewhere" / "it's moved, here"
    moved.parent.mkdir()
    shutil.move(built.out, moved)
    assert in_shell(moved, "SELECT count(*), (SELECT captions FROM corpus) FROM labels").strip() == "22,22"
    tokens = [row[0] for row in csv.reader(io.StringIO(in_shell(moved, TOP)))]
    assert tokens == [row[0] for row in csv.reader(io.StringIO(expected))][1:]
    assert asked(moved, "SELECT count(*) FROM labels").splitlines()[1] == "22"
    assert asked(moved, TOP) == expected
    assert preprocess("verify", moved).code == 0


def test_a_flipped_bit_is_an_error_and_no_traceback(built: Built) -> None:
    for share in (0.0001, 0.3, 0.6):
        flip_bit(built.out / "idf.duckdb", share)
    assert denied(built.out, "SELECT sum(document_frequency), max(idf), max(token) FROM tokens").startswith("error: ")


def test_visual_weights_are_columns_of_tokens(finished: Built, tmp_path: Path) -> None:
    idf = pq.read_table(finished.out / "idf.parquet")
    count = len(idf)
    sums = Sums(10, np.zeros(count), np.zeros(count, np.int64), np.zeros(count), np.zeros(count))
    table = tmp_path / "visual.parquet"
    gains = Gains(np.full(count, np.nan), np.full(count, np.nan), np.arange(count) / count)
    write_visual(table, idf, idf["idf"].to_numpy(), sums, gains, {})
    query = "SELECT token_id, idf, visual_gain, weight, gain FROM tokens WHERE token_id = 320"
    said = preprocess("sql", finished.out, query, "--visual", table, "--format", "json")
    [row] = json.loads(said.out)
    assert row["visual_gain"] == 320 / count and row["weight"] == row["idf"] * row["visual_gain"]
    assert row["gain"] is None
    assert "has the columns" in preprocess("sql", finished.out, query, "--visual", finished.out / "idf.parquet").err
    assert "no table of visual weights at" in preprocess("sql", finished.out, query, "--visual", tmp_path / "none").err
