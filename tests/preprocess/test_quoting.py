"""Tables with and without quoting: every row is read, or rejected, or the table is refused; no row swallows another."""

import csv
import io
import subprocess
from pathlib import Path

import fsspec
import pytest

from labels.manifest import read_manifest
from labels.storage import UserError
from preprocess.readers import table as table_reader
from preprocess.readers.base import parse_caption_key
from preprocess.readers.shards import find_shards
from preprocess.readers.table import read_table_rows
from shard_factory import build, jpeg, quarantined, rows

CAPTIONS = [f"a red cat {number}" for number in range(12)]


def table(folder: Path, text: str | bytes, name: str = "t.tsv") -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def unquoted(captions: list[str], delimiter: str = "\t", end: str = "\n", header: str = "filepath\ttitle") -> str:
    """Captions as lines, with a path before each one."""
    lines = [header.replace("\t", delimiter)]
    return end.join([*lines, *(f"{row}.jpg{delimiter}{text}" for row, text in enumerate(captions))]) + end


def quoted(captions: list[str], quoting: int = csv.QUOTE_MINIMAL, delimiter: str = ",", end: str = "\n") -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
    writer.writerows([["filepath", "title"], *([f"{row}.jpg", caption] for row, caption in enumerate(captions))])
    return text.getvalue()


def read(path: Path | str) -> tuple[list[str], list[tuple[str, str]]]:
    """Captions, and reason and detail of all faults."""
    [shard] = find_shards([str(path)]).shards
    batches = list(read_table_rows(shard, parse_caption_key(["auto"])))
    faults = [(fault.reason, fault.detail) for batch in batches for fault in batch.faults]
    return [text for batch in batches for text in batch.table["caption"].to_pylist()], faults


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as error:
        read(path)
    return error.value


STRAY = {
    "at the beginning": ['"a red cat'],
    "two in succession": ['"a', '"b'],
    "at the beginning, later one at an end": ['"a red cat', "a dog", 'a 12"'],
    "around a word": ['"Vintage" poster'],
    "in the middle": ['a "red" cat'],
    "at the end": ['a 12"'],
    "doubled": ['""a red cat""'],
    "alone": ['"'],
    "with a backslash": ['\\"a red cat\\"'],
}


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("form", ["tsv", "windows", "mark", "latin1", "csv", "no last line break"])
def test_a_stray_quote_swallows_no_row(tmp_path: Path, stray: str, place: str, form: str) -> None:
    at = {"first": 0, "middle": 6, "last": len(CAPTIONS)}[place]
    captions = [*CAPTIONS[:at], *STRAY[stray], *CAPTIONS[at:]]
    text = unquoted(captions, "," if form == "csv" else "\t", "\r\n" if form == "windows" else "\n").encode()
    text = b"\xef\xbb\xbf" + text if form == "mark" else text
    text = text + b"x.jpg\tcaf\xe9\n" if form == "latin1" else text.rstrip() if form.startswith("no") else text
    path = table(tmp_path, text, "t.csv" if form == "csv" else "t.tsv")
    if stray == "at the beginning, later one at an end":
        assert "lines " in str(refused(path)) and "are one row if quotes" in str(refused(path))
    else:
        assert read(path)[0] == captions
        assert [reason for reason, _ in read(path)[1]] == ["caption is not UTF-8"] * (form == "latin1")


ODD = [
    'a "red" cat',
    '"a cat"',
    '"',
    "a, b",
    "a\tb",
    "one\ntwo",
    'one, "\n" two',
    "one\r\n\r\ntwo",
    "a; b",
    'x"',
    '""',
    "x\n",
]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_writer_quotes_is_read_as_written(tmp_path: Path, quoting: int, delimiter: str, end: str) -> None:
    captions = [*CAPTIONS, *ODD]
    text = quoted(captions, quoting, delimiter, end)
    assert read(table(tmp_path, text, "t.tsv" if delimiter == "\t" else "t.csv")) == (captions, [])
    assert read(table(tmp_path, "\ufeff" + text, "t.csv"))[0] == captions


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 5, 64, 1000])
def test_a_quote_may_begin_any_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
    monkeypatch.setattr(table_reader, "_READ_BYTES", read_bytes)
    far = [f"a cat {number}" for number in range(300)]
    for captions in ([*far, '"a red cat', *far], [*far, '"'], ['"a', *far, '"b c']):
        assert read(table(tmp_path, unquoted(captions))) == (captions, [])
    for captions in ([*far, "one,\ntwo", *far], ["a, b", *far, 'x "y"', *far], [*far, '"']):
        assert read(table(tmp_path, quoted(captions), "t.csv")) == (captions, [])
    lines = quoted(["a, b", *far]).splitlines()
    lines[200:202] = [f'{lines[200]},"x"y', 'a.jpg,"a cat']
    assert "line 201 does not end" in str(refused(table(tmp_path, "\n".join(lines), "t.csv")))


