"""`train plan`: what a run would take, before anything is started; with `--measure`, how fast this machine trains.

    settings, vocabulary, devices -> plan_lines: steps, memory, disk, messages, hours, cost, each a line
    --measure: open_data, make_train_state, make_loader -> the one loop for some seconds -> Pace -> the time line

Nothing is kept. V vocabulary, the head's width.
"""

import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace

import torch

from labels.settings import TextTower, Train
from labels.show.html import format_seconds
from train.bench.throughput import LoopRate, loop_rate, without_logs_and_checkpoints
from train.checkpoint import snapshot
from train.costs.flops import Costs, messages, model_costs, peak_flops, tower_costs, trunk_costs
from train.costs.memory import Planned, step_memory, verdict
from train.data.inputs import ImageInput
from train.data.open import Chosen, make_loader, open_data
from train.distributed import World, distributed_world
from train.metrics import peak_memory_gib
from train.model import build_trunk
from train.optim import autocast_dtype
from train.text_tower import build_text_tower
from train.trainer import check_batch_divides, make_train_state

_GIB = 2**30
_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Pace:
    """What was measured on one device."""

    samples_per_s: float  # of warmed steps on the loader's batches
    start_s: float  # what the command took in addition to its steps at that rate, slower first steps included
    pause_s: float  # for which a checkpoint holds up training
    memory_gib: float  # the most in use on the device, or by this process where the device is a CPU

    def seconds(self, samples: int, checkpoints: int, devices: int) -> float:
        """Wall clock of a run of this many samples on this many devices like this one."""
        return self.start_s + samples / (self.samples_per_s * devices) + checkpoints * self.pause_s


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
    pace: Pace | None = None,
    price: float | None = None,
    device_memory: int | None = None,
) -> list[str]:
    """Steps, epochs, parameters, operations, memory, disk, messages, hours, cost and what is assumed, each a line.

    `rates` are samples/s over all devices, to compute the time for; `device` is of this machine, whose precision is
    taken where it is `auto`; `tower` is that of `train clip` and `train lit`; `locked`, for `train lit`, assumes an
    encoder like `train.model`; `price` is of a device for an hour, in any currency; with `device_memory`, bytes of each
    device, a line says whether a step fits. UserError as `train run`, for a model that cannot be built and a batch that
    does not divide.
    """
    check_batch_divides(settings, devices)
    batch = settings.batch_size
    steps = settings.samples // batch
    samples, warmup = steps * batch, settings.optimizer.warmup_samples
    cooldown = f", the last {settings.cooldown[1] - settings.cooldown[0]:,} a cooldown" if settings.cooldown else ""
    costs = _costs(settings, vocabulary, tower, locked)
    epochs = "not known: give --beton OUT"
    if dataset_samples:
        epochs = f"{samples / dataset_samples:.2f} of {dataset_samples:,}"
    trunk = f"trunk {costs.trunk / 1e6:.1f}M{' frozen' if locked else ''}"
    head = f"{costs.head_name} {costs.head / 1e6:.1f}M ({vocabulary:,} {'tokens' if tower else 'classes'})"
    lines = [
        f"steps        {steps:,} of {batch:,} samples = {samples:,}, {warmup:,} of them warm-up{cooldown}",
        f"epochs       {epochs}",
        f"parameters   {trunk} + {head}",
        f"operations   {costs.flops / 1e9:.1f} GFLOP a sample, {costs.flops * samples:.3g} FLOP in all",
        *_memory_and_disk(settings, Planned(costs, devices, device, tower, locked), samples, device_memory),
    ]
    if devices > 1:
        lines.append(f"messages     {messages(costs, settings, devices, device)}")
    times = [(samples / rate, rate, "") for rate in rates]
    if pace:
        memory = f"memory {pace.memory_gib:.1f} GiB"
        overhead = f"start and end {pace.start_s:.1f} s, a checkpoint {pace.pause_s:.2f} s, {memory}"
        measured = f"{pace.samples_per_s:,.0f} samples/s on one {device.type} in batches of {batch // devices}"
        lines.append(f"measured     {measured}; {overhead}")
        _, checkpoints = _checkpoints(settings, samples)
        times.insert(0, (pace.seconds(samples, checkpoints, devices), pace.samples_per_s * devices, " as measured"))
    peak = peak_flops(settings, device)
    for seconds, rate, how in times:
        used = f", {costs.flops * rate / devices / peak:.0%} of a device's {peak / 1e12:,.0f} TFLOP/s" if peak else ""
        hours = seconds * devices / 3600
        cost = f", cost {hours * price:,.2f}" if price is not None else ""
        duration = f"{format_seconds(seconds)} at {rate:,.0f} samples/s{how}{used}"
        lines.append(f"time         {duration}: {hours:,.2f} device-hours{cost}")
    return lines + [f"assumed      {line}" for line in _assumptions(pace, devices, bool(rates))]


