"""The command `train`, one command after the other: parse, call, print.

Commands of the evaluators (probe, fewshot, eval, ...) are in train/evals/commands.py. torch takes a second to import:
what needs it is imported inside the commands, not for --help.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import click

from labels import __version__
from labels.config import load_pipeline
from labels.manifest import read_manifest
from labels.settings import Pipeline, parse_size
from labels.show.terminal import run_command
from labels.storage import UserError, local_path, user_path, write_whole
from train import options
from train.evals.commands import register

CLIP_VOCABULARY = 49_408  # classes to plan for without a label dataset
_run_folder = click.option("--out", "run", type=options.PATH, help="Run folder (default: paths.run).")
_weights = click.option("--weights", metavar="FILE", help="Weight file of a timm: or open_clip: encoder.")
_top = click.IntRange(min=1)
_seconds = click.FloatRange(min=0.1)
_rate = click.FloatRange(min=0, min_open=True)


class _Bytes(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size = parse_size(value)
        if not isinstance(size, int) or size <= 0:
            self.fail(f"{value!r} is no size. Allowed: a number with KiB, MiB, GiB or TiB, e.g. 80GiB", param, ctx)
        return size


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Pre-train a vision encoder on betons, and evaluate it."""


register(cli)


def main() -> None:
    """Entry point of the command."""
    run_command(cli)


# -- pre-training


@cli.command("run")
@options.betons
@_run_folder
@click.option(
    "--synthetic",
    is_flag=True,
    help="Random images made once on the device, no checkpoints: the speed of the model alone.",
)
@click.option(
    "--weights", metavar="FILE", help="Label weights: a table of `train weigh`, visual, or idf (train.weights)."
)
@click.option(
    "--init",
    metavar="SPEC",
    help="Begin with the trunk of run:RUN, ema:RUN, or timm:NAME or open_clip:NAME with --init-weights; positions are "
    "resampled.",
)
@click.option("--init-weights", metavar="FILE", help="Weight file of a timm: or open_clip: --init.")
@click.option("--init-head", is_flag=True, help="Take the head of --init too: a run with the same classes.")
@click.option(
    "--branch",
    metavar="RUN@SAMPLES",
    help="Cool down, in --out, from a checkpoint of a run of schedule wsd, with RUN's configuration "
    "(train.optimizer.cooldown_samples; default: a fifth of the whole).",
)
@options.configuration
def run(
    synthetic: bool,
    weights: str | None,
    init: str | None,
    init_weights: str | None,
    init_head: bool,
    branch: str | None,
    **arguments: Any,
) -> None:
    """Pre-train by classification, or resume an interrupted run: the same command again."""
    from train.encoders.encoder import EncoderSpec
    from train.encoders.initial import branched, initialised
    from train.loop import STOPPED_EXIT_CODE
    from train.trainer import synthetic_run, train_run

    if weights:
        arguments["overrides"] += (f"train.weights={json.dumps(weights)}",)
    if init is None and (init_weights or init_head):
        given = "--init-weights" if init_weights else "--init-head"
        raise UserError(f"{given} was given without --init", fix=f"add --init SPEC, or omit {given}")
    for other, given in (("--branch", branch and init), ("--synthetic", synthetic and (init or branch))):
        if given:
            raise UserError(f"{other} was given with {'--init' if init else '--branch'}", fix="omit one of them")
    if branch:
        if arguments["run"] is None:
            raise UserError("--branch was given without --out", fix="add --out NEW, the folder of the branch")
        cooldown = branched(branch, arguments["run"], arguments["config"], arguments["overrides"], arguments["recipe"])
        arguments |= {"config": cooldown.config, "overrides": cooldown.overrides}
        return _pretrain("run", arguments, partial(train_run, method=cooldown.method, branch=cooldown.checkpoint))
    if not synthetic:

        def start(chosen: Any, folder: Path, pipeline: Pipeline) -> bool:
            method = initialised(EncoderSpec(init, init_weights), folder, head=init_head) if init else None
            return train_run(chosen, folder, pipeline, method=method)

        return _pretrain("run", arguments, start, or_else=", or --synthetic")
    pipeline = _pipeline(arguments)
    folder = (arguments["run"] or local_path(pipeline.paths.run)) / "synthetic"
    vocabulary, label_limit, _ = head_size(pipeline, next(iter(arguments["betons"]), None))
    if not synthetic_run(folder, pipeline, vocabulary, label_limit):
        sys.exit(STOPPED_EXIT_CODE)


