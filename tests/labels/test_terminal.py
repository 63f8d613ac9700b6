"""What commands print: no control characters of data, no terminal that breaks them, one thing or several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from labels.show.terminal import count, run_command, visible
from labels.storage import UserError, atomic_write
from shard_factory import Built, build, healthy, preprocess, sample, write_tar

HOSTILE = "red\x1b[31m \x1b]0;title\x07 \rcat\x08\x08 \x9b2J \x7f \u202etxt\u2066 \u2028end"
ENCODINGS = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def has_control(text: str) -> bool:
    return any(ord(char) < 0x20 and char != "\n" for char in text) or any(char in text for char in "\x7f\x9b\u202e")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("hostile")
    members = [*sample("k0", "a red 猫"), *sample("k1", HOSTILE), *healthy(2)]
    write_tar(folder / "data" / "0.tar", members)
    build(folder / "data", folder / "out", "--no-beton")
    return Built(folder / "data", folder / "out")


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_a_character_that_the_terminal_lacks_ends_no_command(hostile: Built, environment: dict[str, str]) -> None:
    def said(*arguments: object) -> bytes:
        command = [sys.executable, "-m", "preprocess", *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    assert b"a red ?" in said("explain", hostile.out, "k0")
    assert b"?" in said("sql", hostile.out, "SELECT '猫' AS cat")
    assert json.loads(said("sql", hostile.out, "SELECT '猫' AS cat", "--format", "json")) == [{"cat": "猫"}]


def test_both_programs_start_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import preprocess.cli
    import train.cli

    for program in (preprocess.cli, train.cli):
        started: list[object] = []
        monkeypatch.setattr(program, "run_command", started.append)
        program.main()
        assert started == [program.cli]


@pytest.mark.parametrize("query", [f"SELECT '{HOSTILE}' AS text", f'SELECT 1 AS "{HOSTILE}"', f"SELEC '{HOSTILE}'"])
def test_control_characters_are_shown(hostile: Built, query: str) -> None:
    said = preprocess("sql", hostile.out, query)
    assert "␛[31m" in said.out + said.err and not has_control(said.out + said.err)


def test_explain_and_errors_show_control_characters(hostile: Built) -> None:
    assert "␛[31m" in preprocess("explain", hostile.out, "k1").out
    for said in (preprocess("explain", hostile.out, "k1"), preprocess("explain", hostile.out, HOSTILE)):
        assert not has_control(said.out + said.err)
    said = preprocess("sql", hostile.out, f"SELECT '{HOSTILE}' AS text", "--format", "json")
    assert json.loads(said.out) == [{"text": HOSTILE}], "data for a program stays as it is"


@pytest.mark.parametrize("char", [*map(chr, range(0x20)), "\x7f", *map(chr, range(0x80, 0xA0)), "\u202e", "\u2067"])
def test_every_control_character_becomes_a_symbol(char: str) -> None:
    assert char not in visible(f"a{char}b") and visible(f"a{char}b").startswith("a")


def test_ordinary_text_stays() -> None:
    text = "naïve 猫 👩‍🚀 עברית – “quoted”"
    assert visible(text) == text


def test_one_or_several() -> None:
    assert [count(number, "shard") for number in (0, 1, 2, 1200)] == ["0 shards", "1 shard", "2 shards", "1,200 shards"]
    assert count(2, "class", "classes") == "2 classes" and count(1, "class", "classes") == "1 class"


@pytest.mark.parametrize("error", [OSError(24, "Too many open files", "x"), RuntimeError("IO: Too many open files")])
def test_the_limit_of_open_files_is_named(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(command)
    assert ended.value.code == 2 and "error: more files are needed at once" in capsys.readouterr().err


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize("name", ["/proc/x.html", "/dev/null", "/dev/null/x.html", "n" * 300, "folder"])
def test_a_file_that_cannot_be_written_there_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    problem = r"cannot be written|is a device|is a folder|cannot be made"
    with pytest.raises(UserError, match=problem) as caught, atomic_write(path) as partial:
        partial.write_text("content")
    assert "fix: " in str(caught.value)
    assert Path("/dev/null").is_char_device() and [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("command", ["report", "explain", "idf"])
def test_commands_refuse_such_a_file(hostile: Built, command: str) -> None:
    arguments = {
        "report": ["report", hostile.out, "--out", "/proc/x.html"],
        "explain": ["explain", hostile.out, "k0", "--svg", "/proc/x.svg"],
        "idf": ["idf", hostile.out, "--out", "/proc/x.parquet"],
    }[command]
    said = preprocess(*arguments)
    assert said.code == 2 and "cannot be written: No such file or directory\n  fix: give another path" in said.err
