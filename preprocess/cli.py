"""The command `preprocess`, one command after the other: parse, call, print.

A command imports what it needs itself: `--help` is fast, and `build-labels` starts its worker processes first.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from labels import Formula, TokenizerKind, __version__
from labels.show.terminal import count, run_command, visible
from labels.storage import UserError, is_remote, local_path, user_path, write_whole
from preprocess.engine import start_server

# -- arguments and options of several commands


class LocalPath(click.Path):
    """A file or folder of this machine: see `labels.storage.local_path`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(local_path(value), param, ctx)


_path, _file = LocalPath(path_type=Path), LocalPath(path_type=Path, dir_okay=False)


def parse_out(_context: click.Context, _argument: click.Parameter, value: str) -> Path:
    """An output folder as a path, or a UPath for a URL."""
    return user_path(value)


def parse_outs(_context: click.Context, _argument: click.Parameter, value: tuple[str, ...]) -> tuple[Path, ...]:
    """Several output folders."""
    return tuple(user_path(text) for text in value)


config_option = click.option("--config", type=_path, help="Configuration file (default: ./pipeline.yaml if it exists).")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key, e.g. labels.idf=paper. Repeatable.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Turn image-text shards into sparse labels, an IDF table and betons."""


# -- showing, estimating and checking


def _count(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """`1.28B` as a number."""
    from labels.settings import parse_count

    count = parse_count(int(value) if value and value.isdecimal() else value)
    if count is not None and (not isinstance(count, int) or count < 1):
        raise click.BadParameter(f"{value!r}; allowed: a number of samples, e.g. 12800000, 12.8M or 1.28B")
    return count


@cli.command("explain")
@click.argument("out", callback=parse_out)
@click.argument("sample", metavar="KEY|UID")
@click.option("--shard", metavar="NAME", help="The shard to search, if several have the key.")
@click.option(
    "--checkpoint",
    "run",
    metavar="RUN",
    help="Add a run's predictions: `train explain` does it, with the same arguments.",
)
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Predictions, for --checkpoint.")
@click.option("--visual", type=_path, help="A table of `train weigh`: adds visual gains and the target with them.")
@click.option("--html", type=_file, help="Write a page that opens without a network.")
@click.option("--svg", type=_file, help="Write a vector picture.")
@click.option("--png", type=_file, help="Write a picture, 1200 pixels wide.")
def explain_command(
    out: Path,
    sample: str,
    shard: str | None,
    visual: Path | None,
    run: str | None,
    top: int,
    html: Path | None,
    svg: Path | None,
    png: Path | None,
) -> None:
    """Show one sample from caption to target: image, cleaned caption, tokens, frequencies, IDF, weights."""
    from labels.show.explanation import show, with_visual
    from preprocess.inspect.explain import explain

    if run is not None:
        raise UserError(
            f"preprocess explain loads no model: --checkpoint {run}",
            fix=f"run `train explain {out} {sample} --checkpoint {run} --top {top}` with the other options as they are",
        )
    explanation = explain(out, sample, shard=shard)
    show(with_visual(explanation, out, visual) if visual else explanation, html=html, svg=svg, png=png)


@cli.command("report")
@click.argument("out", callback=parse_out)
@click.option("--out", "page", type=_file, required=True, metavar="FILE", help="The HTML file to write.")
@click.option("--pictures", type=click.IntRange(min=0), default=24, show_default=True, help="Images in the gallery.")
def report_command(out: Path, page: Path, pictures: int) -> None:
    """Write one HTML file about the data of a build; it opens without a network."""
    from preprocess.inspect.report import report_page, summarise

    text = report_page(summarise(out, pictures))
    write_whole(page, lambda partial: partial.write_text(text, encoding="utf8"))
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MiB")


@cli.command("plan")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", help="The output folder, for the free space on its disk (default: paths.out).")
@click.option(
    "--samples",
    callback=_count,
    help="Estimate for this many samples like those of DATA, e.g. 1.28B (default: all of DATA).",
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes of the build (default: build.workers).")
@click.option("--no-beton", is_flag=True, help="Estimate a build that stops after the IDF table.")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Price of this machine, in any currency.")
@click.option("--price-per-gib-month", type=click.FloatRange(min=0), help="Price of storage, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@config_option
@set_option
def plan_command(
    data: tuple[str, ...],
    out: str | None,
    samples: int | None,
    workers: int | None,
    no_beton: bool,
    price_per_hour: float | None,
    price_per_gib_month: float | None,
    as_json: bool,
    config: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Build two or three shards of DATA in a temporary folder, and estimate time, disk, memory and cost of the whole
    build.
    """
    from rich.console import Console

    from labels.config import load_pipeline
    from preprocess.estimate import costs, estimate, print_estimate

    settings = load_pipeline(config, [*overrides, *([f"build.workers={workers}"] if workers else [])])
    target = user_path(settings.paths.out if out is None else out)
    estimated = estimate(list(data), target, settings, samples=samples, betons=not no_beton)
    estimated["costs"] = costs(estimated, price_per_hour, price_per_gib_month)
    if as_json:
        print(json.dumps(estimated, indent=1))
    else:
        print_estimate(estimated, Console(markup=False, emoji=False, highlight=False))


