"""A fuzz run over names: of DATA, of its folders and shards, and of the output folder.

    python tests/helpers/fuzz_paths.py --inputs 25000 --builds 300 [--seed 0]

Every shard is found, read and given a name that Arrow and DuckDB write and read back, or is counted as ignored (its
name is hidden or temporary), or the command is refused: a list whose parts cannot be found apart, a glob in a folder
whose name is a pattern, `0.tar` next to `0.TAR`. A build has a label row for each shard, is whole, and has nothing to
do when it is run again.
"""

import os
import random
import shutil
from collections import Counter
from contextlib import chdir
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from fuzz_runs import main
from labels.storage import Layout, UserError, atomic_write, library_path, user_path
from preprocess.readers.shards import find_shards
from shard_factory import healthy, preprocess, rows, tar_bytes

_PIECES = [
    *[
        "a",
        "0",
        "data",
        "Ab9",
        "run:1",
        ":",
        "::",
        "s3:",
        "file:",
        "zip:",
        "C:",
        "~",
        "~a",
        "x::",
        "12:30",
        "tar",
        ".tar",
    ],
    *[
        "{",
        "}",
        "{0..1}",
        "{a,b}",
        ",",
        "*",
        "?",
        "[",
        "]",
        "[1]",
        " ",
        "'",
        '"',
        "\\",
        "\\x",
        "%E9",
        "%",
        "#",
        "&",
        "=",
    ],
    *[
        "\n",
        "\t",
        "\x1b[31m",
        "é",
        "犬",
        "e\u0301",
        "\udce9",
        "\udcff",
        "\ud83d".encode("utf8", "surrogatepass").decode("latin1"),
    ],
    *[
        ".",
        "..",
        "_",
        "-",
        "--",
        ".tmp",
        ".part",
        ".parquet",
        "_stats.json",
        "$(a)",
        ";",
        "|",
        "<",
        "d" * 60,
        "犬" * 40,
    ],
]
_IGNORED_BEGINNINGS, _IGNORED_ENDINGS = (".", "_"), (".tmp", ".temp", ".part", ".partial", ".crdownload", ".aria2")


def name(draw: random.Random, longest: int = 255) -> str:
    """A file name: some pieces, cut to `longest` bytes."""
    while True:
        text = "".join(draw.choices(_PIECES, k=draw.randrange(1, 6)))
        cut = os.fsdecode(os.fsencode(text)[:longest])
        if cut not in ("", ".", ".."):
            return cut


def _spelt(draw: random.Random, text: str) -> str:
    """A relative path as a user would have to write it: `./` protects what is an option or the home folder."""
    return f"./{text}" if text.startswith(("~", "-")) or draw.random() < 0.2 else text


def _is_ignored(below: str) -> bool:
    return any(part.startswith(_IGNORED_BEGINNINGS) or part.endswith(_IGNORED_ENDINGS) for part in below.split("/"))


@cache
def _tar(number: int) -> bytes:
    return tar_bytes(healthy(1, first=number, side=8))


@cache
def _connection() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1})


def made(draw: random.Random, base: Path) -> tuple[str, list[str]]:
    """DATA with one to four tars, some deeper: its name, and the paths of the tars below it."""
    data, below = name(draw), set[str]()
    for number in range(draw.randrange(1, 5)):
        folders = [name(draw) for _ in range(draw.choice([0, 0, 1, 1, 2, 5]))]
        path = "/".join([*folders, name(draw, 251) + draw.choice([".tar", ".tar", ".tar", ".TAR"])])
        file = base / data / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_tar(number))
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue  # a name that is a folder's already
        below.add(path)
    return data, sorted(below)