@cli.command("clip")
@options.betons
@_run_folder
@options.configuration
def clip(**arguments: Any) -> None:
    """Pre-train the same trunk by CLIP's loss, on the same images and their captions' tokens in order; the baseline of
    `train run`.
    """
    from train.clip import train_clip

    _pretrain("clip", arguments, train_clip)


@cli.command("lit")
@click.argument("encoder", metavar="ENCODER")
@_weights
@options.betons
@_run_folder
@options.configuration
def lit(encoder: str, weights: str | None, **arguments: Any) -> None:
    """Train a text tower for a frozen ENCODER (run:RUN, ema:RUN, timm:NAME, ...), for `zeroshot` and `retrieval`."""
    from train.encoders.encoder import EncoderSpec
    from train.evals.lit import train_lit

    _pretrain("lit", arguments, lambda *data_run_pipeline: train_lit(EncoderSpec(encoder, weights), *data_run_pipeline))


def _pretrain(name: str, arguments: dict[str, Any], train: Callable[..., bool], or_else: str = "") -> None:
    pipeline = _pipeline(arguments)
    folder = arguments["run"] or local_path(pipeline.paths.run)
    _exit_if_stopped(train(_chosen(pipeline, arguments, f"train {name}", or_else), folder, pipeline), folder)


def _pipeline(arguments: dict[str, Any]) -> Pipeline:
    return load_pipeline(arguments["config"], arguments["overrides"], arguments["recipe"])


def _chosen(pipeline: Pipeline, arguments: dict[str, Any], command: str, or_else: str = "") -> Any:
    return options.chosen(pipeline, arguments["betons"], arguments["labels"], arguments["idf"], command, or_else)


def _exit_if_stopped(finished: bool, folder: Path | str) -> None:
    from train.loop import STOPPED_EXIT_CODE

    if not finished:
        print(f"stopped and saved; the same command resumes {folder}")
        sys.exit(STOPPED_EXIT_CODE)


# -- visual weights


@cli.command("weigh")
@click.argument("run", type=options.PATH)
@click.option(
    "--on",
    metavar="OTHER_OUT",
    help="Output folder of samples that the run has not seen (default: its held-out samples).",
)
@click.option("--out", type=options.FILE, help="Table to write (default: RUN/visual.parquet).")
@click.option("--samples", type=click.IntRange(min=1), default=100_000, show_default=True, help="Most samples to take.")
def weigh_command(run: Path, on: str | None, out: Path | None, samples: int) -> None:
    """Measure which tokens the run sees in images, and write their weights, for `train run --weights`."""
    from train.evals.weigh import weigh
    from train.loop import stop_signals

    table = out or run / "visual.parquet"
    with stop_signals() as stopping:
        found = weigh(run, table, on=on, samples=samples, stopping=stopping)
    print(f"{table}: {found['samples']:,} samples, {found['tokens']:,} tokens, {found['visible']:,} of them visible")
    for name in ("most", "least"):
        shown = ", ".join(f"{token.removesuffix('</w>')} {gain:.3f}" for token, _, _, gain in found[name])
        print(f"{name} visible of the frequent tokens, in nats: {shown}")


# -- before training: what a run costs, what the machine gives


@cli.command("plan")
@click.option(
    "--beton",
    is_flag=False,
    flag_value="",
    metavar="[OUT]",
    help="Output folder of build-labels, for epochs and classes.",
)
@click.option(
    "--method", type=click.Choice(["run", "clip", "lit"]), default="run", show_default=True, help="The command to plan."
)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of the planned run.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    type=_rate,
    help="Samples/s over all devices. Repeatable (default: 1000, 10000, 100000, or what --measure finds).",
)
@click.option(
    "--measure",
    is_flag=False,
    flag_value=20.0,
    type=_seconds,
    metavar="[SECONDS]",
    help="Train for this time on this machine, to measure the rate and the time outside of steps (no value: 20). "
    "Nothing is kept.",
)
@click.option("--price-per-device-hour", "price", type=click.FloatRange(min=0), help="Price, in any currency.")
@click.option(
    "--device-memory",
    type=_Bytes(),
    help="Memory of each GPU, e.g. 80GiB, to say whether a step fits (default: of this machine's GPU, if it has one). "
    "Precision auto is bf16 then.",
)
@options.configuration
def plan(
    beton: str | None, method: str, devices: int, rates: tuple[float, ...], measure: float | None, **arguments: Any
) -> None:
    """What a run would take: steps, epochs, operations, memory, disk, messages, hours, cost."""
    started = time.perf_counter()
    import torch

    from train.bench.estimate import measure_pace, plan_lines
    from train.clip import check_whole_batches
    from train.costs.memory import device_bytes

    pipeline = _pipeline(arguments)
    settings = pipeline.train
    if measure is not None and (beton is None or method != "run"):
        raise UserError(
            "--measure trains as `train run` does, on betons",
            allowed="--method run with --beton OUT",
            fix="add --beton, or give --rate",
        )
    vocabulary, _, samples = head_size(pipeline, beton)
    device = torch.device("cuda" if torch.cuda.is_available() and settings.runtime.device != "cpu" else "cpu")
    tower = None if method == "run" else pipeline.text_tower
    if tower:
        check_whole_batches(settings, f"train {method}")
    pace = None
    if measure is not None and beton is not None:
        dataset = options.chosen(pipeline, [beton], (), None, "train plan")
        pace = measure_pace(dataset, settings, devices, measure, started)
    lines = plan_lines(
        settings,
        vocabulary=vocabulary,
        dataset_samples=samples,
        devices=devices,
        rates=rates or (() if pace else (1e3, 1e4, 1e5)),
        device=device,
        tower=tower,
        locked=method == "lit",
        pace=pace,
        price=arguments["price"],
        device_memory=arguments["device_memory"] or device_bytes(device),
    )
    print("\n".join(lines))


