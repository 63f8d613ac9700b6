"""`train bench step`: the loop on random batches that lie on the device, and on the loader's beside it."""

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

_STEPS = _NEVER = 1 << 40
_LEAST_WARM_UP_STEPS = 2
_MOST_WAIT = 0.03


def bench_step(betons: BetonSet, settings: Train, world: World, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Train for some seconds on each kind of batches; nothing is kept.

    Args:
        betons: the open set.
        settings: `train`.
        world: this process.
        seconds: of each; the first half warms up.

    Returns:
        all figures, for JSON, and lines for people.
    """
    settings = never_ending(settings)
    train_state = make_train_state(settings, torch.from_numpy(betons.idf), world)
    made = synthetic_batches(settings, betons.vocabulary, betons.label_limit, world, _STEPS)
    alone, _, _ = loop_rate(made, synthetic_inputs, train_state, settings, world, seconds)
    with make_loader(betons, settings, 0, _STEPS, world) as loader:
        inputs = ImageInput(
            settings.data, world.device, image_size=settings.model.image_size, seed=settings.runtime.seed
        )
        fed, wait, _ = loop_rate(loader, inputs, train_state, settings, world, seconds)
    speed = Speed(model_costs(settings.model, betons.vocabulary).flops, peak_flops(settings, world.device))
    limit = "loader" if wait > _MOST_WAIT else "model"
    found = {
        "synthetic_samples_per_s": alone,
        "loader_samples_per_s": fed,
        "ratio": fed / alone,
        "data_wait": wait,
        "device": str(world.device),
        "mfu": speed.utilisation(alone),
        "limit": limit,
    }
    used = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    verdict = "the model; the loader keeps up"
    if limit == "loader":
        verdict = f"the loader; {world.device} could take {alone:,.1f} samples/s, and `train bench loader` says what costs most"
    if world.device.type == "cpu":
        verdict += " (model and loader share the cores here)"
    lines = [
        f"synthetic    {alone:,.1f} samples/s on {world.device}, batches of {settings.batch_size}{used}",
        f"loader       {fed:,.1f} samples/s, {fed / alone:.3f} of that; data wait {wait:.1%}",
        f"verdict      what limits is {verdict}",
    ]
    return found, lines


class LoopRate(NamedTuple):
    """Of the loop, warmed: samples/s; the share of the time in which it waited for a batch. `samples`: of all its
    steps, the first too.
    """

    samples_per_s: float
    wait: float
    samples: int


def never_ending(settings: Train) -> Train:
    """The same training without log lines and checkpoints."""
    quiet = {
        "log": settings.log.model_copy(update={"every_seconds": _NEVER}),
        "checkpoint": Checkpoint(every_samples=_NEVER),
    }
    return settings.model_copy(update=quiet)


def loop_rate(
    batches: Iterable[Any], inputs: Inputs, train_state: TrainState, settings: Train, world: World, seconds: float
) -> LoopRate:
    """Run the one loop, metrics and all, for `seconds`, of which the first half warms up. `settings`: see
    `never_ending`.
    """
    clock = Clock(world, seconds)
    with tempfile.TemporaryDirectory() as run:
        metrics = Metrics(
            Path(run), world, settings, steps=_STEPS, first_step=0, skipped=(0, 0), speed=Speed(1, None), trackers=[]
        )
        budget = Budget(_STEPS, 1, 0)
        try:
            stopping = lambda: False  # noqa: E731
            run_loop(
                clock.until(batches),
                inputs,
                train_state,
                settings,
                budget,
                world,
                metrics,
                save=lambda _: None,
                stopping=stopping,
            )
        finally:
            metrics.close()
    spent = clock.end - clock.begun
    return LoopRate(
        clock.steps * settings.batch_size / spent,
        clock.waited / spent,
        (clock.warm_up_steps + clock.steps) * settings.batch_size,
    )


class Clock:
    """Hands batches on for `seconds`, and notes how long the second half took and how long it waited for batches.

    The first half warms up, by two steps at least: memory is touched for the first time, the loader fills its ring,
        kernels are chosen.

    Attributes:
        warm_up_steps: of the first half.
        steps: of the second, which lasted from `begun` to `end`; `waited`: seconds of it.
    """

    def __init__(self, world: World, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._world, self._half, self._clock = world, seconds / 2, now
        self.warm_up_steps, self.steps, self.begun, self.end, self.waited = 0, 0, 0.0, 0.0, 0.0

    def until(self, batches: Iterable[Any]) -> Iterator[Any]:
        first, waiting, warm = None, 0.0, False
        for number, batch in enumerate(batches):
            now = self._clock()
            first = now if first is None else first
            if warm:
                self.waited += now - waiting
                self.steps += 1
                if now - self.begun >= self._half:
                    break
            elif number >= _LEAST_WARM_UP_STEPS and now - first >= self._half:
                warm, self.warm_up_steps, self.begun = True, number, self._finished()
            yield batch
            waiting = self._clock()
        self.end = self._finished()

    def _finished(self) -> float:
        """The time when the device has done all that it was given."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return self._clock()
