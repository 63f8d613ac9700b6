"""`train bench step`: the training loop on random batches that are on the device, and on the loader's; nothing is kept.

synthetic_batches | Loader -> Clock: warms up, times the second half -> run_loop -> LoopRate: samples/s, data wait
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from labels.settings import Checkpoint, Train
from train.costs import model_costs, peak_flops
from train.data.dataset import BetonSet
from train.data.inputs import ImageInput, synthetic_batches, synthetic_inputs
from train.data.open import make_loader
from train.distributed import World
from train.loop import Budget, Inputs, TrainState, run_loop
from train.metrics import Metrics, Speed
from train.trainer import make_train_state

_ENDLESS = 1 << 40
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
