"""The commands in the documentation: found in its fenced blocks and inline code, and parsed by the real command lines.

```bash        every command is parsed by its program, but not run: it needs a cluster, terabytes, or minutes
```bash run    is also run, in this process, in the folder that the pages' tests share
```yaml NAME   a configuration or a suite; NAME is a file that later commands read
```python run  is run there, too
```sql         see test_cookbook.py
```text        is no command
"""

import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

import preprocess.cli
import train.cli
from labels.config import load_pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
GROUPS: dict[str, click.Group] = {"preprocess": preprocess.cli.cli, "train": train.cli.cli}
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# Programs that are not this project's: their own options are not checked.
_OTHERS = {
    "aws",
    "cat",
    "cd",
    "cp",
    "duckdb",
    "export",
    "git",
    "img2dataset",
    "ls",
    "mkdir",
    "python3",
    "ray",
    "rm",
    "sbatch",
    "source",
    "xdg-open",
}


class Block(NamedTuple):
    """A fenced block: its info string and its text."""

    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def run(self) -> bool:
        return self.info.endswith(" run")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [Block(*found) for found in _FENCE.findall(page.read_text("utf8"))]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell block; comments and variables' values are gone."""
    text = re.sub(r"\$\{?\w+\}?", "0", text.replace("\\\n", " "))
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def own_command(words: list[str]) -> tuple[str, list[str]] | None:
    """Group and arguments of a command of this project, with or without variables, srun and torchrun before it."""
    for index, word in enumerate(words):
        if word in GROUPS:
            before = [word for word in words[:index] if "=" not in word and not word.startswith("-")]
            if not before or (
                before[0] in ("srun", "torchrun", "python") and set(before[1:]) <= {"torchrun", "python"}
            ):
                return word, words[index + 1 :]
    return None


def parse(group: str, words: list[str]) -> click.Context:
    """Parse the arguments and the configuration like the program, without running it.

    Raises:
        click.UsageError, UserError: what the user would read.
    """
    top = click.Context(GROUPS[group], info_name=group)
    command = GROUPS[group].get_command(top, words[0]) if words else None
    if command is None:
        raise click.UsageError(f"{group} has no command {words[:1]}")
    context = command.make_context(words[0], words[1:], parent=top)
    file, recipe = context.params.get("config"), context.params.get("recipe") if words[0] in ("run", "plan") else None
    load_pipeline(file if file and file.is_file() else None, context.params.get("overrides", ()), recipe)
    return context


def check(words: list[str]) -> None:
    """Refuse a command that would not be understood."""
    own = own_command(words)
    if own:
        parse(*own)
        return
    program = next((word for word in words if "=" not in word), "export")
    if program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "python":
        assert (ROOT / words[words.index("python") + 1]).is_file(), words
    elif program == "pip":
        for wanted in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert (
                set(wanted.split(","))
                <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
            )
    else:
        assert program in _OTHERS, words


def inline_commands(page: Path) -> list[list[str]]:
    """Words of the inline code that begins with this project's commands or options; `|` stands for a choice of values.

    The first column of a table with the headings `from` and `to` holds other programs' options, and is skipped.
    """
    text, foreign, lines = _FENCE.sub("", page.read_text("utf8")).replace("\\|", "/"), False, []
    for line in text.splitlines():
        foreign = line.startswith("|") and (foreign or line.startswith("| from | to |"))
        lines.append(line.split("|", 2)[-1] if foreign else line)
    codes = _INLINE.findall("\n".join(lines))
    return [shlex.split(code) for code in codes if code.split(" ")[0] in GROUPS or code.startswith("--")]


def check_inline(words: list[str], page: Path) -> None:
    """Every option that is named exists: in the command that is named, else in any or in a script next to the page;
    `--set` is sound.
    """
    tops = {name: click.Context(group) for name, group in GROUPS.items()}
    if words[0] not in GROUPS:
        named = [
            group.get_command(tops[name], one)
            for name, group in GROUPS.items()
            for one in group.list_commands(tops[name])
        ]
    else:
        named = [GROUPS[words[0]].get_command(tops[words[0]], word) for word in words[1:2] if not word.startswith("--")]
    assert all(named), f"no such command: {' '.join(words)}"
    named += [inner for command in named if isinstance(command, click.Group) for inner in command.commands.values()]
    known = {option for command in named if command for parameter in command.params for option in parameter.opts} | {
        "--help",
        "--version",
    }
    for script in page.parent.glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text("utf8")))
    for index, word in enumerate(words):
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{' '.join(words)}: no option {word}"
        if word == "--set" and words[index + 1 :] and not words[index + 1].startswith("section."):
            load_pipeline(None, [words[index + 1]])


def api_row(name: str) -> str:
    """A line of docs/api.md, from the code: the name, its parameters, the first sentence of its docstring."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    summary = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
    parameters = ", ".join(parameter for parameter in inspect.signature(value).parameters if parameter != "self")
    return f"| `{name}` | {parameters or '-'} | {summary.replace('|', '&#124;')} |"


if __name__ == "__main__":  # rewrite the table of docs/api.md from the code
    page = ROOT / "docs" / "api.md"
    lines = page.read_text("utf8").splitlines()
    page.write_text(
        "\n".join(api_row(line.split("`")[1]) if line.startswith("| `") else line for line in lines) + "\n", "utf8"
    )
