"""`train clip`, `train lit`: parse, call, report."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from labels.config import load_pipeline
from train import options

_RUN = click.option("--out", "run", type=click.Path(path_type=Path), help="Folder of the run (default: paths.run).")


def _training(command: Callable[..., None]) -> Callable[..., None]:
    for option in (options.overrides, options.config, options.recipe, _RUN, options.betons):
        command = option(command)
    return command


@click.command("clip")
@_training
def clip(**arguments: Any) -> None:
    """Pre-train the same trunk by CLIP's loss, on the same images and their captions' tokens in order; the baseline of `train run`."""
    from train.clip import train_clip  # torch takes a second: not for --help

    _run("clip", arguments, train_clip)


@click.command("lit")
@click.argument("encoder", metavar="ENCODER")
@click.option("--weights", metavar="FILE", help="Weight file of a timm: or open_clip: encoder.")
@_training
def lit(encoder: str, weights: str | None, **arguments: Any) -> None:
    """Train a text tower for a frozen ENCODER (a run, run:RUN, timm:NAME, ...), so that `zeroshot` and `retrieval` can ask it."""
    from train.encoders.encoder import EncoderSpec
    from train.evals.lit import train_lit

    _run("lit", arguments, lambda *rest: train_lit(EncoderSpec(encoder, weights), *rest))


def _run(name: str, arguments: dict[str, Any], train: Callable[..., bool]) -> None:
    from train.loop import STOPPED_EXIT_CODE

    pipeline = load_pipeline(arguments["config"], arguments["overrides"], arguments["recipe"])
    run = arguments["run"] or Path(pipeline.paths.run)
    chosen = options.chosen(pipeline, arguments["betons"], arguments["labels"], arguments["idf"], f"train {name}")
    if not train(chosen, run, pipeline):
        print(f"stopped and saved; the same command resumes {run}")
        sys.exit(STOPPED_EXIT_CODE)
