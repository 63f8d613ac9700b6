"""`train plan`: what a run would take, before anything is started."""

from typing import TYPE_CHECKING

import torch

from labels.html import format_seconds
from labels.settings import TextTower, Train
from train.costs import Costs, activation_bytes, messages, model_costs, peak_flops, tower_costs, trunk_costs
from train.model import build_trunk
from train.precision import autocast_dtype
from train.text_tower import build_text_tower

if TYPE_CHECKING:
    from train.pace import Pace  # which loads all that trains

_GIB = 2**30


def plan_lines(
    settings: Train, *, vocabulary: int, dataset_samples: int | None, devices: int, rates: tuple[float, ...], device: torch.device,
    tower: TextTower | None = None, locked: bool = False, pace: "Pace | None" = None, price: float | None = None,
) -> list[str]:  # fmt: skip
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
        "epochs       " + (f"{samples / dataset_samples:.2f} of {dataset_samples:,}" if dataset_samples else "not known: give --beton OUT"),
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
        lines.append(f"time         {format_seconds(seconds)} at {rate:,.0f} samples/s{how}{used}: {hours:,.2f} device-hours{paid}")
    return lines + [f"assumed      {line}" for line in _assumptions(pace, devices, bool(rates))]


def _assumptions(pace: "Pace | None", devices: int, given: bool) -> list[str]:
    told = ["nothing else runs on the machine, and nothing has to be done twice"]
    if pace:
        told.append("the loader keeps the speed of the first blocks of the data, which may lie in memory; checkpoints are written beside")
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
