"""`train bench loader | disk | step`: how fast samples come, what each stage costs, which GPUs can be fed.

    loader   batches as fast as they come -> images/s, CPU; run_stages on one thread -> microseconds of each stage
    disk     single samples, the loader's blocks, the same blocks from the page cache -> samples/s and MB/s of each
    step     random batches on the device, then the loader's -> Clock, run_loop -> samples/s, data wait

loader and disk judge device rates: the given ones, else those of usual GPUs for the configured model. N samples,
K label limit.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from labels.native import Decompressor, njit
from labels.settings import Checkpoint, Train
from labels.storage import UserError
from train.costs.flops import model_costs, peak_flops, peak_tflops
from train.data import decode
from train.data.dataset import BetonSet
from train.data.decode import Crops, decompress, shrunk, window_of
from train.data.files import Threads
from train.data.image_index import NO_FILE, OK, TABLE_BYTES, Tables, advise, copy_labels, find_sample, read_sample
from train.data.inputs import ImageInput, synthetic_batches, synthetic_inputs
from train.data.loader import Loader, Slot
from train.data.open import loading_threads, make_loader
from train.data.resize import aligned
from train.distributed import World
from train.loop import Budget, Inputs, TrainState, run_loop
from train.metrics import Metrics, Speed
from train.trainer import make_train_state

_ENDLESS = 1 << 40
_TIMED_SAMPLES = 512
_ROUNDS = 5
_FIRST_SCRATCH_BYTES = 1 << 20
LABELS, READ, DECODE, RESIZE = range(4)  # stages of `run_stages`; the last is the loader's own `load_rows`
_STAGES = ("labels", "read", "decode", "resize")
_DEVICES = ("A100", "H100", "B200")
_UTILISATION = 0.4
_DISK_SAMPLES = 1 << 18
_SINGLES_IN_TASK = 64
_DISK_SCRATCH_BYTES = 1 << 26
_DISK_WAYS = {
    "blocks": "blocks of {} neighbours, as the loader reads",
    "single": "single samples, as shuffle_block=1 would",
    "cached": "the same blocks from the page cache",
}


@dataclass(frozen=True)
class Rate:
    """`samples_per_s` of one device, and whose rate that is."""

    device: str
    samples_per_s: float


@dataclass(frozen=True)
class Verdict:
    """On one rate: its limit or "none", the share of the rate that can be fed (at most 1), and what it would take."""

    device: str
    samples_per_s: float
    limit: str
    share: float
    more: str

    @property
    def line(self) -> str:
        device = f"verdict      {self.device}, {self.samples_per_s:,.0f} samples/s: "
        if self.limit == "none":
            return f"{device}fed ({self.more})"
        return f"{device}{self.limit} would limit it to {self.share:.0%} ({self.more})"


def device_rates(settings: Train, vocabulary: int, requested: Sequence[float]) -> list[Rate]:
    """Rates to judge: the requested ones, else the configured model on usual GPUs at two fifths of their peak."""
    if requested:
        return [Rate("a device", rate) for rate in requested]
    flops = model_costs(settings.model, vocabulary).flops
    name = f"{settings.model.trunk} on {{}} at {_UTILISATION:.0%} MFU"
    return [Rate(name.format(gpu), _UTILISATION * (peak_tflops(gpu) or 0) * 1e12 / flops) for gpu in _DEVICES]


def judge(rates: Sequence[Rate], fed: float, limit: str, unit: str, unit_seconds: float) -> list[Verdict]:
    """A verdict for each rate: `fed` samples/s were measured, limited by `limit`; a sample costs unit x seconds."""
    return [
        Verdict(
            rate.device,
            rate.samples_per_s,
            "none" if fed >= rate.samples_per_s else limit,
            min(1.0, fed / rate.samples_per_s),
            f"it takes {rate.samples_per_s * unit_seconds:,.1f} {unit}",
        )
        for rate in rates
    ]


def bench_loader(
    betons: BetonSet, settings: Train, world: World, seconds: float, rates: list[Rate]
) -> tuple[dict[str, Any], list[str]]:
    """Take batches as fast as they come for some seconds, after a warm-up, then time the stages of a sample.

    Returns all figures, for JSON, and lines to print.
    """
    with make_loader(betons, settings, 0, _ENDLESS, world) as loader:
        images, wall_s, cpu_s = _take_batches(loader, seconds)
    stages = time_stages(betons, settings, loader, min(_TIMED_SAMPLES, settings.batch_size, betons.samples))
    rate, cpu_us, threads = images / wall_s, 1e6 * cpu_s / images, loading_threads(settings.data)
    shares = {name: stages[name] / stages["all"] for name in _STAGES}
    slowest = max(_STAGES, key=lambda name: shares[name])
    verdicts = judge(rates, rate, slowest, "cores", cpu_us / 1e6)
    mode = "device" if loader.crops.device else "host"
    figures = {
        "images_per_s": rate,
        "cpu_us_per_image": cpu_us,
        "threads": threads,
        "resample": mode,
        "images": images,
        "seconds": wall_s,
        "stage_us": {name: stages[name] for name in _STAGES},
        "shares": shares,
        "verdict": [asdict(verdict) for verdict in verdicts],
    }
    taken = f"{mode} resamples; {images:,} in {wall_s:.1f} s"
    stage_costs = ", ".join(f"{name} {shares[name]:.1%} ({stages[name]:,.1f} us)" for name in _STAGES)
    return figures, [
        f"loader       {rate:,.0f} images/s with {threads} threads, {cpu_us:,.0f} us of CPU an image ({taken})",
        f"shares       {stage_costs}, on one thread",
        *(verdict.line for verdict in verdicts),
    ]


def _take_batches(loader: Loader, seconds: float) -> tuple[int, float, float]:
    """Images, wall and CPU seconds, after a warm-up: a third as long, and until memory is reused as in training."""
    begun, images, mark, cpu, seen = time.monotonic(), 0, 0.0, 0.0, set[int]()
    for batch in loader:
        now = time.monotonic()
        if mark:
            images += len(batch.images)
            if now - mark >= seconds:
                break
        elif batch.images.data_ptr() in seen and now - begun >= seconds / 3:
            mark, cpu = now, time.process_time()
        seen.add(batch.images.data_ptr())
    return images, time.monotonic() - mark, time.process_time() - cpu


def time_stages(betons: BetonSet, settings: Train, loader: Loader, count: int) -> dict[str, float]:
    """Microseconds of processor time per sample on one thread, page cache warm: medians of a few rounds.

    `labels` finds a sample and copies its label row; `resize` is the copy into the canvas where the device resamples.
    """
    samples, epochs = loader.order.take(0, count)
    samples = betons.file_samples(samples)
    decoder, scratch = Decompressor(), np.empty(_FIRST_SCRATCH_BYTES, np.uint8)
    slot = Slot(count, settings.model.image_size, betons.label_limit, False, loader.crops.device)
    times: dict[int, list[float]] = {LABELS: [], READ: [], DECODE: [], RESIZE: []}
    betons.fetch(betons.numbers(samples))
    with betons.held(samples):
        if loader.crops.device:
            table = np.empty(TABLE_BYTES, np.uint8)
            slot.fit(*decode.canvas_shape(betons.tables, samples, epochs, betons.label_limit, loader.crops, table))
        all_stages = (betons.tables, samples, epochs, 0, count, loader.crops, betons.vocabulary, decoder.handle)
        while needed := decode.load_rows(*all_stages, scratch, slot.rows):
            scratch = np.empty(needed, np.uint8)
        rest = (loader.crops, betons.vocabulary, decoder.handle, scratch, np.empty(betons.label_limit, np.int32))
        for number in range(_ROUNDS + 1):
            for last, microseconds in times.items():
                begun = time.thread_time()
                if last == RESIZE:
                    decode.load_rows(*all_stages, scratch, slot.rows)
                else:
                    run_stages(betons.tables, samples, epochs, last, *rest)
                if number:  # the first round compiles, and touches memory
                    microseconds.append(1e6 * (time.thread_time() - begun) / count)
    labels, read, decoded, everything = (statistics.median(microseconds) for microseconds in times.values())
    parts = {"labels": labels, "read": read - labels, "decode": decoded - read, "resize": everything - decoded}
    return {name: max(value, 0.0) for name, value in parts.items()} | {"all": everything}


@njit(nogil=True, cache=True)
def run_stages(
    tables: Tables,
    samples: np.ndarray,
    epochs: np.ndarray,
    last: int,
    crops: Crops,
    vocabulary: int,
    handle: int,
    scratch: np.ndarray,
    labels: np.ndarray,
) -> int:
    """Do the stages up to `last` for each sample with the loader's compiled parts; returns bytes of images and rows.

    Other arguments are as in train/data/decode.py; `scratch` has to be large enough, for DECODE with the pixels.
    """
    total, limit = 0, len(labels)
    for row in range(len(samples)):
        span = find_sample(tables, samples[row], limit, scratch)
        if span.status != OK:
            continue
        total += span.bytes + 4 * limit
        labels_at = TABLE_BYTES + span.bytes
        if last >= READ:
            read_sample(span, limit, scratch)
        copy_labels(scratch, labels_at if last >= READ else TABLE_BYTES, vocabulary, labels)
        if last >= DECODE:
            shrink = window_of(span.width, span.height, crops, epochs[row], span.row).shrink
            pixels = scratch[aligned(labels_at + 4 * limit) :]
            columns, lines = shrunk(span.width, shrink), shrunk(span.height, shrink)
            decompress(scratch[TABLE_BYTES:].ctypes.data, span.bytes, columns, lines, handle, pixels, 3 * columns)
    return total


def bench_disk(
    betons: BetonSet, settings: Train, world: World, seconds: float, rates: list[Rate]
) -> tuple[dict[str, Any], list[str]]:
    """Read for some seconds in each of three ways, the first two after the files have left the page cache.

    Returns all figures, for JSON, and lines to print; UserError where the betons are in an object store.
    """
    if betons.staging:
        raise UserError(
            "train bench disk needs the betons on this machine", fix="copy the output folder to a local folder"
        )
    loader = make_loader(betons, settings, 0, 1, world)
    order, threads = loader.order, loading_threads(settings.data)
    count = min(betons.samples, _DISK_SAMPLES)
    blocks = [np.arange(first, first + length) for first, length in order.readahead(0, count, first=True)]
    ends = np.cumsum([len(block) for block in blocks])
    blocks = blocks[: int(np.searchsorted(ends, count)) + 1]  # without those of later epochs
    single = replace(order, block=1, window=1).take(0, count)[0]
    singles = [single[begin : begin + _SINGLES_IN_TASK] for begin in range(0, count, _SINGLES_IN_TASK)]
    figures: dict[str, Any] = {"threads": threads}
    for name, parts in (("single", singles), ("blocks", blocks), ("cached", blocks)):
        if name != "cached":
            _drop_from_page_cache(betons)
        parts = [betons.file_samples(part) for part in parts]
        figures[name] = _read_parts(betons, loader.crops, parts, threads, seconds, readahead=name == "blocks")
    bytes_each = figures["blocks"]["bytes_per_sample"]
    verdicts = judge(rates, figures["blocks"]["samples_per_s"], "disk", "MB/s", bytes_each / 1e6)
    figures["verdict"] = [asdict(verdict) for verdict in verdicts]
    lines = []
    for name, text in _DISK_WAYS.items():
        rate, megabytes = figures[name]["samples_per_s"], figures[name]["bytes_per_s"] / 1e6
        lines.append(f"{name:<12} {rate:,.0f} samples/s, {megabytes:,.0f} MB/s: {text.format(order.block)}")
    lines.append(f"sample       {bytes_each / 1e3:,.1f} kB; caches below the system's own are not emptied")
    return figures, [*lines, *(verdict.line for verdict in verdicts)]


def _drop_from_page_cache(betons: BetonSet) -> None:
    tables = betons.tables
    for file in np.unique(np.concatenate([tables.files, tables.tars, tables.row_files])).tolist():
        if file != NO_FILE:
            os.fdatasync(file)  # only what is on the disk can be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_parts(
    betons: BetonSet, crops: Crops, parts: list[np.ndarray], threads: int, seconds: float, *, readahead: bool
) -> dict[str, float]:
    """Samples and bytes per second, the parts spread over the threads; with `readahead` each is announced before."""
    limit, end = betons.label_limit, time.monotonic() + seconds
    scratches = [np.empty(_DISK_SCRATCH_BYTES, np.uint8) for _ in range(threads)]
    decoder = Decompressor()  # not used, but compiled code cannot be loaded without its library

    def read(samples: np.ndarray) -> tuple[int, int]:
        if time.monotonic() > end:
            return 0, 0
        scratch = scratches.pop()  # one for each thread
        try:
            if readahead:
                advise(betons.tables, samples, limit, scratch[:TABLE_BYTES])
            rest = (crops, betons.vocabulary, decoder.handle, scratch, np.empty(limit, np.int32))
            size = run_stages(betons.tables, samples, samples, READ, *rest)
            return len(samples), size
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


# -- train bench step

_LEAST_WARM_UP_STEPS = 2
_MOST_WAIT = 0.03


def bench_step(betons: BetonSet, settings: Train, world: World, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Train for some seconds on each kind of batches, of which the first half warms up.

    Returns all figures, for JSON, and lines to print.
    """
    settings = without_logs_and_checkpoints(settings)
    device, batch_size = world.device, settings.batch_size
    train_state = make_train_state(settings, torch.from_numpy(betons.idf), world)
    synthetic = synthetic_batches(settings, betons.vocabulary, betons.label_limit, world, _ENDLESS)
    alone, _, _ = loop_rate(synthetic, synthetic_inputs, train_state, settings, world, seconds)
    size, seed = settings.model.image_size, settings.runtime.seed
    with make_loader(betons, settings, 0, _ENDLESS, world) as loader:
        inputs = ImageInput(settings.data, device, image_size=size, seed=seed)
        fed, wait, _ = loop_rate(loader, inputs, train_state, settings, world, seconds)
    speed = Speed(model_costs(settings.model, betons.vocabulary).flops, peak_flops(settings, device))
    limit, mfu = "loader" if wait > _MOST_WAIT else "model", speed.utilisation(alone)
    figures = {
        "synthetic_samples_per_s": alone,
        "loader_samples_per_s": fed,
        "ratio": fed / alone,
        "data_wait": wait,
        "device": str(device),
        "mfu": mfu,
        "limit": limit,
    }
    verdict = "the model; the loader keeps up"
    if limit == "loader":
        hint = "`train bench loader` prints the cost of each stage"
        verdict = f"the loader; {device} could take {alone:,.1f} samples/s; {hint}"
    shared = " (model and loader share the cores)" if device.type == "cpu" else ""
    used = "" if mfu is None else f", MFU {mfu:.1%}"
    return figures, [
        f"synthetic    {alone:,.1f} samples/s on {device}, batches of {batch_size}{used}",
        f"loader       {fed:,.1f} samples/s, {fed / alone:.3f} of that; data wait {wait:.1%}",
        f"verdict      what limits is {verdict}{shared}",
    ]