@cli.command("doctor")
@click.option("--out", help="The output folder, whose disk is timed (default: paths.out).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@config_option
def doctor_command(out: str | None, as_json: bool, config: Path | None) -> None:
    """Check this machine: Python, libraries, GPU, disk, memory, limits; exit code 1 if something needed is missing."""
    from rich.console import Console

    from labels.config import load_pipeline
    from preprocess.doctor import examine, print_findings

    settings = load_pipeline(config)
    target = user_path(settings.paths.out if out is None else out)
    findings = examine(Path() if is_remote(target) else target, settings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print_findings(findings, Console(markup=False, emoji=False, highlight=False))
    if any(finding.state == "missing" for finding in findings):
        sys.exit(1)


# -- building: labels, IDF, betons

_decode_check = click.option(
    "--decode-check",
    type=click.Choice(["none", "header", "full"]),
    help="How JPEGs are checked (default: build.decode_check).",
)


def _as_overrides(**flags: object) -> list[str]:
    """The given flags in the form of `--set`."""
    return [f"build.{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]


def _share(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`i/n` as numbers."""
    if value is None:
        return None
    first, slash, second = value.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise click.BadParameter(f"{value!r}; allowed: i/n with 0 <= i < n, e.g. 0/8 to 7/8")
    return int(first), int(second)


@cli.command("build-labels")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", help="Folder to write, or an s3:// URL (default: paths.out).")
@click.option("--workers", type=int, help="Worker processes (default: build.workers; 0 = all cores).")
@click.option("--engine", type=click.Choice(["local", "ray"]), help="Where the work runs (default: build.engine).")
@click.option(
    "--shard",
    "share",
    callback=_share,
    metavar="I/N",
    help="Work of array job I of N on one output folder: every N-th shard from the I-th on.",
)
@click.option(
    "--caption-key", metavar="KEYS", help="Where the captions are, e.g. txt,json:caption (default: build.caption_key)."
)
@click.option(
    "--subset", metavar="FILE|CONDITION", help="Only these samples: .npy or .parquet of uids, or SQL on the metadata."
)
@click.option("--no-beton", is_flag=True, help="Stop after the IDF table.")
@click.option(
    "--no-images",
    is_flag=True,
    help="Write an image index instead of betons: the tars stay the only copy.",
)
@_decode_check
@click.option(
    "--overwrite",
    is_flag=True,
    help="Remove the files of an earlier build with other options from the output folder; nothing else.",
)
@config_option
@set_option
def build_labels_command(
    data: tuple[str, ...],
    out: str | None,
    workers: int | None,
    engine: str | None,
    share: tuple[int, int] | None,
    caption_key: str | None,
    subset: str | None,
    no_beton: bool,
    no_images: bool,
    decode_check: str | None,
    overwrite: bool,
    config: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Label every caption of DATA (folders, globs, tars or tables, local or URL) once, count IDF, write betons.

    Run the same command again after any interruption: finished shards are skipped.
    """
    if engine != "ray" and workers != 1:
        start_server()
    from labels.config import load_pipeline
    from preprocess.build import build_labels, print_summary

    keys = caption_key.split(",") if caption_key else None
    flags = _as_overrides(workers=workers, engine=engine, caption_key=keys, subset=subset, decode_check=decode_check)
    settings = load_pipeline(config, [*overrides, *flags])
    if no_beton and no_images:
        raise UserError(
            "--no-beton and --no-images are both given",
            allowed="one of them",
            fix="omit --no-images (--no-beton makes no image index either), or omit --no-beton",
        )
    if overwrite and share:
        raise UserError(
            "--overwrite with --shard would remove what the other shares write",
            fix="run it once without --shard first",
        )
    target = user_path(settings.paths.out if out is None else out)
    manifest = build_labels(
        list(data), target, settings, betons=not no_beton, overwrite=overwrite, share=share, no_images=no_images
    )
    if manifest:
        print_summary(manifest, target)


@cli.command("append")
@click.argument("out", callback=parse_out)
@click.argument("data", nargs=-1)
@click.option(
    "--prefix", default="", help="Put before the names of the new shards, which must sort after the old ones."
)
@click.option("--undo", is_flag=True, help="Undo an unfinished append, as long as the old manifest is still there.")
@click.option("--workers", type=int, help="Worker processes (default: all cores).")
@click.option("--engine", type=click.Choice(["local", "ray"]), help="Where the work runs (default: local).")
@set_option
def append_command(
    out: Path,
    data: tuple[str, ...],
    prefix: str,
    undo: bool,
    workers: int | None,
    engine: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Add the shards of DATA to a finished output folder, with its options; without DATA, finish an interrupted append.

    Existing label rows and betons do not change; the IDF table is summed again.
    """
    from preprocess.append import append_shards, undo_append
    from preprocess.build import print_summary

    if undo:
        print(f"{out}: {count(undo_append(out), 'shard')} removed")
        return
    if set(prefix) & set("/*?[]\\"):
        raise UserError(f"--prefix {prefix!r} is not part of a file name", allowed="letters, digits, - and _")
    manifest = append_shards(
        out, list(data), [*overrides, *_as_overrides(workers=workers, engine=engine)], prefix=prefix
    )
    print_summary(manifest, out)


@cli.command("train-tokenizer")
@click.argument("data", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(get_args(TokenizerKind)), required=True, help="What to train.")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    default=32_768,
    show_default=True,
    help="Number of tokens; for catlip, --min-count decides.",
)
@click.option(
    "--min-count",
    type=click.IntRange(min=1),
    help="Least count of a word or synset (default: 2; catlip: 500 captions).",
)
@click.option(
    "--wordnet", default="auto", show_default=True, help="For catlip: the folder with index.noun and data.noun."
)
@click.option(
    "--caption-key", metavar="KEYS", help="Where the captions are, e.g. txt,json:caption (default: build.caption_key)."
)
@click.option(
    "--out",
    "target",
    type=_path,
    required=True,
    help="The file to write, for labels.tokenizer.",
)
@config_option
@set_option
def train_tokenizer_command(
    data: tuple[str, ...],
    kind: TokenizerKind,
    vocab_size: int,
    min_count: int | None,
    wordnet: str,
    caption_key: str | None,
    target: Path,
    config: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Train a tokenizer, or choose CatLIP's synsets, on the captions of DATA."""
    from labels.config import load_pipeline
    from preprocess.readers import read_rows
    from preprocess.readers.base import parse_caption_key
    from preprocess.readers.shards import find_shards
    from preprocess.train_tokenizer import train_tokenizer

    settings = load_pipeline(config, overrides)
    choices = parse_caption_key(caption_key.split(",") if caption_key else settings.build.caption_key)
    shards = find_shards(list(data)).shards

    def captions() -> Iterator[list[str]]:
        return (batch.table["caption"].to_pylist() for shard in shards for batch in read_rows(shard, choices))

    size = train_tokenizer(captions, kind, out=target, vocab_size=vocab_size, min_count=min_count, wordnet=wordnet)
    print(f"{target}: {kind}, {count(size, 'token')}; use it with --set labels.tokenizer={target}")


@cli.command("idf")
@click.argument("outs", nargs=-1, required=True, callback=parse_outs)
@click.option("--shards", metavar="GLOB", help="Only shards whose names match, e.g. '0000[0-4]*'.")
@click.option("--formula", type=click.Choice(get_args(Formula)), help="Default: that of the output folder.")
@click.option("--recount", is_flag=True, help="Count the label files again instead of summing the stored counts.")
@click.option("--out", "target", type=_path, required=True, help="The Parquet file to write.")
def idf_command(
    outs: tuple[Path, ...], shards: str | None, formula: Formula | None, recount: bool, target: Path
) -> None:
    """Sum the IDF table of some shards, or of several output folders, from the stored counts of every shard."""
    from preprocess.counts import sum_idf

    print(f"{target}: {sum_idf(list(outs), target, shards=shards, formula=formula, recount=recount)}")


@cli.command("sql")
@click.argument("out", callback=parse_out)
@click.argument("query")
@click.option("--visual", type=_path, help="A table of `train weigh`: `tokens` gets its columns.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
def sql_command(out: Path, query: str, visual: Path | None, form: str) -> None:
    """Query the tables of an output folder (tokens, corpus, shards, labels) with SQL, read-only."""
    from preprocess.inspect.sql import run_query

    run_query(out, query, form, visual)  # type: ignore[arg-type]  # click has checked the choice


@cli.command("verify")
@click.argument("out", callback=parse_out)
def verify_command(out: Path) -> None:
    """Read back a whole output folder and compare it with the manifest; exit code 1 if anything differs."""
    from preprocess.inspect.verify import repair_command, verify_build

    faults = verify_build(out)
    for fault in faults:
        print(visible(fault))
    if faults:
        print(f"{out}: {count(len(faults), 'fault')}; fix: {repair_command(out)}")
        sys.exit(1)
    print(f"{out}: whole and unchanged")


def main() -> None:
    """Entry point of the command."""
    run_command(cli)