def head_size(pipeline: Pipeline, beton: str | None) -> tuple[int, int, int | None]:
    """Classes, label limit and samples of a label dataset; without one, CLIP's classes and no samples."""
    if beton is None:
        return CLIP_VOCABULARY, pipeline.labels.context, None
    manifest = read_manifest(local_path(beton or pipeline.paths.out))
    return manifest.tokenizer.vocabulary, manifest.label_limit, manifest.samples


@cli.group("bench")
def bench() -> None:
    """Speed of loader, disk and loop on this machine, and what would limit a faster device."""


_rates = click.option(
    "--rate",
    "rates",
    multiple=True,
    type=_rate,
    help="Samples/s of a device to judge (default: those of the configured model on usual GPUs). Repeatable.",
)
_bench_options = options.stacked(
    options.betons,
    click.option("--seconds", type=_seconds, default=10.0, show_default=True, help="Seconds of each measurement."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    options.configuration,
)


@bench.command("loader")
@_rates
@_bench_options
def bench_loader(**arguments: Any) -> None:
    """The loader alone: images/s, CPU time of an image and its parts."""
    from train.bench.throughput import bench_loader as measure

    _measure(measure, arguments)


@bench.command("disk")
@_rates
@_bench_options
def bench_disk(**arguments: Any) -> None:
    """The disk alone: in the loader's blocks, in single samples, and from the page cache. Removes the dataset's files
    from the page cache.
    """
    from train.bench.throughput import bench_disk as measure

    _measure(measure, arguments)


@bench.command("step")
@_bench_options
def bench_step(**arguments: Any) -> None:
    """The training loop on random batches and on the loader's; nothing is kept."""
    from train.bench.throughput import bench_step as measure

    _measure(measure, arguments)


def _measure(measure: Callable[..., tuple[dict[str, Any], list[str]]], arguments: dict[str, Any]) -> None:
    """Call a benchmark on the dataset of --beton; its log goes to stderr, its result to stdout."""
    from train.bench.throughput import device_rates
    from train.data.open import open_data
    from train.distributed import World, distributed_world

    pipeline = _pipeline(arguments)
    settings, chosen = pipeline.train, _chosen(pipeline, arguments, "train bench")
    with redirect_stdout(sys.stderr), distributed_world(settings.runtime) as world:
        alone = World(0, 1, world.device)
        betons = open_data(chosen, settings.data, alone, lambda: False)
        assert betons is not None  # nothing stops it
        rates = {"rates": device_rates(settings, betons.vocabulary, arguments["rates"])} if "rates" in arguments else {}
        result, lines = measure(betons, settings, alone, arguments["seconds"], **rates)
    print(json.dumps(result, indent=1) if arguments["as_json"] else "\n".join(lines))


# -- after training: predictions, other libraries, language models, reports


@cli.command("predict")
@click.argument("run")
@click.argument("images", nargs=-1, required=True, type=options.PATH)
@click.option("--top", type=_top, default=10, show_default=True, help="Number of tokens for each image.")
def predict(run: str, images: tuple[Path, ...], top: int) -> None:
    """Print the likeliest tokens of images by RUN's newest checkpoint (ema:RUN: by its moving average), as JSON."""
    from train.evals.predict import predict_tokens, read_images

    print(json.dumps(predict_tokens(run, read_images(images), top), indent=1))


@cli.command("explain")
@click.argument("out")
@click.argument("sample", metavar="KEY|UID")
@click.option("--checkpoint", "run", metavar="RUN", required=True, help="A run, ema:RUN, or one checkpoint's folder.")
@click.option("--shard", metavar="NAME", help="The shard to search, if several have the key.")
@click.option("--top", type=_top, default=10, show_default=True, help="Predicted tokens to show.")
@click.option("--visual", type=options.FILE, help="A table of `train weigh` (default: the run's own, if it has one).")
@click.option("--html", type=options.FILE, help="Write a page that opens without a network.")
@click.option("--svg", type=options.FILE, help="Write a vector picture.")
@click.option("--png", type=options.FILE, help="Write a picture, 1200 pixels wide.")
def explain(
    out: str, sample: str, run: str, shard: str | None, top: int, visual: Path | None, **pages: Path | None
) -> None:
    """Show one sample of a dataset with a run's predictions: image, tokens, labels, weights, likeliest tokens."""
    from labels.show.explanation import show
    from train.evals.predict import explain_with_predictions

    show(explain_with_predictions(user_path(out), sample, run, shard=shard, top=top, visual=visual), **pages)


@cli.command("export")
@click.argument("encoder", metavar="ENCODER")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(("timm", "hf", "open_clip", "onnx")),
    required=True,
    help="Library that will load it.",
)
@click.option("--out", type=options.PATH, required=True, help="Folder, new or of an earlier export, which is replaced.")
@_weights
@click.option("--layer", type=int, help="onnx: features of this block (default: the model's own output).")
@click.option("--pool", metavar="avg|cls|cls+avg", help="onnx: pool of the patches, the class token, or both.")
@click.option(
    "--results",
    multiple=True,
    type=options.PATH,
    help="Result JSONs for the card, or folders (default: those in the run). Repeatable.",
)
def export(
    encoder: str, format_name: str, out: Path, results: tuple[Path, ...], weights: str | None, **features: Any
) -> None:
    """Write ENCODER (run:RUN, ema:RUN, timm:NAME, open_clip:NAME, hf:DIR) for another library, check it by loading it
    back, and write its card.
    """
    from train.encoders.encoder import EncoderSpec
    from train.export.export import export_encoder

    export_encoder(EncoderSpec(encoder, weights, **features), format_name, out, results)


