"""What error messages and fixes name exists: commands, their options, keys of --set. Every string of the product that
is no docstring is read.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from doc_commands import GROUPS, ROOT
from labels.config import load_pipeline
from labels.storage import UserError
from train.evals.protocol import load_protocol, protocol_names

_OPTION = re.compile(r"(?<![\w(-])--[a-z][a-z_-]*")
_COMMAND = re.compile(r"(`?)\b(train|preprocess) ([a-z][a-z-]*)((?:[ \n]+[^\s`,;:()]+)*)")
_SET = re.compile(r"--set ([a-z_.]+)(?==)")
_TAR = {"--sort", "--transform", "--sparse", "--dereference", "--hard-dereference", "--multi-volume"}
_OTHERS = {"--nproc-per-node", "--head", *_TAR}  # of torchrun, ray and tar


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string that is no docstring and no single word, such as an argument of another program; a
    value inside an f-string is X.
    """
    tree = ast.parse(source)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):  # a docstring
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def options_of(command: click.Command) -> set[str]:
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union({"--help"}, *map(options_of, inner))


ALL_OPTIONS = set().union(*map(options_of, GROUPS.values()))


def faults(text: str) -> Iterator[str]:
    """What a message names and does not exist."""
    yield from (f"no command has {option}" for option in _OPTION.findall(text) if option not in ALL_OPTIONS | _OTHERS)
    for quote, group, name, words in _COMMAND.findall(text):
        command = GROUPS[group].commands.get(name)
        if command is None:
            if quote or "--" in words:
                yield f"`{group}` has no command {name}"
            continue
        given = set(_OPTION.findall(words)) - _OTHERS
        yield from (f"`{group} {name}` has no {option}" for option in sorted(given - options_of(command)))
    for key in _SET.findall(text):
        try:
            pipeline = load_pipeline(None, [f"{key}=null"])
            if (name := key.partition(".")[0]) in protocol_names():
                load_protocol(name).settings(pipeline)
        except UserError as error:
            if "unknown key" in str(error):
                yield f"--set has no key {key}"


FILES = sorted(path for part in ("labels", "preprocess", "train") for path in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_messages_name_commands_and_options_that_exist(file: Path) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {fault}: {text}"
        for line, text in strings(file.read_text("utf8"))
        for fault in faults(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train a text tower (train lit --encoder run:X), or", "`train lit` has no --encoder"),
        ("run `preprocess repair OUT`", "`preprocess` has no command repair"),
        ("take train clips --out X", "`train` has no command clips"),
        ("add --repair", "no command has --repair"),
        ("--set train.optimizer.rate=1", "--set has no key train.optimizer.rate"),
        ("--set knn.neighbours=[1]", "--set has no key knn.neighbours"),
        ("--set knn.k=[1]", None),
        ("train first (train run), or --config X without --set and --recipe", None),
        ("run `preprocess verify X`, then `train bench loader --beton X`", None),
    ],
)
def test_what_does_not_exist_is_found(text: str, fault: str | None) -> None:
    assert next(faults(text), None) == fault
