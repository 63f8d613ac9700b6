"""The commands of the evaluations: parse, call measure.py or suite.py, print. Modules that import torch are imported
inside, so that --help stays fast.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from labels.config import load_pipeline
from labels.settings import EVALUATORS, names_in, summary
from labels.storage import UserError
from train import options

_CLASSES = "imagenet:, pets:, cars:, folders:, shards: or parquet:DIR, as downloaded"
_CAPTIONS = "coco:, karpathy:, flickr30k: or pairs:DIR"
_CAPTIONED = f"{_CAPTIONS}, as downloaded"
_COMMON = (
    click.option(
        "--encoder",
        "encoders",
        multiple=True,
        required=True,
        metavar="SPEC",
        help="run:RUN, ema:RUN (its weights' moving average), untrained:RUN, timm:NAME, open_clip:NAME, hf:DIR or "
        "pixels:SIDE. Repeatable.",
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
    click.option("--out", type=options.PATH, help="Result JSON; what was drawn is written to <name>.splits.parquet."),
    click.option(
        "--cache", type=options.PATH, help="Folder that keeps features, and checkpoints of models that are trained."
    ),
    options.config,
    options.overrides,
)


def _data(help: str, *, required: bool = False) -> Callable[..., Any]:
    return click.option("--data", metavar="KIND:DIR", required=required, help=f"{help}.")


def _parts(help: str) -> tuple[Callable[..., Any], ...]:
    train = "Instead of --data: training part, class folders or shards."
    return (
        _data(help),
        click.option("--train", "train_dir", type=options.PATH, help=train),
        click.option("--test", "test_dir", type=options.PATH, help="Test part, in the same layout."),
        click.option(
            "--class-key",
            metavar="NAME",
            help="Shards: the key of each sample's json that is the class (default: its .cls, or `class`).",
        ),
    )


def _options(added: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(added):
            command = option(command)
        return command

    return add


_of_classes = _options((*_parts(_CLASSES), *_COMMON))


@click.command("probe")
@click.option("--recipe", type=click.Choice(["lbfgs", "mae"]), help="Default: probe.recipe.")
@_of_classes
def probe(recipe: str | None, **arguments: Any) -> None:
    """Fit a linear classifier on the features of frozen encoders; accuracy on the test part."""
    _run("probe", arguments, {"probe.recipe": recipe})


@click.command("zeroshot")
@click.option("--classnames", metavar="imagenet|FILE", help="Names of the classes (default: zeroshot.classnames).")
@click.option(
    "--templates", metavar="openai|FILE", help="Templates with {} for the name (default: zeroshot.templates)."
)
@_of_classes
def zeroshot(classnames: str | None, templates: str | None, **arguments: Any) -> None:
    """Classify by the classes' names alone: by the text tower, or without one by the pre-training head's logits of
    their tokens.
    """
    _run("zeroshot", arguments, {"zeroshot.classnames": classnames, "zeroshot.templates": templates})


@click.command("retrieval")
@_data(_CAPTIONED, required=True)
@_options(_COMMON)
def retrieval(**arguments: Any) -> None:
    """Captions by images and images by captions: recall at 1, 5, 10, of encoders with a text tower (`train clip`,
    `train lit`).
    """
    _run("retrieval", arguments, {})


@click.command("finetune")
@_of_classes
def finetune(**arguments: Any) -> None:
    """Train the whole encoder on the labels (MAE's recipe); accuracy of the last epoch. The same command resumes from
    --cache or --out.
    """
    _run("finetune", _with_work_folder(arguments), {})


@click.command("caption")
@_data(_CAPTIONED, required=True)
@click.option(
    "--part",
    type=click.Choice(["val", "test"]),
    help="Which part is captioned (default: test where there is one, else val).",
)
@click.option(
    "--decoder", metavar="built-in|DIR", help="A folder of a causal language model (default: caption.decoder)."
)
@_options(_COMMON)
def caption(decoder: str | None, **arguments: Any) -> None:
    """Caption images: ClipCap's mapper from frozen features to a language model, CIDEr-D of its captions. The same
    command resumes from --cache or --out.
    """
    _run("caption", _with_work_folder(arguments), {"caption.decoder": decoder})


@click.command("eval")
@click.option(
    "--suite", type=options.PATH, required=True, metavar="FILE", help="YAML: lists of encoders, data and protocols."
)
@click.option(
    "--out",
    type=options.PATH,
    required=True,
    help="Folder of features, results and the table; the same command resumes there.",
)
@options.config
@options.overrides
def evaluate(suite: Path, out: Path, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Every encoder by every protocol on every data set; one table at the end."""
    from train.evals.measure import on_device
    from train.evals.suite import read_suite, run_suite

    extract = on_device(load_pipeline(config, overrides).features, out / "features")
    with _only_first_rank_writes():
        run_suite(read_suite(suite), out, extract, config, overrides)


def register(group: click.Group) -> None:
    """Add the commands above to `train`, and one for every other evaluator file in train/evals/kinds."""
    for command in (probe, zeroshot, retrieval, finetune, caption, evaluate):
        group.add_command(command)
    for name in names_in(EVALUATORS):
        if name not in group.commands:
            group.add_command(_plain(name))


def _plain(name: str) -> click.Command:
    """The command of an evaluator without options of its own. Only its import would say whether it takes captions."""
    add = _options((*_parts(f"{_CLASSES}; of captions {_CAPTIONS}"), *_COMMON))
    return click.command(name, help=summary(EVALUATORS, name))(add(lambda **arguments: _run(name, arguments, {})))


def _with_work_folder(arguments: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints go next to the result, unless --cache is given."""
    if arguments["cache"] is None and arguments["out"] is not None:
        arguments["cache"] = arguments["out"].with_suffix(".work")
    return arguments


def _run(name: str, arguments: dict[str, Any], flags: dict[str, str | None]) -> None:
    """`flags`: keys that have an option of their own, which overrides --set."""
    from train.encoders.load import pair_weights
    from train.evals.data.captions import load_caption_set
    from train.evals.measure import named_data, on_device, run_protocol
    from train.evals.protocol import load_protocol

    set_by_flags = [f"{key}={value}" for key, value in flags.items() if value is not None]
    pipeline = load_pipeline(arguments["config"], [*arguments["overrides"], *set_by_flags])
    encoders = pair_weights(arguments["encoders"], arguments["weights"], arguments["layer"], arguments["pool"])
    evaluation, cache = load_protocol(name), arguments["cache"]
    data, train_dir, test_dir, class_key = (
        arguments.get(key) for key in ("data", "train_dir", "test_dir", "class_key")
    )

    def load() -> Any:
        if evaluation.takes != "captions":
            return named_data(data, train_dir, test_dir, cache, class_key)
        if data is None or train_dir or test_dir or class_key:
            allowed = "--data coco:DIR, karpathy:DIR, flickr30k:DIR or pairs:DIR"
            raise UserError("the data is not named", allowed=allowed)
        return load_caption_set(data, cache, arguments.get("part"))

    extract = on_device(pipeline.features, cache)
    with _only_first_rank_writes() as first:
        run_protocol(evaluation, encoders, load, pipeline, extract, arguments["out"] if first else None)


@contextmanager
def _only_first_rank_writes() -> Iterator[bool]:
    """Around a protocol, which torchrun may start on many ranks; gives whether this rank is the first. The others
    print nothing and write only partial files of their own. A stop ends the process with its own exit code.
    """
    from labels.settings import Runtime
    from labels.storage import own_partials
    from train.distributed import distributed_world, launched
    from train.loop import STOPPED_EXIT_CODE, Stopped

    rank, size, _ = launched()
    first = rank == 0
    try:
        with ExitStack() as stack:
            if size > 1:
                stack.enter_context(distributed_world(Runtime()))
            if not first:
                stack.enter_context(own_partials())
                stack.enter_context(redirect_stdout(io.StringIO()))
            yield first
    except Stopped as stopped:
        print(f"{stopped} was stopped; the same command resumes it from --cache or --out")
        sys.exit(STOPPED_EXIT_CODE)
