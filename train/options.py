"""Options that several commands share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from labels.settings import Pipeline
from labels.storage import UserError, local_out

if TYPE_CHECKING:
    from train.data.open import Chosen

config = click.option(
    "--config", type=click.Path(path_type=Path), help="Configuration file (default: ./pipeline.yaml if it is there)."
)
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key, e.g. train.batch_size=256. Repeatable.",
)
recipe = click.option(
    "--recipe", metavar="NAME", help="Entry of `recipes` in pipeline.yaml, laid over its section `train`."
)


def betons(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is trained on."""
    for option in (
        click.option(
            "--idf",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="IDF table to take (`preprocess idf`), or an OUT that has one.",
        ),
        click.option(
            "--labels",
            multiple=True,
            metavar="OTHER_OUT",
            help="Other labels for the same rows (default: the betons'). With several OUTs: one for each.",
        ),
        click.option(
            "--beton",
            "betons",
            is_flag=False,
            flag_value="",
            multiple=True,
            metavar="[OUT[=SHARE]]",
            help="OUT of build-labels, its manifest, some of its betons, or a glob (no value: paths.out). Repeatable; =0.3: a mixture.",
        ),
    ):
        command = option(command)
    return command


def chosen(
    pipeline: Pipeline, betons: Sequence[str], labels: Sequence[str], idf: Path | None, command: str, or_else: str = ""
) -> "Chosen":
    """What the options of `betons` name.

    Args:
        pipeline: resolved configuration.
        betons, labels, idf: the options' values.
        command: for messages.
        or_else: what the user could say in place of --beton.

    Raises:
        UserError: there is no --beton.
    """
    from train.data.open import Chosen  # torch takes a second: not for --help

    if not betons:
        raise UserError(
            f"`{command}` was given no betons", fix=f"add --beton OUT (--beton alone takes paths.out){or_else}"
        )
    return Chosen([beton or pipeline.paths.out for beton in betons], [local_out(one) for one in labels], idf)
