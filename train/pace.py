"""`train plan --measure`: how fast this machine trains, from some warmed steps of the run that is planned. Nothing is kept.

OUT -> open_data, make_train_state, make_loader -> the one loop for some seconds -> Pace
"""

import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch

from labels.settings import Train
from train.bench.step import LoopRate, loop_rate, never_ending
from train.checkpoint import snapshot
from train.data.inputs import ImageInput
from train.data.open import Chosen, make_loader, open_data
from train.distributed import World, distributed_world
from train.metrics import peak_memory_gib
from train.trainer import check_batch_divides, make_train_state

_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Pace:
    """What was measured on one device.

    Attributes:
        samples_per_s: of warmed steps on the loader's batches.
        start_s: what the command took beside its steps at that rate: before the first, after the last, and by which the first were slower.
        pause_s: for which a checkpoint holds up training.
        memory_gib: the most in use on the device, or by this process where the device is a CPU.
    """

    samples_per_s: float
    start_s: float
    pause_s: float
    memory_gib: float

    def seconds(self, samples: int, checkpoints: int, devices: int) -> float:
        """Wall clock of a run of so many samples on so many devices like this one."""
        return self.start_s + samples / (self.samples_per_s * devices) + checkpoints * self.pause_s


def measure_pace(chosen: Chosen, settings: Train, devices: int, seconds: float, begun: float) -> Pace:
    """Train for some seconds in this process, on one device.

    Args:
        chosen: what `--beton` names.
        settings: `train`.
        devices: of the planned run, of whose batch one takes its share.
        seconds: how long; the first half warms up.
        begun: time.perf_counter() when the command began.

    Raises:
        UserError: as `train run`, for data that cannot be opened and a batch that cannot be shared out.
    """
    check_batch_divides(settings, devices)
    settings = never_ending(settings.model_copy(update={"batch_size": settings.batch_size // devices}))
    with redirect_stdout(sys.stderr), distributed_world(settings.runtime) as world:
        return _measure(chosen, settings, world, seconds, begun)


def _measure(chosen: Chosen, settings: Train, world: World, seconds: float, begun: float) -> Pace:
    betons = open_data(chosen, settings.data, world, lambda: False)
    assert betons is not None  # nobody asks to stop
    train_state = make_train_state(settings, torch.from_numpy(betons.idf), world)
    with make_loader(betons, settings, 0, _ENDLESS, world) as loader:
        inputs = ImageInput(settings.data, world.device, image_size=settings.model.image_size, seed=settings.runtime.seed)
        found = loop_rate(loader, inputs, train_state, settings, world, seconds)
    start_s = beside_steps(time.perf_counter() - begun, found)
    before = time.perf_counter()
    snapshot(train_state, on_this_rank=True)
    return Pace(found.samples_per_s, start_s, time.perf_counter() - before, peak_memory_gib(world.device))


def beside_steps(seconds: float, found: LoopRate) -> float:
    """Of the seconds of a command, those that its steps do not explain at the rate of the warmed ones."""
    return max(seconds - found.samples / found.samples_per_s, 0.0)
