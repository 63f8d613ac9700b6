"""A fuzz run over CSV and TSV: tables with quotes of every kind, read as Python's csv module reads them, or refused.

    python tests/helpers/fuzz_tables.py --inputs 25000 [--seed 0]

Every row that the csv module finds, in the dialect that was chosen, has its caption labelled or is rejected with a
reason. A table that was written with or without quoting and is not mutated never has fewer rows than were written.
"""

import csv
import io
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_runs import check_all, main
from labels.storage import UserError
from preprocess.readers import table as table_reader
from preprocess.readers.base import parse_caption_key
from preprocess.readers.shards import Shard
from preprocess.readers.table import TableDamaged, open_table, read_table_rows

CHOICES = parse_caption_key(["csv:caption"])
HEADERS = (["caption"], ["path", "caption"], ["caption", "path"], ["path", "caption", "note"])
_WORDS = ["a red cat", "dog", "12", "x" * 30, "Ã©", "日本", "\u0085", "\ufeff", "\0", "\\", "'", " ", "", "“", "R&B"]
_QUOTES = ['"', '"', '""', '\\"', '"a"', ' "', '" ']
_BREAKS = ["\n", "\r\n", "\n\n", "\r"]
Row = tuple[int, list[str]]
"""The number of its first line, counted by line feeds, and its cells."""


def cell(draw: random.Random, delimiter: str, quotes: float, breaks: float) -> str:
    """A few pieces; separators and line breaks as often as `breaks` says."""
    pieces = [*_WORDS, *draw.choices(_QUOTES, k=3 if draw.random() < quotes else 0)]
    pieces += draw.choices([delimiter, *_BREAKS], k=3 if draw.random() < breaks else 0)
    return "".join(draw.choices(pieces, k=draw.randrange(4)))


def rows_of(draw: random.Random, width: int, delimiter: str, quotes: float, breaks: float) -> list[list[str]]:
    return [[cell(draw, delimiter, quotes, breaks) for _ in range(width)] for _ in range(draw.randrange(1, 30))]


def table_text(draw: random.Random, kind: str, header: list[str], delimiter: str) -> str:
    """A table as a writer of this kind writes it."""
    breaks = 0.0 if kind == "unquoted" else draw.choice([0.0, 0.1, 0.6])
    rows = rows_of(draw, len(header), delimiter, draw.choice([0.02, 0.2, 0.8]), breaks)
    end = draw.choice(["\n", "\r\n"])
    text = io.StringIO()
    if kind == "quoted":
        quoting: Any = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
        csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([header, *rows])
        return text.getvalue()
    text.write(delimiter.join(header) + end)
    for row in rows:
        row_kind = draw.choice(["unquoted", "quoted", "naive"]) if kind == "mixed" else kind
        if row_kind == "quoted":
            csv.writer(text, delimiter=delimiter, lineterminator=end).writerow(row)
        else:
            around = '"' if row_kind == "naive" else ""
            text.write(delimiter.join(around + value + around for value in row) + end)
    return text.getvalue()


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, inserted or removed; or the end cut off."""
    out = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(out) + 1)
        out[at : at + draw.randrange(3)] = draw.choice([b'"', b"\n", b"\xe9", b"", b'"\n', b",", b"\r", b"x"])
    return bytes(out[: draw.randrange(len(out) + 1)]) if draw.random() < 0.3 else bytes(out)


def records(data: bytes, delimiter: str, *, quoted: bool) -> list[Row]:
    """All rows that the csv module finds, the header too; blank lines are none."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("latin1")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    line_feeds = [0]
    for line in re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text):
        line_feeds.append(line_feeds[-1] + line.count("\n"))
    found, lines = [], 0
    for row in reader:
        if row:
            found.append((1 + line_feeds[lines], row))
        lines = reader.line_num
    return found


def labelled(rows: list[list[str]], column: int) -> list[tuple[str, str]]:
    """Key and caption of the rows that have one."""
    pairs = []
    for number, row in enumerate(rows):
        try:
            caption = row[column].encode("latin1").decode("utf8")
        except UnicodeDecodeError:
            continue
        if caption.strip():
            pairs.append((f"{number:012d}", caption))
    return pairs