def test_few_broken_rows_of_a_quoted_table_are_rejected_by_line(tmp_path: Path) -> None:
    lines = quoted([f"a cat, number {number}" for number in range(300)]).splitlines()
    lines[100] = '99.jpg,"12" ruler, long"'
    lines[200] = '199.jpg,"a dog'  # goes on until the next line's first quote
    captions, faults = read(table(tmp_path, "\n".join(lines), "t.csv"))
    assert captions == [f"a cat, number {number}" for number in range(300) if number not in (99, 199, 200)]
    assert faults == [
        ("row is damaged", f"line {line}: the quote that begins a field in line {first} does not end with the field")
        for line, first in ((101, 101), (201, 201), (202, 201))
    ]
    cut = quoted([f"a cat, number {number}" for number in range(300)])[:-4]
    assert len(read(table(tmp_path, cut, "t.csv"))[0]) == 299
    [(_, detail)] = read(tmp_path / "t.csv")[1]
    assert detail.startswith("line 301: ")


MIXED = {
    "an open quote in a quoted table": ('path,caption\na.jpg,"a, b"\nb.jpg,"a dog\nc.jpg,a fox\n', "line 3", "line 2"),
    "quotes that are not doubled": (
        "path,caption\n" + 'a.jpg,"12" ruler"\nb.jpg,"a dog"\n' * 3,
        "line 2",
        "most lines",
    ),
    "backslashes": ('path,caption\na.jpg,"a, b"\nb.jpg,"a \\"red\\" cat"\n', "line 3", "line 2"),
    "a quoted header": ('"path","caption"\na.jpg,"a" b\nb.jpg,c\n', "line 2", "the first line"),
    "an open header": ('path,"caption\na.jpg,"a, b"\nb.jpg,"a, b"\n', "line 1", "most lines"),
    "a quoted table that is cut": ('"path","caption"\n"a.jpg","a\nb"\n"b.jpg","a d', "line 4", "line 2"),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_a_table_of_both_kinds_is_refused(tmp_path: Path, mixed: str) -> None:
    text, line, other = MIXED[mixed]
    error = refused(table(tmp_path, text, "t.csv"))
    assert f'the quote (") that begins a field in {line} does not end with the field' in error.problem
    assert other in error.problem and error.allowed and f"correct {line}; " in str(error.fix)


UNSURE = {
    "one column": 'caption\n"a cat\nsits"\na dog\n',
    "the last column": 'path,caption\na.jpg,"a cat\nb.jpg,a dog"\nc.jpg,a fox\n',
    "the first column": 'caption\tpath\n"a cat\ta.jpg\na dog"\tb.jpg\n',
    "one with a row that is only right with quotes": 'path,caption\na.jpg,"x, y"\nb.jpg,"a cat\nc.jpg,a dog"\n',
}


@pytest.mark.parametrize("unsure", UNSURE)
def test_an_ambiguous_table_is_refused_and_both_fixes_work(tmp_path: Path, unsure: str) -> None:
    text = UNSURE[unsure]
    path = table(tmp_path, text, "it's a.csv")
    error = refused(path)
    assert "are one row if quotes" in error.problem and error.fix
    subprocess.run(error.fix.partition("write the table again: ")[2], shell=True, check=True, cwd=tmp_path)
    delimiter = "\t" if "\t" in text else ","
    column = text.splitlines()[0].split(delimiter).index("caption")
    lines = [line.split(delimiter) for line in text.splitlines()]
    as_text = [line[column] for line in lines[1:] if len(line) == len(lines[0])]
    assert read(tmp_path / "quoted.csv")[0] == as_text
    header, rest = text.split("\n", 1)
    enclosed = delimiter.join(f'"{name}"' for name in header.split(delimiter))
    as_quoted = [row[column] for row in csv.reader(io.StringIO(rest), delimiter=delimiter)]
    assert read(table(tmp_path, f"{enclosed}\n{rest}", "t.csv")) == (as_quoted, [])


def test_an_unquoted_table_builds_with_every_image(tmp_path: Path) -> None:
    for row in range(12):
        (tmp_path / f"{row}.jpg").write_bytes(jpeg(row))
    captions = [*CAPTIONS[:3], '"' + CAPTIONS[3], *CAPTIONS[4:]]
    build(table(tmp_path, unquoted(captions), "p.tsv"), tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 12 and quarantined(tmp_path / "out") == []
    assert read_manifest(tmp_path / "out").samples == 12


def test_a_remote_table_is_decided_too() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/test-quoting/t.tsv", unquoted(['"a', "b", '"c']).encode())
    try:
        assert read("memory://test-quoting/t.tsv") == (['"a', "b", '"c'], [])
    finally:
        memory.rm("/test-quoting", recursive=True)
