"""The one training loop: read it from top to bottom. It knows batches, a model and a loss, not where they come from."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from labels.settings import Train
from train.distributed import World
from train.loader import Batch
from train.metrics import Metrics
from train.optim import learning_rate

_ASK_EVERY_STEPS = 10
Inputs = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""A batch -> what the model takes, on its device: images float [B, 3, S, S] and targets."""


@dataclass(frozen=True)
class Budget:
    """`steps` in all, `warmup_steps` of them, from `first_step` on."""

    steps: int
    warmup_steps: int
    first_step: int


def run_loop(
    batches: Iterable[Batch],
    inputs: Inputs,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Train,
    budget: Budget,
    world: World,
    metrics: Metrics,
    save: Callable[[int], None],
    stopping: Callable[[], bool],
) -> bool:
    """Train until the budget is spent or somebody asks to stop.

    Args:
        batches: one a step, beginning with step `budget.first_step`.
        inputs: makes the model's two arguments from a batch.
        model: images and targets -> the mean loss of this rank's samples.
        optimizer: over the model's parameters.
        settings: the `train` section.
        budget: steps.
        world: this process among all.
        metrics: where losses and rates go.
        save: called with the number of finished steps when a checkpoint is due.
        stopping: asked after every step; True saves and leaves.

    Returns:
        True if the budget was spent, False if it was stopped.
    """
    device, bf16 = world.device, use_bf16(settings.runtime.precision, world.device)
    save_steps = max(1, settings.checkpoint.every_samples // settings.batch_size)
    model.train()
    waiting_since = time.monotonic()
    for step, batch in enumerate(batches, start=budget.first_step):
        # -- input: uint8 to the device, normalised there
        waited = time.monotonic() - waiting_since
        images, targets = inputs(batch)

        # -- forward, backward, step. Randomness inside the model depends on (seed, step, rank) alone
        torch.manual_seed(settings.runtime.seed * 1_000_003 + step * world.size + world.rank)
        lr = learning_rate(step, budget.steps, budget.warmup_steps, settings.optimizer.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(images, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        # -- what was seen
        metrics.record(loss, lr, waited, batch.bad)
        finished = step + 1
        # Ranks have to agree on both, which waits for the device: alone at every step, together only now and then.
        ask = world.size == 1 or finished % _ASK_EVERY_STEPS == 0
        stop = ask and finished < budget.steps and world.any(stopping())
        due = finished % save_steps == 0 or finished == budget.steps or stop
        log = ask and world.any(metrics.seconds_since_flush >= settings.log.every_seconds)
        if due or log:
            metrics.flush()  # before saving: a loss that is not finite must not become a checkpoint
        if due:
            save(finished)
        if stop:
            return False
        waiting_since = time.monotonic()
    return True


def use_bf16(precision: str, device: torch.device) -> bool:
    """`auto`: bf16 autocast where the device computes in it, fp32 elsewhere."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