def check(data: bytes, path: Path, least: int) -> Counter[str]:
    """Numbers of labelled and rejected rows; `least`: rows that have to be there, if the table is not refused."""
    path.write_bytes(data)
    shard = Shard("fuzz", str(path), len(data), "", "csv")
    try:
        table: Any = open_table(shard)
        batches = list(read_table_rows(shard, CHOICES, 7))
    except UserError as error:
        return Counter(
            {f"refused: {re.sub('[0-9]+', 'N', error.problem.partition(': ')[2] or 'no such column')[:60]}": 1}
        )
    except TableDamaged as error:
        assert len(records(data, ",", quoted=False)) <= 1, "there are rows"
        return Counter({f"refused: {error.fault.reason}": 1})
    rows = [(row["key"], row["caption"]) for batch in batches for row in batch.table.to_pylist()]
    faults = [fault for batch in batches for fault in batch.faults]
    if any(fault.reason == "not a table" for fault in faults):
        assert len(records(data, table.delimiter, quoted=table.quoted)) == 1, "there are rows"
        return Counter({"refused: not a table": 1})
    (_, header), *found = records(data, table.delimiter, quoted=table.quoted)
    starts = [match for fault in faults if (match := re.search("begins a field in line ([0-9]+)", fault.detail))]
    broken, reasons = {int(start[1]) for start in starts}, Counter(fault.reason for fault in faults)
    reasons["row is damaged"] -= len(starts)
    of_broken = sum(first in broken for first, _ in found)
    if len(broken) == of_broken:  # not so only where a line that ends with a carriage return has no number of its own
        kept = [row for first, row in found if first not in broken]
        whole = [row for row in kept if len(row) == len(header)]
        assert rows == labelled(whole, header.index("caption"))
        assert reasons["row is damaged"] == len(kept) - len(whole)
    else:
        assert data.count(b"\r") > data.count(b"\r\n") and len(broken) < of_broken
    assert len(broken) <= len(found) - len(rows) - reasons.total() <= of_broken and len(found) >= least
    return reasons + Counter({"labelled": len(rows), "broken quotes": len(broken), f"read as quoted={table.quoted}": 1})


class Table(NamedTuple):
    """One input; `least` rows have to be found in it, in reads of `read_bytes` (0: as usual)."""

    kind: str
    suffix: str
    data: bytes
    least: int
    read_bytes: int


def made(draw: random.Random) -> Table:
    kind, header = draw.choice(["quoted", "quoted", "unquoted", "unquoted", "mixed"]), draw.choice(HEADERS)
    delimiter, suffix = draw.choice([(",", "csv"), ("\t", "tsv"), ("\t", "csv"), (";", "csv")])
    if len(header) == 1:  # the header shows no other delimiter
        delimiter = "\t" if suffix == "tsv" else ","
    text = table_text(draw, kind, header, delimiter)
    encoding = "latin1" if draw.random() < 0.1 else "utf8"
    data = draw.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode(encoding, "replace")
    least = 0
    if draw.random() < 0.4:
        data = mutated(draw, data)
    elif kind != "mixed":
        least = len(records(text.encode(), delimiter, quoted=kind == "quoted")) - 1
    return Table(kind, suffix, data, least, draw.choice([1, 16, 200, 0]))


def fuzz_tables(inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Check `inputs` tables: numbers of labelled and rejected rows, and of refused tables by reason."""
    usual = table_reader._READ_BYTES

    def check_table(table: Table, _: int) -> Counter[str]:
        table_reader._READ_BYTES = table.read_bytes or usual  # type: ignore[misc]
        found = check(table.data, folder / f"fuzz.{table.suffix}", table.least)
        return Counter({f"{table.kind}, {reason}": count for reason, count in found.items()})

    try:
        return check_all(inputs, seed, made, check_table, lambda table: (f"fuzz-failed.{table.suffix}", table.data))
    finally:
        table_reader._READ_BYTES = usual


if __name__ == "__main__":
    main(
        __doc__, "no row lost without a reason", lambda chosen, folder: fuzz_tables(chosen.inputs, chosen.seed, folder)
    )
