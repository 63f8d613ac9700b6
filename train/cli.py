"""The command `train`: parse, call, report. Everything it does lives in the modules it imports."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from labels import __version__
from labels.config import load_pipeline
from labels.manifest import read_manifest
from labels.settings import Pipeline
from labels.storage import UserError, local_out, out_path, write_whole
from train import options
from train.evals.commands import register

# ---- commands: The commands of `train bench`: parse, call, report. What is imported inside takes a second: not for
# --help.


Bench = Callable[..., tuple[dict[str, Any], list[str]]]


def _bench(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        options.overrides,
        options.config,
        options.recipe,
        click.option("--json", "as_json", is_flag=True, help="For programs."),
        click.option(
            "--seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Of each measurement."
        ),
        options.betons,
    ):
        command = option(command)
    return command


_rates = click.option(
    "--rate",
    "rates",
    multiple=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Samples/s of a device to judge (default: those of the configured model on usual GPUs). Repeatable.",
)


@click.group("bench")
def bench() -> None:
    """What loader, disk and loop give on this machine, and what would limit a faster device."""


@bench.command("loader")
@_rates
@_bench
def loader_command(**arguments: Any) -> None:
    """The loader alone: images/s, CPU time of an image and its parts."""
    from train.bench.loader import bench_loader

    _run(bench_loader, arguments)


@bench.command("disk")
@_rates
@_bench
def disk_command(**arguments: Any) -> None:
    """The disk alone: in the loader's blocks, in single samples, and from the page cache. Empties the page cache of the
    set's files.
    """
    from train.bench.loader import bench_disk

    _run(bench_disk, arguments)


@bench.command("step")
@_bench
def step_command(**arguments: Any) -> None:
    """The training loop on random batches and on the loader's; nothing is kept."""
    from train.bench.step import bench_step

    _run(bench_step, arguments)


def _run(measure: Bench, arguments: dict[str, Any]) -> None:
    from train.bench.loader import device_rates
    from train.data.open import open_data
    from train.distributed import World, distributed_world

    pipeline = load_pipeline(arguments["config"], arguments["overrides"], arguments["recipe"])
    settings = pipeline.train
    chosen = options.chosen(pipeline, arguments["betons"], arguments["labels"], arguments["idf"], "train bench")
    with (
        redirect_stdout(sys.stderr),
        distributed_world(settings.runtime) as world,
    ):  # what is said on the way is no result
        alone = World(0, 1, world.device)
        betons = open_data(chosen, settings.data, alone, lambda: False)
        assert betons is not None  # nobody asks to stop
        rates = {"rates": device_rates(settings, betons.vocabulary, arguments["rates"])} if "rates" in arguments else {}
        found, lines = measure(betons, settings, alone, arguments["seconds"], **rates)
    print(json.dumps(found, indent=1) if arguments["as_json"] else "\n".join(lines))


# ---- command: `train clip`, `train lit`: parse, call, report.


_RUN = click.option("--out", "run", type=click.Path(path_type=Path), help="Folder of the run (default: paths.run).")


def _training(command: Callable[..., None]) -> Callable[..., None]:
    for option in (options.overrides, options.config, options.recipe, _RUN, options.betons):
        command = option(command)
    return command


@click.command("clip")
@_training
def clip(**arguments: Any) -> None:
    """Pre-train the same trunk by CLIP's loss, on the same images and their captions' tokens in order; the baseline of
    `train run`.
    """
    from train.clip import train_clip  # torch takes a second: not for --help

    _run_command("clip", arguments, train_clip)


@click.command("lit")
@click.argument("encoder", metavar="ENCODER")
@click.option("--weights", metavar="FILE", help="Weight file of a timm: or open_clip: encoder.")
@_training
def lit(encoder: str, weights: str | None, **arguments: Any) -> None:
    """Train a text tower for a frozen ENCODER (a run, run:RUN, timm:NAME, ...), so that `zeroshot` and `retrieval` can
    ask it.
    """
    from train.encoders.encoder import EncoderSpec
    from train.evals.lit import train_lit

    _run_command("lit", arguments, lambda *rest: train_lit(EncoderSpec(encoder, weights), *rest))


def _run_command(name: str, arguments: dict[str, Any], train: Callable[..., bool]) -> None:
    from train.loop import STOPPED_EXIT_CODE

    pipeline = load_pipeline(arguments["config"], arguments["overrides"], arguments["recipe"])
    run = arguments["run"] or Path(pipeline.paths.run)
    chosen = options.chosen(pipeline, arguments["betons"], arguments["labels"], arguments["idf"], f"train {name}")
    if not train(chosen, run, pipeline):
        print(f"stopped and saved; the same command resumes {run}")
        sys.exit(STOPPED_EXIT_CODE)


# ---- command: The command `train export`: parse and call.


FORMATS = ("timm", "hf", "open_clip", "onnx")
_PATH = click.Path(path_type=Path)


@click.command("export")
@click.argument("encoder", metavar="ENCODER")
@click.option("--format", "format_name", type=click.Choice(FORMATS), required=True, help="Library that is to load it.")
@click.option("--out", type=_PATH, required=True, help="Folder, new or of an earlier export, which is replaced.")
@click.option("--weights", metavar="FILE", help="Weight file of a timm: or open_clip: encoder.")
@click.option("--layer", type=int, help="onnx: features of this block (default: the model's own output).")
@click.option("--pool", metavar="avg|cls|cls+avg", help="onnx: pool of the patches, the class token, or both.")
@click.option(
    "--results",
    multiple=True,
    type=_PATH,
    help="Result JSONs for the card, or folders (default: those in the run). Repeatable.",
)
def export(
    encoder: str,
    format_name: str,
    out: Path,
    weights: str | None,
    layer: int | None,
    pool: str | None,
    results: tuple[Path, ...],
) -> None:
    """Write ENCODER (run:RUN, timm:NAME, open_clip:NAME, hf:DIR) for another library, check it by loading it back, and
    write its card.
    """
    from train.encoders.encoder import EncoderSpec  # torch takes a second: not for --help
    from train.export.export import export_encoder

    export_encoder(EncoderSpec(encoder, weights, layer, pool), format_name, out, results)


