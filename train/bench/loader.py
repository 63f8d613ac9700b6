"""`train bench loader`: what the loader gives and costs by itself, and of which parts that is made."""

import time
from typing import Any

from labels.settings import Train
from train.bench.stages import time_stages
from train.bench.verdict import Rate, as_json, judge
from train.data.dataset import BetonSet
from train.data.loader import Loader
from train.data.open import loading_threads, make_loader
from train.distributed import World

_STEPS = 1 << 40
_SAMPLES = 512
_PARTS = ("labels", "read", "decode", "resize")


def bench_loader(betons: BetonSet, settings: Train, world: World, seconds: float, rates: list[Rate]) -> tuple[dict[str, Any], list[str]]:
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
        "images_per_s": rate, "cpu_us_per_image": cpu_us, "threads": threads, "resample": mode, "images": images, "seconds": wall_s,
        "stage_us": {name: stages[name] for name in _PARTS}, "shares": shares, "verdict": as_json(verdicts),
    }  # fmt: skip
    told = ", ".join(f"{name} {shares[name]:.1%} ({stages[name]:,.1f} us)" for name in _PARTS)
    lines = [
        f"loader       {rate:,.0f} images/s with {threads} threads, {cpu_us:,.0f} us of CPU an image ({mode} resamples; "
        f"{images:,} in {wall_s:.1f} s)",
        f"shares       {told}, on one thread",
        *(f"verdict      {verdict.line}" for verdict in verdicts),
    ]
    return found, lines


def _take(loader: Loader, seconds: float) -> tuple[int, float, float]:
    """Images taken, wall and processor seconds, after a third as long to warm up, and until memory is used again as in training."""
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
