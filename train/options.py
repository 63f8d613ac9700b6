"""Options that several commands share."""

from pathlib import Path

import click

config = click.option("--config", type=click.Path(path_type=Path), help="Configuration file (default: ./pipeline.yaml if it is there).")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. train.batch_size=256. Repeatable."
)
