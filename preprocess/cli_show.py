"""The commands of `preprocess` that show, estimate and check: explain, report, plan, doctor."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from labels.errors import UserError
from labels.layout import out_path
from labels.storage import write_whole
from preprocess.cli_options import config_option, parse_out, set_option

# What is large is imported by the command that needs it: `build-labels` loads this file too.

_file = click.Path(path_type=Path, dir_okay=False)


def _count(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """`1.28B` as a number."""
    from labels.settings import parse_count

    count = parse_count(int(value) if value and value.isdecimal() else value)
    if count is not None and (not isinstance(count, int) or count < 1):
        raise click.BadParameter(f"{value!r}; allowed: a number of samples, e.g. 12800000, 12.8M or 1.28B")
    return count


@click.command("explain")
@click.argument("out", callback=parse_out)
@click.argument("sample", metavar="KEY|UID")
@click.option("--shard", metavar="NAME", help="The shard to search, if several have the key.")
@click.option("--checkpoint", "run", metavar="RUN", help="Add a run's predictions: `train explain` does it, with the same arguments.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Predictions, for --checkpoint.")
@click.option("--html", type=_file, help="Write a page that opens without a network.")
@click.option("--svg", type=_file, help="Write a vector picture.")
@click.option("--png", type=_file, help="Write a picture, 1200 pixels wide.")
def explain_command(
    out: Path, sample: str, shard: str | None, run: str | None, top: int, html: Path | None, svg: Path | None, png: Path | None
) -> None:
    """Show one sample from caption to target: image, cleaned caption, tokens, frequencies, IDF, weights."""
    from labels.explanation import show
    from preprocess.inspect.explain import explain

    if run is not None:
        raise UserError(
            f"preprocess explain loads no model: --checkpoint {run}",
            mend=f"run `train explain {out} {sample} --checkpoint {run} --top {top}` with the other options as they are",
        )
    show(explain(out, sample, shard=shard), html=html, svg=svg, png=png)


@click.command("report")
@click.argument("out", callback=parse_out)
@click.option("--out", "page", type=_file, required=True, metavar="FILE", help="The HTML file to write.")
@click.option("--pictures", type=click.IntRange(min=0), default=24, show_default=True, help="Images in the gallery.")
def report_command(out: Path, page: Path, pictures: int) -> None:
    """Write one HTML file about the data of a build; it opens without a network."""
    from preprocess.inspect.report import report_page, summarise

    text = report_page(summarise(out, pictures))
    write_whole(page, lambda partial: partial.write_text(text, encoding="utf8"))
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MiB")


@click.command("plan")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", help="The output folder, for the free space on its disk (default: paths.out).")
@click.option("--samples", callback=_count, help="Estimate for this many samples like those of DATA, e.g. 1.28B (default: all of DATA).")
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes of the build (default: build.workers).")
@click.option("--no-beton", is_flag=True, help="A build that stops after the IDF table.")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of this machine.")
@click.option("--price-per-gib-month", type=click.FloatRange(min=0), help="Of storage.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@config_option
@set_option
def plan_command(
    data: tuple[str, ...], out: str | None, samples: int | None, workers: int | None, no_beton: bool, price_per_hour: float | None,
    price_per_gib_month: float | None, as_json: bool, config: Path | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Build two or three shards of DATA in a temporary folder, and estimate time, disk, memory and cost of the whole build."""
    from rich.console import Console

    from labels.config import load_pipeline
    from preprocess.estimate import estimate, print_estimate

    settings = load_pipeline(config, [*overrides, *([f"build.workers={workers}"] if workers else [])])
    target = out_path(out or settings.paths.out)
    found = estimate(list(data), target, settings, samples=samples, betons=not no_beton)
    described = found.describe(price_per_hour, price_per_gib_month)
    if as_json:
        print(json.dumps(described, indent=1))
    else:
        print_estimate(described, Console(markup=False, emoji=False, highlight=False))


@click.command("doctor")
@click.option("--out", help="The output folder, whose disk is timed (default: paths.out).")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@config_option
def doctor_command(out: str | None, as_json: bool, config: Path | None) -> None:
    """Check this machine: Python, libraries, GPU, disk, memory, limits; exit code 1 if something needed is missing."""
    from rich.console import Console

    from labels.config import load_pipeline
    from preprocess.doctor import examine, print_findings

    settings = load_pipeline(config)
    findings = examine(Path(out or settings.paths.out), settings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print_findings(findings, Console(markup=False, emoji=False, highlight=False))
    if any(finding.state == "missing" for finding in findings):
        sys.exit(1)


SHOW_COMMANDS = (explain_command, report_command, plan_command, doctor_command)
