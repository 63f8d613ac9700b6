"""What a run says before its first step."""

from pathlib import Path
from typing import Any

from labels.settings import Train
from train.betons import BetonSet
from train.costs import Costs, messages
from train.distributed import World
from train.loop import Budget
from train.optim import by_decay
from train.precision import autocast_dtype


def announce(run: Path, settings: Train, costs: Costs, model: Any, data: str, budget: Budget, world: World) -> None:
    """Print model, data, budget, weight-decay exemptions and messages.

    Args:
        run: its folder.
        settings: `train`.
        costs: of the model.
        model: as it is trained.
        data: what it is trained on, in words.
        budget: steps.
        world: this process among all.
    """
    samples, dtype = budget.steps * settings.batch_size, autocast_dtype(settings.runtime.precision, world.device)
    decayed, exempt = by_decay(model)
    exempt_numbers = sum(parameter.numel() for parameter in exempt.values())
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in exempt}))
    trunk = f"{costs.trunk / 1e6:.1f}M{' frozen' if costs.frozen else ''}"
    resumed = f"; resumed at step {budget.first_step}" if budget.first_step else ""
    lines = [
        f"{run}: {settings.model.trunk}, {trunk} + {costs.head_name} {costs.head / 1e6:.1f}M parameters, "
        f"{costs.flops / 1e9:.1f} GFLOP a sample, {world.size} x {world.device.type} in {str(dtype or 'fp32').removeprefix('torch.')}; "
        f"{data}, budget {samples:,} samples = {budget.steps} steps{resumed}",
        f"weight decay {settings.optimizer.weight_decay:g} on {len(decayed)} tensors, none on {len(exempt)} single vectors "
        f"({exempt_numbers:,} numbers: {kinds})",
    ]
    if world.size > 1:
        lines.append(messages(costs, settings, world.size, world.device))
    print("\n".join(lines), flush=True)


def in_words(betons: BetonSet, samples: int) -> str:
    """The data of a run, for `announce`."""
    return (
        f"{betons.samples:,} samples in {len(betons.paths)} betons, labels of {betons.labels_out} ({betons.labels.tokenizer.name}, "
        f"{betons.vocabulary:,} classes), {samples / betons.samples:.2f} epochs"
    )
