"""`train bench disk`: what the disk gives in the loader's order, in single samples, and from the page cache."""

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np

from labels.native import Decompressor
from labels.settings import Train
from labels.storage import UserError
from train.bench.loader import READ, Rate, as_json, judge, run_stages
from train.data.dataset import BetonSet
from train.data.decode import Crops
from train.data.files import Threads
from train.data.image_index import NO_FILE, TABLE_BYTES, advise
from train.data.open import loading_threads, make_loader
from train.distributed import World

_MOST_SAMPLES = 1 << 18
_SINGLE = 64  # samples a task, where they are drawn one by one
_SCRATCH_BYTES = 1 << 26


def bench_disk(
    betons: BetonSet, settings: Train, world: World, seconds: float, rates: list[Rate]
) -> tuple[dict[str, Any], list[str]]:
    """Read for some seconds in each of three ways, the first two after the files have left the page cache.

    Args:
        betons: the open set, on this machine.
        settings: `train`.
        world: this process.
        seconds: of each way.
        rates: device rates to judge.

    Returns:
        all figures, for JSON, and lines for people.

    Raises:
        UserError: the set lies in an object store.
    """
    if betons.staging:
        raise UserError("train bench disk needs the betons on this machine", fix="copy the OUT to a local folder")
    loader = make_loader(betons, settings, 0, 1, world)
    order, threads = loader.order, loading_threads(settings.data)
    most = min(betons.samples, _MOST_SAMPLES)
    blocks = [np.arange(first, first + count) for first, count in order.ahead(0, most, first=True)]
    blocks = blocks[
        : int(np.searchsorted(np.cumsum([len(block) for block in blocks]), most)) + 1
    ]  # without those of later epochs
    single = replace(order, block=1, window=1).take(0, most)[0]
    singles = [single[at : at + _SINGLE] for at in range(0, most, _SINGLE)]
    found: dict[str, Any] = {"threads": threads}
    for name, parts, cached in (("single", singles, False), ("blocks", blocks, False), ("cached", blocks, True)):
        if not cached:
            _leave_cache(betons)
        found[name] = _read(
            betons, loader.crops, [betons.chosen(part) for part in parts], threads, seconds, ahead=name == "blocks"
        )
    bytes_each = found["blocks"]["bytes_per_sample"]
    verdicts = judge(rates, found["blocks"]["samples_per_s"], "disk", "MB/s", bytes_each / 1e6)
    found["verdict"] = as_json(verdicts)
    told = {
        "blocks": f"blocks of {order.block} neighbours, as the loader reads",
        "single": "single samples, as shuffle_block=1 would",
        "cached": "the same blocks from the page cache",
    }
    lines = [
        f"{name:<12} {found[name]['samples_per_s']:,.0f} samples/s, {found[name]['bytes_per_s'] / 1e6:,.0f} MB/s: {text}"
        for name, text in told.items()
    ]
    lines += [f"sample       {bytes_each / 1e3:,.1f} kB; caches below the system's own are not emptied"]
    return found, [*lines, *(f"verdict      {verdict.line}" for verdict in verdicts)]


def _leave_cache(betons: BetonSet) -> None:
    """Have the system forget the files of the set, what is not yet written first."""
    tables = betons.tables
    for file in np.unique(np.concatenate([tables.files, tables.tars, tables.row_files])).tolist():
        if file != NO_FILE:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _read(
    betons: BetonSet, crops: Crops, parts: list[np.ndarray], threads: int, seconds: float, *, ahead: bool
) -> dict[str, float]:
    """Samples and bytes a second, the parts spread over the threads; with `ahead` each is announced to the system
    before.
    """
    limit, end = betons.label_limit, time.monotonic() + seconds
    scratches = [np.empty(_SCRATCH_BYTES, np.uint8) for _ in range(threads)]
    decoder = Decompressor()  # not used, but compiled code cannot be loaded without its library

    def read(samples: np.ndarray) -> tuple[int, int]:
        if time.monotonic() > end:
            return 0, 0
        scratch = scratches.pop()  # as many as threads
        try:
            if ahead:
                advise(betons.tables, samples, limit, scratch[:TABLE_BYTES])
            labels = np.empty(limit, np.int32)
            return len(samples), run_stages(
                betons.tables, samples, samples, READ, crops, betons.vocabulary, decoder.handle, scratch, labels
            )
        finally:
            scratches.append(scratch)

    begun = time.monotonic()
    with Threads(threads, "disk") as pool:
        samples, total = map(sum, zip(*pool.map(read, parts), strict=True))
    spent = time.monotonic() - begun
    return {
        "samples_per_s": samples / spent,
        "bytes_per_s": total / spent,
        "bytes_per_sample": total / samples,
        "samples": samples,
    }
