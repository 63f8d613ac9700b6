"""Options that several commands share, and the datasets that they name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from labels.settings import Pipeline
from labels.storage import UserError, local_path, user_path

if TYPE_CHECKING:
    from train.data.open import Chosen


class LocalPath(click.Path):
    """A file or folder of this machine: see `labels.storage.local_path`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(local_path(value), param, ctx)


PATH, FILE = LocalPath(path_type=Path), LocalPath(path_type=Path, dir_okay=False)

config = click.option("--config", type=PATH, help="Configuration file (default: ./pipeline.yaml if it exists).")
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key, e.g. train.batch_size=256. Repeatable.",
)
recipe = click.option(
    "--recipe", metavar="NAME", help="Entry of `recipes` in pipeline.yaml, merged over its section `train`."
)
_beton = click.option(
    "--beton",
    "betons",
    is_flag=False,
    flag_value="",
    multiple=True,
    metavar="[OUT[=SHARE]]",
    help="Output folder of build-labels, its manifest, some of its betons, or a glob (no value: paths.out). "
    "Repeatable; =0.3: a mixture.",
)
_labels = click.option(
    "--labels",
    multiple=True,
    metavar="OTHER_OUT",
    help="Other labels for the same rows (default: the betons'). With several datasets: one for each.",
)
_idf = click.option(
    "--idf",
    callback=lambda _context, _option, value: value and user_path(value),
    metavar="FILE",
    help="IDF table (`preprocess idf`), or an output folder that has one.",
)


def stacked(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One decorator that adds `options` in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


betons = stacked(_beton, _labels, _idf)
configuration = stacked(recipe, config, overrides)


def chosen(
    pipeline: Pipeline, betons: Sequence[str], labels: Sequence[str], idf: Path | None, command: str, or_else: str = ""
) -> "Chosen":
    """The datasets that the options of `betons` name; `or_else` is the alternative to --beton, for the error."""
    from train.data.open import Chosen  # torch takes a second: not for --help

    if not betons:
        raise UserError(
            f"`{command}` was given no betons", fix=f"add --beton OUT (--beton alone takes paths.out){or_else}"
        )
    return Chosen([beton or pipeline.paths.out for beton in betons], [local_path(name) for name in labels], idf)
