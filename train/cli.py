"""The command `train`: parse, call, report. Everything it does lives in the modules it imports."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from labels import __version__
from labels.config import load_pipeline
from labels.errors import UserError
from labels.layout import local_out


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Pre-train a vision encoder on betons, and measure what it is worth."""


_config = click.option("--config", type=click.Path(path_type=Path), help="Configuration file (default: ./pipeline.yaml if it is there).")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. train.batch_size=256. Repeatable."
)


def _betons(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is trained on."""
    for option in (
        click.option(
            "--idf", type=click.Path(path_type=Path), metavar="FILE", help="IDF table to take (`preprocess idf`), or an OUT that has one."
        ),
        click.option(
            "--labels", multiple=True, metavar="OTHER_OUT",
            help="Other labels for the same rows (default: the betons'). With several OUTs: one for each.",
        ),
        click.option(
            "--beton", "betons", is_flag=False, flag_value="", multiple=True, required=True, metavar="[OUT[=SHARE]]",
            help="OUT of build-labels, its manifest, some of its betons, or a glob (no value: paths.out). Repeatable; =0.3: a mixture.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@cli.command("run")
@_betons
@click.option("--out", "run", type=click.Path(path_type=Path), help="Folder of the run (default: paths.run).")
@_config
@_set
def run_command(
    betons: tuple[str, ...], labels: tuple[str, ...], idf: Path | None, run: Path | None, config: Path | None, overrides: tuple[str, ...]
) -> None:
    """Pre-train by classification, or go on with an interrupted run: the same command again."""
    from train.data import Chosen
    from train.run import STOPPED_EXIT_CODE, train_run  # torch takes a second: not for --help

    pipeline = load_pipeline(config, overrides)
    target = run or Path(pipeline.paths.run)
    chosen = Chosen([beton or pipeline.paths.out for beton in betons], [local_out(one) for one in labels], idf)
    if not train_run(chosen, target, pipeline):
        print(f"stopped and saved; the same command goes on with {target}")
        sys.exit(STOPPED_EXIT_CODE)


@cli.command("probe")
@click.option(
    "--train",
    "train_dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Training part: class folders, or shards with `class` in the json.",
)
@click.option("--test", "test_dir", type=click.Path(path_type=Path), required=True, help="Test part, laid out alike.")
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="run:RUN, untrained:RUN, timm:NAME or pixels:SIDE. Repeatable.",
)
@click.option("--weights", multiple=True, metavar="FILE", help="Weight file of each timm: encoder in turn, or `hub`.")
@click.option("--out", type=click.Path(path_type=Path), help="Result JSON.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps features between calls.")
@_config
@_set
def probe_command(
    train_dir: Path, test_dir: Path, encoders: tuple[str, ...], weights: tuple[str, ...], out: Path | None, cache: Path | None,
    config: Path | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Fit a linear classifier on the features of frozen encoders; accuracy on the test part."""
    import torch

    from train.evals.run_probe import run_probe

    settings = load_pipeline(config, overrides).probe
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_probe(encoders, train_dir, test_dir, settings, weights=weights, out=out, cache=cache, device=device)


def main() -> None:
    """Entry point: a UserError becomes a message and exit code 2, never a traceback."""
    try:
        cli()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
