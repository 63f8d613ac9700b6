"""The command `train`: parse, call, report. Everything it does lives in the modules it imports."""

import sys
from pathlib import Path

import click

from labels import __version__
from labels.config import load_pipeline
from labels.errors import UserError
from labels.layout import local_out
from train import options
from train.evals.commands import register


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Pre-train a vision encoder on betons, and measure what it is worth."""


register(cli)


@cli.command("run")
@click.option("--beton", is_flag=False, flag_value="", required=True, metavar="[OUT]", help="OUT of build-labels (no value: paths.out).")
@click.option("--labels", metavar="OTHER_OUT", help="Other labels for the same rows (default: the betons').")
@click.option("--out", "run", type=click.Path(path_type=Path), help="Folder of the run (default: paths.run).")
@options.config
@options.overrides
def run_command(beton: str, labels: str | None, run: Path | None, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Pre-train by classification, or go on with an interrupted run: the same command again."""
    from train.run import STOPPED_EXIT_CODE, train_run  # torch takes a second: not for --help

    pipeline = load_pipeline(config, overrides)
    target = run or Path(pipeline.paths.run)
    other = local_out(labels) if labels else None
    if not train_run(local_out(beton or pipeline.paths.out), target, pipeline, labels=other):
        print(f"stopped and saved; the same command goes on with {target}")
        sys.exit(STOPPED_EXIT_CODE)


def main() -> None:
    """Entry point: a UserError becomes a message and exit code 2, never a traceback."""
    try:
        cli()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