@cli.command("llava")
@click.option(
    "--data",
    required=True,
    metavar="FILE|KIND:DIR",
    help="LLaVA's json, or captions: coco:, karpathy:, flickr30k: or pairs:DIR.",
)
@click.option("--images", type=options.PATH, help="Folder with the json's images (default: the json's own).")
@click.option(
    "--encoder",
    required=True,
    metavar="SPEC",
    help="The tower: run:RUN, ema:RUN, timm:NAME, or hf:DIR of `train export --format hf`.",
)
@click.option("--weights", metavar="FILE", help="Weight file of a timm: encoder.")
@click.option(
    "--language-model",
    required=True,
    type=options.PATH,
    metavar="DIR",
    help="Folder of any causal language model in Hugging Face's form.",
)
@click.option(
    "--out", required=True, type=options.PATH, help="Folder of the whole model; next to it <name>.work/, for resuming."
)
@options.config
@options.overrides
def llava(
    data: str,
    images: Path | None,
    encoder: str,
    weights: str | None,
    language_model: Path,
    out: Path,
    config: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Train LLaVA-1.5's projector on a frozen tower and language model; prints lmms-eval's command for the paper's
    benchmarks.
    """
    from train.encoders.encoder import EncoderSpec
    from train.llava.train import train_llava

    pipeline, tower = load_pipeline(config, overrides), EncoderSpec(encoder, weights)
    _exit_if_stopped(train_llava(tower, language_model, data, images, pipeline, out), f"{out.name}.work")


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="RUN...")
@click.option(
    "--results",
    multiple=True,
    type=options.PATH,
    metavar="FILE|DIR",
    help="Result JSONs of probe, fewshot, finetune, caption, eval etc., or a folder of them. Repeatable.",
)
@click.option("--out", "page", type=options.FILE, required=True, metavar="FILE", help="The HTML file to write.")
def report(runs: tuple[Path, ...], results: tuple[Path, ...], page: Path) -> None:
    """Write one HTML file about runs: loss, speed, recipes, results next to the paper's. It opens without a network."""
    from train.evals.measure import read_results
    from train.report.page import damaged_lines, report_page
    from train.report.runs import read_runs

    read = read_runs(runs)
    text = report_page(read, read_results(results))
    write_whole(page, lambda partial: partial.write_text(text, encoding="utf8"))
    for run in read:
        if damaged := damaged_lines(run):
            print(damaged, file=sys.stderr)
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MiB")
