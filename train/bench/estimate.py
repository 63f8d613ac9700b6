"""`train plan`: what a run would take, before anything is started."""

from typing import TYPE_CHECKING

import torch

from labels.html import format_seconds
from labels.settings import TextTower, Train
from train.costs import Costs, activation_bytes, messages, model_costs, peak_flops, tower_costs, trunk_costs
from train.model import build_trunk
from train.optim import autocast_dtype
from train.text_tower import build_text_tower

if TYPE_CHECKING:
    pass  # which loads all that trains
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass

from train.bench.step import LoopRate, loop_rate, never_ending
from train.checkpoint import snapshot
from train.data.inputs import ImageInput
from train.data.open import Chosen, make_loader, open_data
from train.distributed import World, distributed_world
from train.metrics import peak_memory_gib
from train.trainer import check_batch_divides, make_train_state

_GIB = 2**30


def plan_lines(
    settings: Train,
    *,
    vocabulary: int,
    dataset_samples: int | None,
    devices: int,
    rates: tuple[float, ...],
    device: torch.device,
    tower: TextTower | None = None,
    locked: bool = False,
    pace: "Pace | None" = None,
    price: float | None = None,
) -> list[str]:
    """Steps, epochs, parameters, operations, memory, disk, messages, hours, cost and what is assumed, each a line.

    Args:
        settings: `train`.
        vocabulary: V, the head's width.
        dataset_samples: in one epoch; None where no OUT was given.
        devices: ranks of the planned run.
        rates: samples/s over all devices, to tell the time for.
        device: of this machine, whose precision is taken where it is `auto`.
        tower: of `train clip` and `train lit`. locked: of `train lit`, whose encoder is taken to be like `train.model`.
        pace: what was measured on this machine, if anything was.
        price: of a device for an hour, in any currency.
    """
    steps = settings.samples // settings.batch_size
    samples = steps * settings.batch_size
    costs = _costs(settings, vocabulary, tower, locked)
    part = settings.batch_size // devices // settings.runtime.accumulation
    averaged = settings.optimizer.ema_decay is not None
    fixed = costs.parameters * (20 if averaged else 16) / (devices if settings.runtime.parallel == "fsdp" else 1)
    fixed += 4 * costs.trunk if costs.frozen else 0
    activations = part * activation_bytes(settings, device, tower, frozen=locked)
    checkpoint = costs.parameters * (16 if averaged else 12) + (4 * costs.trunk if costs.frozen else 0)
    precision = str(autocast_dtype(settings.runtime.precision, device) or "fp32").removeprefix("torch.")
    kept, count = _checkpoints(settings, samples)
    lines = [
        f"steps        {steps:,} of {settings.batch_size:,} samples = {samples:,}, {settings.optimizer.warmup_samples:,} of them warm-up",
        "epochs       "
        + (
            f"{samples / dataset_samples:.2f} of {dataset_samples:,}"
            if dataset_samples
            else "not known: give --beton OUT"
        ),
        f"parameters   trunk {costs.trunk / 1e6:.1f}M{' frozen' if locked else ''} + {costs.head_name} {costs.head / 1e6:.1f}M "
        f"({vocabulary:,} {'tokens' if tower else 'classes'})",
        f"operations   {costs.flops / 1e9:.1f} GFLOP a sample, {costs.flops * samples:.3g} FLOP in all",
        f"memory       about {(fixed + activations) / _GIB:.1f} GiB on each of {devices}: {fixed / _GIB:.1f} for weights, gradients and "
        f"moments{' and average' if averaged else ''}, {activations / _GIB:.1f} for the activations of {part} samples at a time "
        f"({precision}); the loss comes on top",
        f"disk         {kept * checkpoint / _GIB:.1f} GiB: {kept} of {count} checkpoints of {checkpoint / _GIB:.2f} GiB stay",
    ]
    if devices > 1:
        lines.append(f"messages     {messages(costs, settings, devices, device)}")
    if pace:
        lines.append(
            f"measured     {pace.samples_per_s:,.0f} samples/s on one {device.type} in batches of {settings.batch_size // devices}; "
            f"start and end {pace.start_s:.1f} s, a checkpoint {pace.pause_s:.2f} s, memory {pace.memory_gib:.1f} GiB"
        )
    times = [(pace.seconds(samples, count, devices), pace.samples_per_s * devices, " as measured")] if pace else []
    peak = peak_flops(settings, device)
    for seconds, rate, how in [*times, *((samples / rate, rate, "") for rate in rates)]:
        used = f", {costs.flops * rate / devices / peak:.0%} of a device's {peak / 1e12:,.0f} TFLOP/s" if peak else ""
        hours = seconds * devices / 3600
        paid = f", cost {hours * price:,.2f}" if price is not None else ""
        lines.append(
            f"time         {format_seconds(seconds)} at {rate:,.0f} samples/s{how}{used}: {hours:,.2f} device-hours{paid}"
        )
    return lines + [f"assumed      {line}" for line in _assumptions(pace, devices, bool(rates))]


