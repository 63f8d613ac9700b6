"""The commands of the evaluations: parse, call, report. What is imported inside takes a second: not for --help."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import click

from labels.config import load_pipeline
from labels.settings import EVALUATORS, names_in, summary
from labels.storage import UserError
from train import options

_PATH = click.Path(path_type=Path)
_OPTIONS = (
    click.option(
        "--data", metavar="KIND:DIR", help="imagenet:, pets:, cars:, folders:, shards: or parquet:DIR, as downloaded."
    ),
    click.option("--train", "train_dir", type=_PATH, help="Instead of --data: training part, class folders or shards."),
    click.option("--test", "test_dir", type=_PATH, help="Test part, laid out alike."),
    click.option(
        "--encoder",
        "encoders",
        multiple=True,
        required=True,
        metavar="SPEC",
        help="run:RUN, untrained:RUN, timm:NAME, open_clip:NAME, hf:DIR or pixels:SIDE. Repeatable.",
    ),
    click.option(
        "--weights", multiple=True, metavar="FILE", help="Weight file of each timm: and open_clip: encoder in turn."
    ),
    click.option(
        "--layer",
        type=int,
        help="Features of this block: 1 is the first, -1 the last (default: the model's own output).",
    ),
    click.option(
        "--pool",
        metavar="avg|cls|cls+avg",
        help="Pool of the patches, the class token, or both (default: the model's own).",
    ),
    click.option("--out", type=_PATH, help="Result JSON; what was drawn lies beside it as <name>.splits.parquet."),
    click.option("--cache", type=_PATH, help="Folder that keeps features, and what is being trained, between calls."),
    options.config,
    options.overrides,
)


def _options(some: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(some):
            command = option(command)
        return command

    return add


_evaluation = _options(_OPTIONS)


@click.command("probe")
@click.option("--recipe", type=click.Choice(["lbfgs", "mae"]), help="Default: probe.recipe.")
@_evaluation
def probe(recipe: str | None, **arguments: Any) -> None:
    """Fit a linear classifier on the features of frozen encoders; accuracy on the test part."""
    _run("probe", arguments, {"probe.recipe": recipe})


@click.command("zeroshot")
@click.option("--classnames", metavar="imagenet|FILE", help="Names of the classes (default: zeroshot.classnames).")
@click.option(
    "--templates", metavar="openai|FILE", help="Templates with {} for the name (default: zeroshot.templates)."
)
@_evaluation
def zeroshot(classnames: str | None, templates: str | None, **arguments: Any) -> None:
    """Classify by the classes' names alone: by the text tower, or without one by the pre-training head's logits of
    their tokens.
    """
    _run("zeroshot", arguments, {"zeroshot.classnames": classnames, "zeroshot.templates": templates})


@click.command("retrieval")
@click.option(
    "--data", required=True, metavar="KIND:DIR", help="coco:, karpathy:, flickr30k: or pairs:DIR, as downloaded."
)
@_options(_OPTIONS[3:])
def retrieval(**arguments: Any) -> None:
    """Captions by images and images by captions: recall at 1, 5, 10, of encoders with a text tower (`train clip`,
    `train lit`).
    """
    _run("retrieval", arguments, {})


@click.command("finetune")
@_evaluation
def finetune(**arguments: Any) -> None:
    """Train the whole encoder on the labels (MAE's recipe); accuracy of the last epoch. The same command resumes from
    --cache or --out.
    """
    _work_beside(arguments)
    _run("finetune", arguments, {})


@click.command("caption")
@click.option(
    "--data", required=True, metavar="KIND:DIR", help="coco:, karpathy:, flickr30k: or pairs:DIR, as downloaded."
)
@click.option(
    "--part",
    type=click.Choice(["val", "test"]),
    help="Which part is captioned (default: test where there is one, else val).",
)
@click.option(
    "--decoder", metavar="built-in|DIR", help="A folder of a causal language model (default: caption.decoder)."
)
@_options(_OPTIONS[3:])
def caption(decoder: str | None, **arguments: Any) -> None:
    """Caption images: ClipCap's mapper from frozen features to a language model, CIDEr-D of its captions. The same command resumes from
    --cache or --out."""
    _work_beside(arguments)
    _run("caption", arguments, {"caption.decoder": decoder})


@click.command("eval")
@click.option("--suite", type=_PATH, required=True, metavar="FILE", help="YAML: lists of encoders, data and protocols.")
@click.option(
    "--out",
    type=_PATH,
    required=True,
    help="Folder of features, results and the table; the same command goes on there.",
)
@options.config
@options.overrides
def evaluate(suite: Path, out: Path, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Every encoder by every protocol on every data set; one table at the end."""
    from train.evals.measure import on_device
    from train.evals.suite import read_suite, run_suite

    extract = on_device(load_pipeline(config, overrides).features, out / "features")
    with _first_rank_speaks():
        run_suite(read_suite(suite), out, extract, config, overrides)


def _work_beside(arguments: dict[str, Any]) -> None:
    """What is being trained is kept beside the result, where no other place is named."""
    if arguments["cache"] is None and arguments["out"] is not None:
        arguments["cache"] = arguments["out"].with_suffix(".work")


def _run(name: str, arguments: dict[str, Any], flags: dict[str, str | None]) -> None:
    """`flags`: keys that have an option of their own, which wins over --set."""
    from train.encoders.load import pair_weights
    from train.evals.data.captions import load_caption_set
    from train.evals.measure import named_data, on_device, run_protocol
    from train.evals.protocol import load_protocol

    set_by_flags = [f"{key}={value}" for key, value in flags.items() if value is not None]
    pipeline = load_pipeline(arguments["config"], [*arguments["overrides"], *set_by_flags])
    encoders = pair_weights(arguments["encoders"], arguments["weights"], arguments["layer"], arguments["pool"])
    evaluation, cache = load_protocol(name), arguments["cache"]

    def load() -> Any:
        if evaluation.takes == "captions":
            if arguments["data"] is None or arguments.get("train_dir") or arguments.get("test_dir"):
                raise UserError(
                    "the data is not named", allowed="--data coco:DIR, karpathy:DIR, flickr30k:DIR or pairs:DIR"
                )
            return load_caption_set(arguments["data"], cache, arguments.get("part"))
        return named_data(arguments["data"], arguments["train_dir"], arguments["test_dir"], cache)

    with _first_rank_speaks() as first:
        run_protocol(
            evaluation,
            encoders,
            load,
            pipeline,
            on_device(pipeline.features, cache),
            arguments["out"] if first else None,
        )


@contextmanager
def _first_rank_speaks() -> Iterator[bool]:
    """Around a protocol, which torchrun may have started on many ranks: whether this one is the first; the others write
    nothing that the first one writes, and are silent. What was asked to stop leaves with the exit code that says so."""
    from labels.settings import Runtime
    from labels.storage import own_partials
    from train.distributed import distributed_world
    from train.loop import STOPPED_EXIT_CODE, Stopped

    many, first = int(os.environ.get("WORLD_SIZE", 1)) > 1, int(os.environ.get("RANK", 0)) == 0
    aside = nullcontext() if first else own_partials()
    try:
        with (
            distributed_world(Runtime()) if many else nullcontext(),
            aside,
            nullcontext() if first else redirect_stdout(io.StringIO()),
        ):
            yield first
    except Stopped as stopped:
        print(f"{stopped} was stopped; the same command resumes it from --cache or --out")
        sys.exit(STOPPED_EXIT_CODE)


def _plain(name: str) -> click.Command:
    """The command of an evaluator that has no option of its own. It may take classes or captions: that is known when it
    is imported.
    """
    data = "imagenet:, pets:, cars:, folders:, shards: or parquet:DIR, as downloaded; of captions coco:, karpathy:, flickr30k: or pairs:DIR."
    add = _options((click.option("--data", metavar="KIND:DIR", help=data), *_OPTIONS[1:]))
    return click.command(name, help=summary(EVALUATORS, name))(add(lambda **arguments: _run(name, arguments, {})))


def register(group: click.Group) -> None:
    """Add all of them to the command `train`: those above, and one for every other evaluator there is a file of."""
    for command in (probe, zeroshot, retrieval, finetune, caption, evaluate):
        group.add_command(command)
    for name in names_in(EVALUATORS):
        if name not in group.commands:
            group.add_command(_plain(name))