def _memory_and_disk(settings: Train, planned: Planned, samples: int, device_memory: int | None) -> list[str]:
    if device_memory is not None and planned.device.type == "cpu":  # a GPU that is not in this machine
        planned = replace(planned, device=torch.device("cuda"))
        if settings.runtime.precision == "auto":
            runtime = settings.runtime.model_copy(update={"precision": "bf16"})
            settings = settings.model_copy(update={"runtime": runtime})
    costs, memory = planned.costs, step_memory(settings, planned)
    averaged = settings.optimizer.ema_decay is not None
    checkpoint = (costs.parameters * (16 if averaged else 12) + (4 * costs.trunk if costs.frozen else 0)) / _GIB
    precision = str(autocast_dtype(settings.runtime.precision, planned.device) or "fp32").removeprefix("torch.")
    kept, written = _checkpoints(settings, samples)
    states = f"weights, gradients and moments{' and average' if averaged else ''}"
    lines = [
        f"memory       {memory.total / _GIB:.1f} GiB on each of {planned.ranks}: "
        f"{memory.states / _GIB:.1f} for {states}, "
        f"{memory.activations / _GIB:.1f} for the activations of {memory.samples} samples at a time ({precision}), "
        f"{memory.loss / _GIB:.1f} for the loss",
        f"disk         {kept * checkpoint:.1f} GiB: {kept} of {written} checkpoints of {checkpoint:.2f} GiB are kept",
    ]
    if device_memory is not None:
        lines.insert(1, f"fits         {verdict(settings, planned, device_memory)}")
    return lines


def _assumptions(pace: Pace | None, devices: int, rate_given: bool) -> list[str]:
    lines = ["nothing else runs on the machine, and nothing is repeated"]
    if pace:
        lines.append(
            "the loader keeps the speed of the first blocks of the data, which may be in memory; "
            "checkpoints are written in the background"
        )
    if pace and devices > 1:
        lines.append(f"{devices} devices like this one, each as fast; messages between them take no time")
    if rate_given:
        lines.append("a given rate holds from the first step to the last; start and checkpoints are not included")
    return lines


def _costs(settings: Train, vocabulary: int, tower: TextTower | None, locked: bool) -> Costs:
    if tower is None:
        return model_costs(settings.model, vocabulary)
    with torch.device("meta"):
        trunk = trunk_costs(build_trunk(settings.model), settings.model.image_size, trained=not locked)
        return tower_costs(trunk, build_text_tower(tower, vocabulary), tower, locked=locked)


def _checkpoints(settings: Train, samples: int) -> tuple[int, int]:
    """Numbers of checkpoints kept and written (without those of `every_minutes`)."""
    keep, keep_every = settings.checkpoint.keep, settings.checkpoint.keep_every
    every = max(1, settings.checkpoint.every_samples // settings.batch_size) * settings.batch_size
    written = -(-samples // every)
    kept_older = max(written - keep, 0) // keep_every if keep_every else 0
    return min(written, keep) + kept_older, written


def measure_pace(chosen: Chosen, settings: Train, devices: int, seconds: float, begun: float) -> Pace:
    """Train for some seconds in this process, on one device with its share of the batch; the first half warms up.

    `begun` is time.perf_counter() at the command's start. Raises UserError as `train run`, for data that cannot be
    opened and a batch that does not divide.
    """
    check_batch_divides(settings, devices)
    settings = settings.model_copy(update={"batch_size": settings.batch_size // devices})
    with redirect_stdout(sys.stderr), distributed_world(settings.runtime) as world:
        return _measure(chosen, without_logs_and_checkpoints(settings), world, seconds, begun)


def _measure(chosen: Chosen, settings: Train, world: World, seconds: float, begun: float) -> Pace:
    betons = open_data(chosen, settings.data, world, lambda: False)
    assert betons is not None  # nothing stops it
    train_state = make_train_state(settings, torch.from_numpy(betons.idf), world)
    size, seed = settings.model.image_size, settings.runtime.seed
    with make_loader(betons, settings, 0, _ENDLESS, world) as loader:
        inputs = ImageInput(settings.data, world.device, image_size=size, seed=seed)
        rate = loop_rate(loader, inputs, train_state, settings, world, seconds)
    start_s = startup_seconds(time.perf_counter() - begun, rate)
    before = time.perf_counter()
    snapshot(train_state, on_this_rank=True)
    return Pace(rate.samples_per_s, start_s, time.perf_counter() - before, peak_memory_gib(world.device))


def startup_seconds(seconds: float, rate: LoopRate) -> float:
    """The part of a command's seconds that its steps do not explain at the rate of the warmed ones."""
    return max(seconds - rate.samples / rate.samples_per_s, 0.0)
