"""The command `preprocess`: parse, call, report. Everything it does lives in the modules it imports."""

import sys
from pathlib import Path

import click

from labels import __version__
from labels.config import load_pipeline
from labels.errors import UserError
from preprocess.build import build_labels
from preprocess.outcome import print_summary
from preprocess.query import run_query
from preprocess.verify import verify_build


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Turn image-text shards into sparse labels, an IDF table and betons."""


_config = click.option("--config", type=click.Path(path_type=Path), help="Configuration file (default: ./pipeline.yaml if it is there).")
_set = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. labels.idf=paper. Repeatable.")


@cli.command("build-labels")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write (default: paths.out).")
@click.option("--workers", type=int, help="Worker processes (default: build.workers; 0 = all cores).")
@click.option("--no-beton", is_flag=True, help="Stop after the IDF table.")
@click.option("--overwrite", is_flag=True, help="Remove what an earlier build with other options left in OUT; nothing else.")
@_config
@_set
def build_labels_command(
    data: tuple[str, ...],
    out: Path | None,
    workers: int | None,
    no_beton: bool,
    overwrite: bool,
    config: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Label every caption of DATA (folders, globs or tars, local or URL) once, count IDF, write betons.

    Run the same command again after any interruption: finished shards are skipped.
    """
    flags = [] if workers is None else [f"build.workers={workers}"]
    settings = load_pipeline(config, [*overrides, *flags])
    target = out or Path(settings.paths.out)
    print_summary(build_labels(list(data), target, settings, betons=not no_beton, overwrite=overwrite), target)


@cli.command("sql")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("query")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
def sql_command(out: Path, query: str, form: str) -> None:
    """Ask OUT's tables (tokens, corpus, shards, labels) with SQL, read-only."""
    run_query(out, query, form)  # type: ignore[arg-type]  # click has checked the choice


@cli.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
def verify_command(out: Path) -> None:
    """Read back everything in OUT and compare it with the manifest; exit code 1 if anything differs."""
    faults = verify_build(out)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{out}: {len(faults)} faults; mend: run the build-labels command of this OUT again")
        sys.exit(1)
    print(f"{out}: whole and unchanged")


def main() -> None:
    """Entry point: a UserError becomes a message and exit code 2, never a traceback."""
    try:
        cli()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
