"""What several commands of `preprocess` take: OUT, the configuration and single keys of it."""

from pathlib import Path

import click

from labels.layout import out_path


def parse_out(_context: click.Context, _argument: click.Parameter, value: str) -> Path:
    """OUT as a path, or a UPath for a URL."""
    return out_path(value)


def parse_outs(_context: click.Context, _argument: click.Parameter, value: tuple[str, ...]) -> tuple[Path, ...]:
    """Several of them."""
    return tuple(out_path(text) for text in value)


config_option = click.option(
    "--config", type=click.Path(path_type=Path), help="Configuration file (default: ./pipeline.yaml if it is there)."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. labels.idf=paper. Repeatable."
)