# ---- command: `train llava`: parse, call, report.


@click.command("llava")
@click.option(
    "--data",
    required=True,
    metavar="FILE|KIND:DIR",
    help="LLaVA's json, or captions: coco:, karpathy:, flickr30k: or pairs:DIR.",
)
@click.option("--images", type=_PATH, help="Folder that the json's images lie below (default: the json's own).")
@click.option(
    "--encoder",
    required=True,
    metavar="SPEC",
    help="The tower: run:RUN, timm:NAME, or hf:DIR of `train export --format hf`.",
)
@click.option("--weights", metavar="FILE", help="Weight file of a timm: encoder.")
@click.option(
    "--language-model",
    required=True,
    type=_PATH,
    metavar="DIR",
    help="Folder of any causal language model in Hugging Face's form.",
)
@click.option(
    "--out", required=True, type=_PATH, help="Folder of the whole model; beside it <name>.work/, where it goes on."
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
    from train.encoders.encoder import EncoderSpec  # torch takes a second: not for --help
    from train.llava.train import train_llava
    from train.loop import STOPPED_EXIT_CODE

    if not train_llava(
        EncoderSpec(encoder, weights), language_model, data, images, load_pipeline(config, overrides), out
    ):
        print(f"stopped and saved; the same command resumes {out.name}.work")
        sys.exit(STOPPED_EXIT_CODE)


# ---- command: The command `train report`: parse, call, report.


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=_PATH, metavar="RUN...")
@click.option(
    "--results",
    multiple=True,
    type=_PATH,
    metavar="FILE|DIR",
    help="Result JSONs of probe, fewshot, finetune, caption, eval etc., or a folder of them. Repeatable.",
)
@click.option(
    "--out",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The HTML file to write.",
)
def report(runs: tuple[Path, ...], results: tuple[Path, ...], page: Path) -> None:
    """Write one HTML file about runs: loss, speed, recipes, results next to the paper's. It opens without a network."""
    from train.evals.results import read_results
    from train.report.page import report_page
    from train.report.runs import read_runs

    text = report_page(read_runs(runs), read_results(results))
    write_whole(page, lambda partial: partial.write_text(text, encoding="utf8"))
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MiB")


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
@click.option(
    "--synthetic",
    is_flag=True,
    help="Random images made once on the device, no checkpoints: what the model alone can do.",
)
@options.recipe
@options.config
@options.overrides
def run_command(
    betons: tuple[str, ...],
    labels: tuple[str, ...],
    idf: Path | None,
    run: Path | None,
    synthetic: bool,
    recipe: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
) -> None:
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
@click.option(
    "--beton", is_flag=False, flag_value="", metavar="[OUT]", help="OUT of build-labels, for epochs and classes."
)
@click.option(
    "--method", type=click.Choice(["run", "clip", "lit"]), default="run", show_default=True, help="Of which command."
)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of the planned run.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Samples/s over all devices. Repeatable (default: 1000, 10000, 100000, or what --measure finds).",
)
@click.option(
    "--measure",
    is_flag=False,
    flag_value=20.0,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help="Train so long on this machine, for a rate and for what a run takes beside its steps (no value: 20). Nothing is kept.",
)
@click.option("--price-per-device-hour", "price", type=click.FloatRange(min=0), help="In any currency.")
@options.recipe
@options.config
@options.overrides
def plan_command(
    beton: str | None,
    method: str,
    devices: int,
    rates: tuple[float, ...],
    measure: float | None,
    price: float | None,
    recipe: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """What a run would take: steps, epochs, operations, memory, disk, messages, hours, cost."""
    begun = time.perf_counter()
    import torch

    from train.bench.estimate import measure_pace, plan_lines
    from train.clip import check_whole_batches
    from train.losses.kinds import check_accumulation

    pipeline = load_pipeline(config, overrides, recipe)
    if measure is not None and (beton is None or method != "run"):
        raise UserError(
            "--measure trains as `train run` does, on betons",
            allowed="--method run with --beton OUT",
            fix="add --beton, or give --rate",
        )
    vocabulary, _, samples = head_size(pipeline, beton)
    device = torch.device("cuda" if torch.cuda.is_available() and pipeline.train.runtime.device != "cpu" else "cpu")
    tower = None if method == "run" else pipeline.text_tower
    if tower:
        check_whole_batches(pipeline.train, f"train {method}")
    check_accumulation(pipeline.train)
    pace = None
    if measure is not None and beton is not None:
        pace = measure_pace(
            options.chosen(pipeline, [beton], (), None, "train plan"), pipeline.train, devices, measure, begun
        )
    plan = plan_lines(
        pipeline.train,
        vocabulary=vocabulary,
        dataset_samples=samples,
        devices=devices,
        rates=rates or (() if pace else (1e3, 1e4, 1e5)),
        device=device,
        tower=tower,
        locked=method == "lit",
        pace=pace,
        price=price,
    )
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
    "--checkpoint",
    "run",
    type=click.Path(path_type=Path),
    metavar="RUN",
    required=True,
    help="A run, or one checkpoint's folder.",
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