class LoopRate(NamedTuple):
    """The warmed loop's samples/s and share of time spent waiting for batches; samples of all its steps."""

    samples_per_s: float
    wait: float
    samples: int


def without_logs_and_checkpoints(settings: Train) -> Train:
    quiet = settings.log.model_copy(update={"every_seconds": _ENDLESS})
    return settings.model_copy(update={"log": quiet, "checkpoint": Checkpoint(every_samples=_ENDLESS)})


def loop_rate(
    batches: Iterable[Any], inputs: Inputs, train_state: TrainState, settings: Train, world: World, seconds: float
) -> LoopRate:
    """Run the one loop, metrics included, for `seconds`, of which the first half warms up.

    `settings` are `without_logs_and_checkpoints`.
    """
    clock, budget = Clock(world, seconds), Budget(_ENDLESS, 1, 0)
    with tempfile.TemporaryDirectory() as run:
        speed = Speed(1, None)
        metrics = Metrics(
            Path(run), world, settings, steps=_ENDLESS, first_step=0, skipped=(0, 0), speed=speed, trackers=[]
        )
        rest = (inputs, train_state, settings, budget, world, metrics)
        try:
            run_loop(clock.until(batches), *rest, save=lambda _: None, stopping=lambda: False)
        finally:
            metrics.close()
    spent, batch_size = clock.end - clock.begun, settings.batch_size
    all_samples = (clock.warm_up_steps + clock.steps) * batch_size
    return LoopRate(clock.steps * batch_size / spent, clock.waited / spent, all_samples)


class Clock:
    """Hands batches on for `seconds` and times the second half: `steps`, from `begun` to `end`, `waited` of it.

    The first half warms up, by at least two steps: memory is touched for the first time, the loader fills its ring,
    kernels are chosen.
    """

    def __init__(self, world: World, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._world, self._half, self._now = world, seconds / 2, now
        self.warm_up_steps, self.steps, self.begun, self.end, self.waited = 0, 0, 0.0, 0.0, 0.0

    def until(self, batches: Iterable[Any]) -> Iterator[Any]:
        first, waiting, warm = None, 0.0, False
        for number, batch in enumerate(batches):
            now = self._now()
            first = now if first is None else first
            if warm:
                self.waited += now - waiting
                self.steps += 1
                if now - self.begun >= self._half:
                    break
            elif number >= _LEAST_WARM_UP_STEPS and now - first >= self._half:
                warm, self.warm_up_steps, self.begun = True, number, self._finished()
            yield batch
            waiting = self._now()
        self.end = self._finished()

    def _finished(self) -> float:
        """The time when the device has done all its work."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return self._now()