def _assumptions(pace: "Pace | None", devices: int, given: bool) -> list[str]:
    told = ["nothing else runs on the machine, and nothing has to be done twice"]
    if pace:
        told.append(
            "the loader keeps the speed of the first blocks of the data, which may lie in memory; checkpoints are written beside"
        )
    if pace and devices > 1:
        told.append(f"{devices} devices like this one, each as fast; what they send each other takes no time")
    if given:
        told.append("a rate that was given holds from the first step to the last; start and checkpoints are not in it")
    return told


def _costs(settings: Train, vocabulary: int, tower: TextTower | None, locked: bool) -> Costs:
    if tower is None:
        return model_costs(settings.model, vocabulary)
    with torch.device("meta"):
        trunk = trunk_costs(build_trunk(settings.model), settings.model.image_size)
        return tower_costs(trunk, build_text_tower(tower, vocabulary), tower, locked=locked)


def _checkpoints(settings: Train, samples: int) -> tuple[int, int]:
    """How many checkpoints stay, and how many are written (without those of the clock)."""
    every = max(1, settings.checkpoint.every_samples // settings.batch_size) * settings.batch_size
    count = -(-samples // every)
    older = max(count - settings.checkpoint.keep, 0)
    by_number = older // settings.checkpoint.keep_every if settings.checkpoint.keep_every else 0
    return min(count, settings.checkpoint.keep) + by_number, count


# ---- pace: `train plan --measure`: how fast this machine trains, from some warmed steps of the run that is planned. Nothing is kept.
#
# OUT -> open_data, make_train_state, make_loader -> the one loop for some seconds -> Pace


_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Pace:
    """What was measured on one device.

    Attributes:
        samples_per_s: of warmed steps on the loader's batches.
        start_s: what the command took beside its steps at that rate: before the first, after the last, and by which the
            first were slower.
        pause_s: for which a checkpoint holds up training.
        memory_gib: the most in use on the device, or by this process where the device is a CPU.
    """

    samples_per_s: float
    start_s: float
    pause_s: float
    memory_gib: float

    def seconds(self, samples: int, checkpoints: int, devices: int) -> float:
        """Wall clock of a run of this many samples on this many devices like this one."""
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
        inputs = ImageInput(
            settings.data, world.device, image_size=settings.model.image_size, seed=settings.runtime.seed
        )
        found = loop_rate(loader, inputs, train_state, settings, world, seconds)
    start_s = beside_steps(time.perf_counter() - begun, found)
    before = time.perf_counter()
    snapshot(train_state, on_this_rank=True)
    return Pace(found.samples_per_s, start_s, time.perf_counter() - before, peak_memory_gib(world.device))


def beside_steps(seconds: float, found: LoopRate) -> float:
    """Of the seconds of a command, those that its steps do not explain at the rate of the warmed ones."""
    return max(seconds - found.samples / found.samples_per_s, 0.0)
