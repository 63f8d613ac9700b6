"""`preprocess plan`: what a build will take, foretold from two or three shards that are really built, in a temporary folder.

DATA -> a rehearsal in a process of its own, once more if code was compiled in it -> seconds and bytes of each part -> all of DATA
"""

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from labels.files import is_remote
from labels.html import format_seconds
from labels.settings import Pipeline
from preprocess.engine import worker_count
from preprocess.forecast import Forecast, forecast
from preprocess.measured import Measured
from preprocess.rehearsal import Rehearsal, rehearse


def estimate(sources: list[str], out: Path, settings: Pipeline, *, samples: int | None, betons: bool) -> Forecast:
    """Measure some shards and foretell the build of all.

    Args:
        sources: what build-labels would get.
        out: where OUT is to be; only its disk is looked at.
        settings: resolved configuration.
        samples: foretell for so many label rows instead of those of `sources`.
        betons: False for a build that stops after the IDF table.

    Raises:
        UserError: no shards, or those that were measured gave no label row.
    """
    workers = worker_count(settings.build.workers)
    measured, seconds = _rehearsed(sources, out, settings, workers, samples, betons)
    if measured.compiled:
        measured, again = _rehearsed(sources, out, settings, workers, samples, betons)
        if not measured.compiled:
            told = format_seconds(max(seconds - again, 0.0))
            print(f"note: code was compiled first, which took {told} and is kept: a build does not do it again", file=sys.stderr)
        seconds = again
    start_s = max(seconds - measured.work_s, 0.0)
    return forecast(measured, settings, out, workers=workers, samples=samples, start_s=start_s)


def _rehearsed(
    sources: list[str], out: Path, settings: Pipeline, workers: int, samples: int | None, betons: bool
) -> tuple[Measured, float]:
    """What a rehearsal measured, and the seconds from the begin of its process to the end."""
    with tempfile.TemporaryDirectory(dir=_scratch(out)) as folder:
        asked = Rehearsal(sources, settings.model_dump_json(), folder, workers, samples, betons)
        begin = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(rehearse, asked).result()
        return measured, time.perf_counter() - begin


def _scratch(out: Path) -> str | None:
    """The folder for what is built and thrown away: on the disk where OUT is to be, if that is there."""
    if is_remote(out):
        return None
    return str(next((folder for folder in (out, *out.resolve().parents) if folder.is_dir()), None))