def check_data(draw: random.Random, base: Path, data: str, below: list[str]) -> Counter[str]:
    """Find the shards of DATA by a way of naming it; numbers of tars that were read, ignored or refused."""
    way = draw.choice(["folder", "folder", "absolute", "file", "list", "glob"])
    ignored = {path for path in below if _is_ignored(path)}
    if way in ("file", "list"):
        chosen = draw.sample(below, 1 if way == "file" else min(2, len(below)))
        text, expected = "::".join(_spelt(draw, f"{data}/{path}") for path in chosen), set(chosen)
    else:
        text = str(base / data) if way == "absolute" else _spelt(draw, data) + ("/**" if way == "glob" else "")
        expected = set(below) - ignored
    try:
        shards = find_shards([text]).shards
    except UserError as error:
        if "would both be shard" in error.problem:
            return Counter({"refused: two tars of one name": len(below)})
        assert not expected or way == "list" or (way == "glob" and set("*?[{") & set(data)), text
        return Counter({f"refused: {'ignored names alone' if not expected else way}": len(below)})
    assert {shard.path for shard in shards} == {f"{base}/{data}/{path}" for path in expected}, text
    for shard in shards:
        with shard.open() as file:
            assert file.read() == Path(shard.path).read_bytes()
    names = [shard.name for shard in shards]
    assert len(set(names)) == len(names) and names == [shard.name for shard in find_shards([text]).shards]
    check_out(draw, base, names)
    left = len(below) - len(expected)
    return Counter({"read": len(expected), "ignored" if way not in ("file", "list") else "not named": left})


def check_out(draw: random.Random, base: Path, names: list[str]) -> None:
    """Write a label file of every shard below an output folder of any name, and read it by Arrow and DuckDB."""
    text = "/".join(name(draw) for _ in range(draw.randrange(1, 3)))
    out = user_path(_spelt(draw, text))
    assert os.path.abspath(out) == os.path.abspath(base / text) and user_path(out) == user_path(str(out)) == out
    layout, table = Layout(out), pa.table({"a": [1, 2, 3]})
    if base.joinpath(text.split("/")[0]).is_file():
        return
    for shard in names:
        with atomic_write(layout.label_file(shard)) as partial:
            pq.write_table(table, partial)
        assert pq.read_table(library_path(layout.label_file(shard)), use_threads=False) == table
        partial_name = f"{shard}.parquet.0123456789ab.partial"
        assert len(partial_name.encode()) <= 255
    files = [str(library_path(layout.label_file(shard))) for shard in names]
    for source in (files, [f"{library_path(layout.labels)}/*.parquet"]):
        (count,) = _connection().execute("SELECT count(*) FROM read_parquet($1)", [source]).fetchone() or (0,)
        assert count == 3 * len(names), (source, count)


def check_build(draw: random.Random, base: Path, data: str, below: list[str]) -> Counter[str]:
    """Build DATA as a whole: numbers of tars in label rows, ignored, or refused."""
    out = "/".join(name(draw) for _ in range(draw.randrange(1, 3)))
    options = ["--no-images"] if draw.random() < 0.3 else []
    arguments = ["build-labels", _spelt(draw, data), "--out", _spelt(draw, out), "--workers", 1, *options]
    said = preprocess(*arguments)
    wanted = [path for path in below if not _is_ignored(path)]
    if said.code:
        assert said.code == 2 and (not wanted or set("?\\") & set(out) or "would both be shard" in said.err), said.err
        return Counter({f"refused: {'output folder' if wanted else 'ignored names alone'}": len(below)})
    assert len(rows(base / out)) == len(wanted)
    files = {path: path.stat().st_mtime_ns for path in (base / out).rglob("*.parquet") if path.stem != "quarantine"}
    assert preprocess(*arguments).code == 0 and preprocess("verify", _spelt(draw, out)).code == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
    return Counter({"built": len(wanted), "ignored": len(below) - len(wanted)})


def fuzz_paths(inputs: int, builds: int, seed: int, folder: Path) -> Counter[str]:
    """Check `inputs` inputs, and `builds` whole builds: numbers of tars by outcome."""
    total: Counter[str] = Counter()
    for number in range(inputs + builds):
        draw = random.Random(f"{seed}-{number}")
        base = folder / "base"
        base.mkdir()
        data, below = made(draw, base)
        try:
            with chdir(base):
                total += (check_data if number < inputs else check_build)(draw, base, data, below)
        except BaseException:
            print(f"input {number} of seed {seed}: {data!r} {below!r}", flush=True)
            raise
        shutil.rmtree(base)
        if number % 5000 == 4999:
            print(f"{number + 1:,} inputs", flush=True)
    return total


if __name__ == "__main__":
    main(
        __doc__,
        "none lost",
        lambda chosen, folder: fuzz_paths(chosen.inputs, chosen.builds, chosen.seed, folder),
        builds=300,
    )
