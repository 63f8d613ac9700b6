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
from labels.manifest import read_manifest
from labels.settings import Pipeline

CLIP_VOCABULARY = 49_408
"""Classes that are planned for where no OUT is given."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Pre-train a vision encoder on betons, and measure what it is worth."""


_config = click.option("--config", type=click.Path(path_type=Path), help="Configuration file (default: ./pipeline.yaml if it is there).")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. train.batch_size=256. Repeatable."
)


_recipe = click.option("--recipe", metavar="NAME", help="Entry of `recipes` in pipeline.yaml, laid over its section `train`.")


def _data(command: Callable[..., Any]) -> Callable[..., Any]:
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
            "--beton", "betons", is_flag=False, flag_value="", multiple=True, metavar="[OUT[=SHARE]]",
            help="OUT of build-labels, its manifest, some of its betons, or a glob (no value: paths.out). Repeatable; =0.3: a mixture.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@cli.command("run")
@_data
@click.option("--out", "run", type=click.Path(path_type=Path), help="Folder of the run (default: paths.run).")
@click.option("--synthetic", is_flag=True, help="Random images made once on the device, no checkpoints: what the model alone can do.")
@_recipe
@_config
@_set
def run_command(
    betons: tuple[str, ...], labels: tuple[str, ...], idf: Path | None, run: Path | None, synthetic: bool, recipe: str | None,
    config: Path | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Pre-train by classification, or go on with an interrupted run: the same command again."""
    from train.data import Chosen
    from train.run import synthetic_run, train_run  # torch takes a second: not for --help
    from train.signals import STOPPED_EXIT_CODE

    pipeline = load_pipeline(config, overrides, recipe)
    target = run or Path(pipeline.paths.run)
    if synthetic:
        vocabulary, label_limit, _ = head_size(pipeline, betons[0] if betons else None)
        if not synthetic_run(target / "synthetic", pipeline, vocabulary, label_limit):
            sys.exit(STOPPED_EXIT_CODE)
        return
    if not betons:
        raise UserError("`train run` was given no betons", mend="add --beton OUT (--beton alone takes paths.out), or --synthetic")
    chosen = Chosen([beton or pipeline.paths.out for beton in betons], [local_out(one) for one in labels], idf)
    if not train_run(chosen, target, pipeline):
        print(f"stopped and saved; the same command goes on with {target}")
        sys.exit(STOPPED_EXIT_CODE)


@cli.command("plan")
@click.option("--beton", is_flag=False, flag_value="", metavar="[OUT]", help="OUT of build-labels, for epochs and classes.")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of the planned run.")
@click.option(
    "--rate", "rates", multiple=True, type=click.FloatRange(min=0, min_open=True), default=(1e3, 1e4, 1e5), show_default=True,
    help="Samples/s over all devices. Repeatable.",
)  # fmt: skip
@_recipe
@_config
@_set
def plan_command(
    beton: str | None, devices: int, rates: tuple[float, ...], recipe: str | None, config: Path | None, overrides: tuple[str, ...]
) -> None:
    """What a run would take: steps, epochs, operations, memory, disk, messages, hours. Nothing is started."""
    import torch

    from train.plan import plan_lines

    pipeline = load_pipeline(config, overrides, recipe)
    vocabulary, _, samples = head_size(pipeline, beton)
    device = torch.device("cuda" if torch.cuda.is_available() and pipeline.train.runtime.device != "cpu" else "cpu")
    plan = plan_lines(pipeline.train, vocabulary=vocabulary, dataset_samples=samples, devices=devices, rates=rates, device=device)
    print("\n".join(plan))


def head_size(pipeline: Pipeline, beton: str | None) -> tuple[int, int, int | None]:
    """Classes, labels of a sample at most and samples of an OUT; CLIP's classes and no samples where none is given."""
    if beton is None:
        return CLIP_VOCABULARY, pipeline.labels.context, None
    manifest = read_manifest(local_out(beton or pipeline.paths.out))
    return manifest.tokenizer.vocabulary, manifest.label_limit, manifest.samples


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
