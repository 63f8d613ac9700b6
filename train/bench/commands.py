"""The commands of `train bench`: parse, call, report. What is imported inside takes a second: not for --help."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import click

from labels.config import load_pipeline
from train import options

Bench = Callable[..., tuple[dict[str, Any], list[str]]]


def _bench(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        options.overrides,
        options.config,
        options.recipe,
        click.option("--json", "as_json", is_flag=True, help="For programs."),
        click.option("--seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Of each measurement."),
        options.betons,
    ):
        command = option(command)
    return command


_rates = click.option(
    "--rate", "rates", multiple=True, type=click.FloatRange(min=0, min_open=True),
    help="Samples/s of a device to judge (default: those of the configured model on usual GPUs). Repeatable.",
)  # fmt: skip


@click.group("bench")
def bench() -> None:
    """What loader, disk and loop give on this machine, and what would limit a faster device."""


@bench.command("loader")
@_rates
@_bench
def loader_command(**arguments: Any) -> None:
    """The loader alone: images/s, CPU time of an image and its parts."""
    from train.bench.loader import bench_loader

    _run(bench_loader, arguments)


@bench.command("disk")
@_rates
@_bench
def disk_command(**arguments: Any) -> None:
    """The disk alone: in the loader's blocks, in single samples, and from the page cache. Empties the page cache of the set's files."""
    from train.bench.disk import bench_disk

    _run(bench_disk, arguments)


@bench.command("step")
@_bench
def step_command(**arguments: Any) -> None:
    """The training loop on random batches and on the loader's; nothing is kept."""
    from train.bench.step import bench_step

    _run(bench_step, arguments)


def _run(measure: Bench, arguments: dict[str, Any]) -> None:
    from train.bench.verdict import device_rates
    from train.data.open import open_data
    from train.distributed import World, distributed_world

    pipeline = load_pipeline(arguments["config"], arguments["overrides"], arguments["recipe"])
    settings = pipeline.train
    chosen = options.chosen(pipeline, arguments["betons"], arguments["labels"], arguments["idf"], "train bench")
    with redirect_stdout(sys.stderr), distributed_world(settings.runtime) as world:  # what is said on the way is no result
        alone = World(0, 1, world.device)
        betons = open_data(chosen, settings.data, alone, lambda: False)
        assert betons is not None  # nobody asks to stop
        rates = {"rates": device_rates(settings, betons.vocabulary, arguments["rates"])} if "rates" in arguments else {}
        found, lines = measure(betons, settings, alone, arguments["seconds"], **rates)
    print(json.dumps(found, indent=1) if arguments["as_json"] else "\n".join(lines))
