"""`train bench loader`: what the loader gives and costs by itself, and of which parts that is made."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from labels.native import Decompressor, njit
from labels.settings import Train
from train.costs import model_costs, peak_tflops
from train.data import decode
from train.data.dataset import BetonSet
from train.data.decode import Crops, decompress, shrunk, window_of
from train.data.image_index import OK, TABLE_BYTES, Tables, copy_labels, find, read_sample
from train.data.loader import Loader, Slot
from train.data.open import loading_threads, make_loader
from train.data.resize import aligned
from train.distributed import World

# ---- stages: The loader's work on a sample cut into its stages, with the loader's own compiled parts, to time each by
# itself.
#
# K label limit.


LABELS, READ, DECODE = range(3)
_ROUNDS = 5
_FIRST_SCRATCH_BYTES = 1 << 20


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
    """Do the stages up to `last` for some samples, and forget the results.

    Args:
        tables, crops, vocabulary, handle: as of train/data/decode.py.
        samples, epochs: int64 [N].
        last: LABELS finds each sample and copies a label row; READ reads its bytes too; DECODE decodes them as far as
            its crop needs.
        scratch: uint8, large enough for the largest of the samples, for DECODE its pixels included.
        labels: int32 [K], written.

    Returns:
        bytes of images and label rows that were found.
    """
    total, limit = 0, len(labels)
    for row in range(len(samples)):
        span = find(tables, samples[row], limit, scratch)
        if span.status != OK:
            continue
        total += span.bytes + 4 * limit
        at = TABLE_BYTES + span.bytes
        if last >= READ:
            read_sample(span, limit, scratch)
        copy_labels(scratch, at if last >= READ else TABLE_BYTES, vocabulary, labels)
        if last >= DECODE:
            shrink = window_of(span.width, span.height, crops, epochs[row], span.row).shrink
            pixels = scratch[aligned(at + 4 * limit) :]
            columns, lines = shrunk(span.width, shrink), shrunk(span.height, shrink)
            decompress(scratch[TABLE_BYTES:].ctypes.data, span.bytes, columns, lines, handle, pixels, 3 * columns)
    return total


def time_stages(betons: BetonSet, settings: Train, loader: Loader, count: int) -> dict[str, float]:
    """Microseconds of processor time a sample, on one thread, page cache warm: the medians of a few rounds in turns.

    Args:
        betons: the open set.
        settings: `train`.
        loader: whose crops and order are taken.
        count: N, how many samples.

    Returns:
        `labels` (finding a sample, its index and its labels), `read`, `decode`, `resize` (where the device resamples:
            the copy of the crop
        into its canvas) and `all`.
    """
    samples, epochs = loader.order.take(0, count)
    samples = betons.chosen(samples)
    worker, scratch = Decompressor(), np.empty(_FIRST_SCRATCH_BYTES, np.uint8)
    slot = Slot(count, settings.model.image_size, betons.label_limit, False, loader.crops.device)
    times: dict[int, list[float]] = {LABELS: [], READ: [], DECODE: [], DECODE + 1: []}
    betons.bring(betons.numbers(samples))
    with betons.held(samples):
        if loader.crops.device:
            table = np.empty(TABLE_BYTES, np.uint8)
            slot.fit(*decode.canvas_shape(betons.tables, samples, epochs, betons.label_limit, loader.crops, table))
        whole = (betons.tables, samples, epochs, 0, count, loader.crops, betons.vocabulary, worker.handle)
        while needed := decode.load_rows(*whole, scratch, slot.rows):
            scratch = np.empty(needed, np.uint8)
        rest = (loader.crops, betons.vocabulary, worker.handle, scratch, np.empty(betons.label_limit, np.int32))
        for number in range(_ROUNDS + 1):
            for last, found in times.items():
                begun = time.thread_time()
                if last > DECODE:
                    decode.load_rows(*whole, scratch, slot.rows)
                else:
                    run_stages(betons.tables, samples, epochs, last, *rest)
                if number:  # the first round compiles, and touches memory
                    found.append(1e6 * (time.thread_time() - begun) / count)
    labels, read, decoded, everything = (statistics.median(found) for found in times.values())
    parts = {"labels": labels, "read": read - labels, "decode": decoded - read, "resize": everything - decoded}
    return {name: max(value, 0.0) for name, value in parts.items()} | {"all": everything}


# ---- verdict: Which device rates can be fed, and what would limit the others.


_DEVICES = ("A100", "H100", "B200")
_UTILISATION = 0.4


@dataclass(frozen=True)
class Rate:
    """`samples_per_s` of one device, and whose rate that is."""

    device: str
    samples_per_s: float


@dataclass(frozen=True)
class Verdict:
    """On one rate: what would limit it, or "none"; `share`: of the rate that could be fed, at most 1; `more`: what it
    would take.
    """

    device: str
    samples_per_s: float
    limit: str
    share: float
    more: str

    @property
    def line(self) -> str:
        wanted = f"{self.device}, {self.samples_per_s:,.0f} samples/s: "
        if self.limit == "none":
            return wanted + f"fed ({self.more})"
        return wanted + f"{self.limit} would limit it to {self.share:.0%} ({self.more})"


def device_rates(settings: Train, vocabulary: int, wanted: Sequence[float]) -> list[Rate]:
    """Rates to judge: those that were asked for, else what the configured model takes on usual GPUs, at two fifths of
    their peak.
    """
    if wanted:
        return [Rate("a device", rate) for rate in wanted]
    flops = model_costs(settings.model, vocabulary).flops
    name = settings.model.trunk
    return [
        Rate(f"{name} on {gpu} at {_UTILISATION:.0%} MFU", _UTILISATION * (peak_tflops(gpu) or 0) * 1e12 / flops)
        for gpu in _DEVICES
    ]


def judge(rates: Sequence[Rate], fed: float, what: str, unit: str, of_one_sample: float) -> list[Verdict]:
    """One verdict a rate.

    Args:
        rates: of one device each.
        fed: samples/s that were measured.
        what: what limits them.
        unit: of what one sample costs, e.g. "cores".
        of_one_sample: how much of that a sample takes, in unit x seconds.
    """
    found = []
    for rate in rates:
        limit, more = (
            "none" if fed >= rate.samples_per_s else what,
            f"it takes {rate.samples_per_s * of_one_sample:,.1f} {unit}",
        )
        found.append(Verdict(rate.device, rate.samples_per_s, limit, min(1.0, fed / rate.samples_per_s), more))
    return found


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, str | float]]:
    return [asdict(verdict) for verdict in verdicts]


_STEPS = 1 << 40
_SAMPLES = 512
_PARTS = ("labels", "read", "decode", "resize")


def bench_loader(
    betons: BetonSet, settings: Train, world: World, seconds: float, rates: list[Rate]
) -> tuple[dict[str, Any], list[str]]:
    """Take batches as fast as they come for some seconds, then time the stages of a sample one by one.

    Args:
        betons: the open set.
        settings: `train`.
        world: this process, whose device says who resamples.
        seconds: of taking batches, after a warm-up.
        rates: device rates to judge.

    Returns:
        all figures, for JSON, and lines for people.
    """
    loader = make_loader(betons, settings, 0, _STEPS, world)
    with loader:
        images, wall_s, cpu_s = _take(loader, seconds)
    stages = time_stages(betons, settings, loader, min(_SAMPLES, settings.batch_size, betons.samples))
    rate, cpu_us, threads = images / wall_s, 1e6 * cpu_s / images, loading_threads(settings.data)
    shares = {name: stages[name] / stages["all"] for name in _PARTS}
    slowest = max(_PARTS, key=lambda name: shares[name])
    verdicts = judge(rates, rate, slowest, "cores", cpu_us / 1e6)
    mode = "device" if loader.crops.device else "host"
    found = {
        "images_per_s": rate,
        "cpu_us_per_image": cpu_us,
        "threads": threads,
        "resample": mode,
        "images": images,
        "seconds": wall_s,
        "stage_us": {name: stages[name] for name in _PARTS},
        "shares": shares,
        "verdict": as_json(verdicts),
    }
    told = ", ".join(f"{name} {shares[name]:.1%} ({stages[name]:,.1f} us)" for name in _PARTS)
    lines = [
        f"loader       {rate:,.0f} images/s with {threads} threads, {cpu_us:,.0f} us of CPU an image ({mode} resamples; "
        f"{images:,} in {wall_s:.1f} s)",
        f"shares       {told}, on one thread",
        *(f"verdict      {verdict.line}" for verdict in verdicts),
    ]
    return found, lines


def _take(loader: Loader, seconds: float) -> tuple[int, float, float]:
    """Images taken, wall and processor seconds, after a third as long to warm up, and until memory is used again as in
    training.
    """
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
