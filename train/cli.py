"""The command `train`: parse, call, report. Everything it does lives in the modules it imports."""

import json
import sys
import time
from pathlib import Path

import click

from labels import __version__
from labels.config import load_pipeline
from labels.errors import UserError
from labels.layout import local_out, out_path
from labels.manifest import read_manifest
from labels.settings import Pipeline
from train import options
from train.bench.commands import bench
from train.contrastive.command import clip, lit
from train.evals.commands import register
from train.export.command import export
from train.llava.command import llava
from train.report.command import report

_FILE = click.Path(path_type=Path, dir_okay=False)
CLIP_VOCABULARY = 49_408
"""Classes that are planned for where no OUT is given."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Pre-train a vision encoder on betons, and measure what it is worth."""


register(cli)
cli.add_command(clip)
cli.add_command(lit)
cli.add_command(report)
cli.add_command(bench)
cli.add_command(export)
cli.add_command(llava)


@cli.command("run")
@options.betons
@click.option("--out", "run", type=click.Path(path_type=Path), help="Folder of the run (default: paths.run).")
@click.option("--synthetic", is_flag=True, help="Random images made once on the device, no checkpoints: what the model alone can do.")
@options.recipe
@options.config
@options.overrides
def run_command(
    betons: tuple[str, ...], labels: tuple[str, ...], idf: Path | None, run: Path | None, synthetic: bool, recipe: str | None,
    config: Path | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Pre-train by classification, or resume an interrupted run: the same command again."""
    from train.loop import STOPPED_EXIT_CODE
    from train.trainer import synthetic_run, train_run  # torch takes a second: not for --help

    pipeline = load_pipeline(config, overrides, recipe)
    target = run or Path(pipeline.paths.run)
    if synthetic:
        vocabulary, label_limit, _ = head_size(pipeline, betons[0] if betons else None)
        if not synthetic_run(target / "synthetic", pipeline, vocabulary, label_limit):
            sys.exit(STOPPED_EXIT_CODE)
        return
    chosen = options.chosen(pipeline, betons, labels, idf, "train run", ", or --synthetic")
    if not train_run(chosen, target, pipeline):
        print(f"stopped and saved; the same command resumes {target}")
        sys.exit(STOPPED_EXIT_CODE)


@cli.command("plan")
@click.option("--beton", is_flag=False, flag_value="", metavar="[OUT]", help="OUT of build-labels, for epochs and classes.")
@click.option("--method", type=click.Choice(["run", "clip", "lit"]), default="run", show_default=True, help="Of which command.")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of the planned run.")
@click.option(
    "--rate", "rates", multiple=True, type=click.FloatRange(min=0, min_open=True),
    help="Samples/s over all devices. Repeatable (default: 1000, 10000, 100000, or what --measure finds).",
)  # fmt: skip
@click.option(
    "--measure", is_flag=False, flag_value=20.0, type=click.FloatRange(min=0.1), metavar="[SECONDS]",
    help="Train so long on this machine, for a rate and for what a run takes beside its steps (no value: 20). Nothing is kept.",
)  # fmt: skip
@click.option("--price-per-device-hour", "price", type=click.FloatRange(min=0), help="In any currency.")
@options.recipe
@options.config
@options.overrides
def plan_command(
    beton: str | None, method: str, devices: int, rates: tuple[float, ...], measure: float | None, price: float | None,
    recipe: str | None, config: Path | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """What a run would take: steps, epochs, operations, memory, disk, messages, hours, cost."""
    begun = time.perf_counter()
    import torch

    from train.bench.estimate import plan_lines
    from train.clip import check_whole_batches
    from train.losses.kinds import check_accumulation
    from train.pace import measure_pace

    pipeline = load_pipeline(config, overrides, recipe)
    if measure is not None and (beton is None or method != "run"):
        raise UserError(
            "--measure trains as `train run` does, on betons", allowed="--method run with --beton OUT", mend="add --beton, or give --rate"
        )
    vocabulary, _, samples = head_size(pipeline, beton)
    device = torch.device("cuda" if torch.cuda.is_available() and pipeline.train.runtime.device != "cpu" else "cpu")
    tower = None if method == "run" else pipeline.text_tower
    if tower:
        check_whole_batches(pipeline.train, f"train {method}")
    check_accumulation(pipeline.train)
    pace = None
    if measure is not None and beton is not None:
        pace = measure_pace(options.chosen(pipeline, [beton], (), None, "train plan"), pipeline.train, devices, measure, begun)
    plan = plan_lines(
        pipeline.train, vocabulary=vocabulary, dataset_samples=samples, devices=devices,
        rates=rates or (() if pace else (1e3, 1e4, 1e5)), device=device, tower=tower, locked=method == "lit", pace=pace, price=price,
    )  # fmt: skip
    print("\n".join(plan))


def head_size(pipeline: Pipeline, beton: str | None) -> tuple[int, int, int | None]:
    """Classes, labels of a sample at most and samples of an OUT; CLIP's classes and no samples where none is given."""
    if beton is None:
        return CLIP_VOCABULARY, pipeline.labels.context, None
    manifest = read_manifest(local_out(beton or pipeline.paths.out))
    return manifest.tokenizer.vocabulary, manifest.label_limit, manifest.samples


@cli.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="How many tokens of each image.")
def predict_command(run: Path, images: tuple[Path, ...], top: int) -> None:
    """Print the likeliest tokens of images by RUN's newest checkpoint, as JSON."""
    from train.evals.predict import predict_tokens, read_images

    print(json.dumps(predict_tokens(run, read_images(images), top), indent=1))


@cli.command("explain")
@click.argument("out")
@click.argument("sample", metavar="KEY|UID")
@click.option(
    "--checkpoint", "run", type=click.Path(path_type=Path), metavar="RUN", required=True, help="A run, or one checkpoint's folder."
)
@click.option("--shard", metavar="NAME", help="The shard to search, if several have the key.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Predicted tokens to show.")
@click.option("--html", type=_FILE, help="Write a page that opens without a network.")
@click.option("--svg", type=_FILE, help="Write a vector picture.")
@click.option("--png", type=_FILE, help="Write a picture, 1200 pixels wide.")
def explain_command(
    out: str, sample: str, run: Path, shard: str | None, top: int, html: Path | None, svg: Path | None, png: Path | None
) -> None:
    """Show one sample of a dataset with a run's predictions: image, tokens, labels, weights, likeliest tokens."""
    from labels.explanation import show
    from train.evals.predict import explain_with_predictions

    show(explain_with_predictions(out_path(out), sample, run, shard=shard, top=top), html=html, svg=svg, png=png)


def main() -> None:
    """Entry point: a UserError becomes a message and exit code 2, never a traceback."""
    try:
        cli()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
