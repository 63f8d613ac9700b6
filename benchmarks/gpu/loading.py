"""Phase d: images/s of the loader with 1 to 16 threads, resampling on the host and on the device, and data wait.

    photos-256, photos-original (label datasets of pack.sh) -> Loader alone -> images/s, CPU time of an image
    the loader next to the B/16 step -> data wait -> how many threads and cores feed the GPU

The images are few and repeated, so they are in the page cache: the disk is not measured.
"""

import os
import time
from functools import partial
from typing import Any

import torch
from kit import SMALL_VIT, Kit, Result

from labels.settings import Train
from train.bench.throughput import loop_rate, without_logs_and_checkpoints
from train.data.dataset import BetonSet
from train.data.inputs import ImageInput, synthetic_batches, synthetic_inputs
from train.data.open import make_loader

THREADS = (16, 8, 4, 1)
WAIT_GOAL, CORES_GOAL = 0.01, 8
_ENDLESS = 1 << 40


def run(kit: Kit) -> None:
    torch.set_float32_matmul_precision("high")  # as `train run`
    cores = len(os.sched_getaffinity(0))
    threads = [number for number in THREADS if number <= max(cores, 1)]
    costs = loader_alone(kit, "photos-256", "device", threads, 0.0)
    goal = f"data wait < {WAIT_GOAL:.0%} with at most {CORES_GOAL} threads"
    step = partial(data_wait, kit, costs, threads)
    needed = kit.item("B/16 step with the loader, photos-256", step, goal=goal, seconds=8 if kit.small else 35)
    rate = needed.get("alone", 0.0)
    for name, mode in (("photos-original", "device"), ("photos-256", "host"), ("photos-original", "host")):
        loader_alone(kit, name, mode, threads, rate)


def loader_alone(kit: Kit, name: str, mode: str, threads: list[int], step_rate: float) -> dict[int, float]:
    """One row for each number of threads; returns microseconds of CPU an image. `step_rate`: what a GPU takes."""
    costs = {}
    for number in threads[:1] if kit.small else threads:
        title = f"{name}, {mode} resamples, {number} threads"
        figures = kit.item(title, partial(load, kit, name, mode, number, step_rate), seconds=4)
        if figures:
            costs[number] = figures["cpu_us"]
    return costs


def settings_of(kit: Kit, mode: str, threads: int, *keys: str) -> Train:
    size = ("model.image_size=32", "batch_size=32") if kit.small else ("batch_size=512", "data.prefetch=500MiB")
    keys = (*size, *keys, f"data.resample={mode}", f"data.threads={threads}")
    return without_logs_and_checkpoints(kit.pipeline(*keys).train)


def load(kit: Kit, name: str, mode: str, threads: int, step_rate: float) -> Result:
    """Batches as fast as they come, for some seconds after the ring of buffers was filled once."""
    folder = kit.data / name / "out"
    if not folder.is_dir():
        return Result("no data")
    settings, seconds = settings_of(kit, mode, threads), 0.3 if kit.small else 2.0
    images, begun, cpu, seen = 0, 0.0, 0.0, set[int]()
    with make_loader(BetonSet(folder), settings, 0, _ENDLESS, kit.world) as loader:
        for batch in loader:
            now = time.perf_counter()
            if begun:
                images += len(batch.images)
                if now - begun >= seconds:
                    break
            elif batch.images.data_ptr() in seen:
                begun, cpu = now, time.process_time()
            seen.add(batch.images.data_ptr())
        spent, cpu = time.perf_counter() - begun, time.process_time() - cpu
    rate, cost = images / spent, 1e6 * cpu / images
    text = f"{rate:,.0f} images/s, {cost:,.0f} us of CPU an image"
    if step_rate:
        text += f"; {step_rate * cost / 1e6:.1f} cores for the B/16 step"
    return Result(text, figures={"images_per_s": rate, "cpu_us": cost})


def data_wait(kit: Kit, costs: dict[int, float], threads: list[int]) -> Result:
    """The B/16 step, compiled, on random batches and then on the loader's, with fewer and fewer threads."""
    folder = kit.data / "photos-256" / "out"
    if not folder.is_dir():
        return Result("no data")
    betons = BetonSet(folder)
    model = f"model={SMALL_VIT}" if kit.small else "model={trunk: vit_b16, compile: true}"
    seconds = 0.5 if kit.small else 4.0
    settings = settings_of(kit, "auto", threads[0], model)
    train_state = kit.train_state(settings, betons.vocabulary)
    synthetic = synthetic_batches(settings, betons.vocabulary, betons.label_limit, kit.world, _ENDLESS)
    alone = loop_rate(synthetic, synthetic_inputs, train_state, settings, kit.world, seconds).samples_per_s
    rates: dict[int, float] = {}
    waits: dict[int, float] = {}
    for number in threads:
        settings = settings_of(kit, "auto", number, model)
        with make_loader(betons, settings, 0, _ENDLESS, kit.world) as loader:
            inputs = ImageInput(settings.data, kit.device, image_size=settings.model.image_size, seed=0)
            rate = loop_rate(loader, inputs, train_state, settings, kit.world, seconds)
        rates[number], waits[number] = rate.samples_per_s, rate.wait
    enough = [number for number, wait in waits.items() if wait < WAIT_GOAL]
    each = (f"{number} threads {rates[number]:,.0f} samples/s, wait {wait:.1%}" for number, wait in waits.items())
    text = f"random batches {alone:,.0f} samples/s; {'; '.join(each)}"
    text += f"; fed by {min(enough) if enough else 'more than these'} threads"
    text += f", {alone * min(costs.values()) / 1e6:.1f} cores by the loader's CPU time" if costs else ""
    figures: dict[str, Any] = {"alone": alone, "samples_per_s": rates, "wait": waits}
    return Result(text, bool(enough) and min(enough) <= CORES_GOAL if kit.on_gpu else None, figures)
