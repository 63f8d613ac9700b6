"""`train plan`: what a run would take, before anything is started."""

import torch

from labels.settings import TextTower, Train
from train.contrastive.model import build_text_tower
from train.costs import Costs, activation_bytes, messages, model_costs, peak_flops, tower_costs, trunk_costs
from train.model import build_trunk
from train.precision import autocast_dtype

_GIB = 2**30


def plan_lines(
    settings: Train, *, vocabulary: int, dataset_samples: int | None, devices: int, rates: tuple[float, ...], device: torch.device,
    tower: TextTower | None = None, locked: bool = False,
) -> list[str]:  # fmt: skip
    """Steps, epochs, parameters, operations, memory, disk, messages and hours, each a line.

    Args:
        settings: `train`.
        vocabulary: V, the head's width.
        dataset_samples: in one epoch; None where no OUT was given.
        devices: ranks of the planned run.
        rates: samples/s over all devices.
        device: of this machine, whose precision is taken where it is `auto`.
        tower: of `train clip` and `train lit`. locked: of `train lit`, whose encoder is taken to be like `train.model`.
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
    peak = peak_flops(settings, device)
    for rate in rates:
        used = f", {costs.flops * rate / devices / peak:.0%} of a device's {peak / 1e12:,.0f} TFLOP/s" if peak else ""
        lines.append(f"time         {samples / rate / 3600:,.1f} hours at {rate:,.0f} samples/s{used}")
    return lines


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
