"""The command `train report`: parse, call, report."""

from pathlib import Path

import click

from labels.storage import write_whole

_PATH = click.Path(path_type=Path)


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=_PATH, metavar="RUN...")
@click.option(
    "--results", multiple=True, type=_PATH, metavar="FILE|DIR",
    help="Result JSONs of probe, fewshot, finetune, caption, eval etc., or a folder of them. Repeatable.",
)  # fmt: skip
@click.option(
    "--out", "page", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE", help="The HTML file to write."
)
def report(runs: tuple[Path, ...], results: tuple[Path, ...], page: Path) -> None:
    """Write one HTML file about runs: loss, speed, recipes, results next to the paper's. It opens without a network."""
    from train.report.page import report_page
    from train.report.results import read_results
    from train.report.runs import read_runs

    text = report_page(read_runs(runs), read_results(results))
    write_whole(page, lambda partial: partial.write_text(text, encoding="utf8"))
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MiB")
