"""Every command in the documentation: understood by the program it names, and run where a laptop can run it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from beton_factory import WORDS, photo
from doc_commands import (
    GROUPS,
    PAGES,
    ROOT,
    Block,
    api_row,
    blocks,
    check,
    check_inline,
    commands,
    inline_commands,
    own_command,
    parse,
)
from labels.config import load_pipeline
from labels.storage import UserError
from train.evals.suite import Suite

# The tutorial's own model and budget, made small: (what the page says, what is run).
SMALLER = (
    ("samples: 100k", "samples: 128"),
    ("batch_size: 64", "batch_size: 32"),
    ("warmup_samples: 8k", "warmup_samples: 32"),
    ("depth: 4, embed_dim: 192, num_heads: 3", "depth: 1, embed_dim: 24, num_heads: 2"),
    ("image_size: 64", "image_size: 32"),
)
TUTORIAL = ROOT / "docs" / "tutorial.md"
OTHERS = [page for page in PAGES if page != TUTORIAL and any(block.run for block in blocks(page))]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of captioned images, one of labelled images, and all that the tutorial makes of them."""
    folder = tmp_path_factory.mktemp("docs")
    for number in range(24):
        image = folder / "photos" / f"{number % 2}" / f"{number:03d}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(photo(number, 48, 40))
        image.with_suffix(".txt").write_text(f"a {WORDS[number % 14]} and a {WORDS[number % 5]}\n")
    for number in range(24):
        part = folder / "labelled" / ("test" if number % 4 == 3 else "train") / WORDS[number % 3]
        part.mkdir(parents=True, exist_ok=True)
        shade = Image.new("RGB", (32, 32), (80 * (number % 3), 90 + number, 9 * number))
        shade.save(part / f"{number}.png")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert_page_runs(TUTORIAL)
        yield folder
    finally:
        os.chdir(before)


def assert_page_runs(page: Path) -> None:
    """Do what a page's tagged blocks say, in the working directory."""
    for block in blocks(page):
        if block.language == "yaml" and block.info != "yaml":
            Path(block.info.split()[1]).write_text(made_smaller(block.text) if "train:" in block.text else block.text)
        elif block.info == "python run":
            exec(compile(block.text, page.name, "exec"), {})
        elif block.info == "bash run":
            for words in commands(block.text):
                run(words)


def made_smaller(text: str) -> str:
    for written, smaller in SMALLER:
        assert written in text, f"the tutorial no longer says {written!r}"
        text = text.replace(written, smaller)
    return text


def run(words: list[str]) -> None:
    """One command of this project, in this process, with one worker where it takes some."""
    own = own_command(words)
    assert own, f"only this project's commands are run: {words}"
    group, arguments = own
    if any(parameter.name == "workers" for parameter in parse(group, arguments).command.params):
        arguments = [*arguments, "--workers", "1"]
    ran = CliRunner().invoke(GROUPS[group], arguments)
    assert ran.exit_code == 0, f"{' '.join(words)}: {ran.output}{ran.exception}"


def test_the_tutorial_leaves_what_it_promises(folder: Path) -> None:
    for name in ("labels.show.html", "run.html", "both.html"):
        assert (folder / name).read_text("utf8").startswith("<!DOCTYPE html>"), name
    assert "labels.stop_words" in (folder / "both.html").read_text("utf8").replace("<wbr>", "")
    assert (folder / "results" / "probe.json").is_file() and (folder / "results" / "suite" / "table.md").is_file()


@pytest.mark.parametrize("page", OTHERS, ids=page_id)
def test_what_other_pages_run(folder: Path, page: Path) -> None:
    assert_page_runs(page)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_is_understood(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        check_block(block)
    for words in inline_commands(page):
        check_inline(words, page)


def check_block(block: Block) -> None:
    assert block.language in ("bash", "yaml", "python", "sql", "text"), f"a block tagged {block.info!r}"
    if block.language == "bash":
        for words in commands(block.text):
            check(words)
    elif block.language == "python":
        compile(block.text, "a page", "exec")
    elif block.language == "yaml":
        content = yaml.safe_load(block.text)
        if "encoders" in content:
            Suite.model_validate(content)
        else:
            Path("x.yaml").write_text(block.text)
            load_pipeline(Path("x.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "preprocess build-labels",
        "preprocess build-labels DATA --ot out",
        "preprocess build-labels DATA --shard 8/8",
        "X=1 srun -n 4 python -m train run --beton out --set train.sample=5",
        "torchrun --nproc-per-node=8 -m train run --recipe superclass-513m",
        "make lunch",
        "cd out && lunch",
        "pip install '.[lunch]'",
        "python examples/openclipart/lunch.py",
    ],
)
def test_a_wrong_command_would_be_seen(text: str) -> None:
    [*_, words] = commands(text)
    with pytest.raises((click.ClickException, UserError, AssertionError)):
        check(words)


@pytest.mark.parametrize(
    "code", ["--set labels.stop_word=remove", "--lunch", "train lunch", "preprocess verify OUT --all"]
)
def test_a_wrong_word_in_a_sentence_would_be_seen(code: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Say `{code}`.")
    [words] = inline_commands(page)
    with pytest.raises((AssertionError, UserError)):
        check_inline(words, page)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_api_page_is_the_code() -> None:
    table = [line for line in (ROOT / "docs" / "api.md").read_text("utf8").splitlines() if line.startswith("| `")]
    assert len(table) > 10
    for line in table:
        assert line == api_row(line.split("`")[1])
