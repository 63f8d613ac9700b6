"""The one training loop: read it from top to bottom. It knows batches, a model and a loss, not where they come from."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from labels.settings import Train
from train.distributed import World, gradients_exchanged, loss_and_gradient_norm
from train.metrics import Metrics
from train.optim import Ema, LossScale, autocast_dtype, learning_rate

_ASK_EVERY_STEPS = 10
Inputs = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
"""A batch -> what the model takes, on its device: images float [B, 3, S, S] and targets."""
STOPPED_EXIT_CODE = 75
"""A run that was asked to stop, saved and left: the same command resumes it (EX_TEMPFAIL of sysexits.h)."""
# Schedulers send them before they take a machine away.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Training within something larger was stopped by a signal, and has been saved: the same command resumes it."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM or SIGUSR1 has come; the old handlers are put back at the end."""
    received = False

    def note(number: int, frame: object) -> None:
        nonlocal received
        received = True

    handlers = {number: signal.signal(number, note) for number in _STOP_SIGNALS}
    try:
        yield lambda: received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Budget:
    """`steps` in all, `warmup_steps` of them, from `first_step` on."""

    steps: int
    warmup_steps: int
    first_step: int


@dataclass(frozen=True)
class TrainState:
    """What is trained, and all that a checkpoint keeps of it.

    Attributes:
        model: the module itself; the names of its children and parameters are the checkpoint's.
        ddp_model: `model` as train/distributed.py spreads it over the ranks: images and targets -> the mean loss of this rank's samples.
        optimizer: fused, over the parameters of `model`.
        scale: with fp16 only.
        ema: if asked for.
    """

    model: nn.Module
    ddp_model: nn.Module
    optimizer: torch.optim.Optimizer
    scale: LossScale | None = None
    ema: Ema | None = None


def run_loop(
    batches: Iterable[Any],
    inputs: Inputs,
    train_state: TrainState,
    settings: Train,
    budget: Budget,
    world: World,
    metrics: Metrics,
    save: Callable[[int], None],
    stopping: Callable[[], bool],
) -> bool:
    """Train until the budget is spent or somebody asks to stop.

    Args:
        batches: dataclasses of tensors [B, ...] with a count `bad`; one a step, beginning with step
            `budget.first_step`.
        inputs: makes the model's two arguments from a batch or a part of it.
        train_state: what is trained.
        settings: the `train` section.
        budget: steps.
        world: this process among all.
        metrics: where losses and rates go.
        save: called with the number of finished steps when a checkpoint is due.
        stopping: asked after every step; True saves and leaves.

    Returns:
        True if the budget was spent, False if it was stopped.
    """
    due = _Due(settings, budget, world)
    train_state.model.train()
    waiting_since = time.monotonic()
    for step, batch in enumerate(batches, start=budget.first_step):
        waited = time.monotonic() - waiting_since

        # -- forward and backward. Randomness inside the model depends on (seed, step, rank) alone
        _seed(settings.runtime.seed * 1_000_003 + step * world.size + world.rank, world.device)
        loss = _gradients(batch, inputs, train_state, settings, world.device)

        # -- one step of the optimiser. Whether all numbers are finite is decided on the device: nothing waits for it
        lr = learning_rate(step, budget.steps, budget.warmup_steps, settings.optimizer.lr)
        loss, norm = loss_and_gradient_norm(loss, train_state.model.parameters(), world)
        norm, skipped = _update(train_state, step, lr, loss, norm, settings.optimizer.clip_norm)

        # -- what was seen
        metrics.record(loss, norm, skipped, lr, waited, batch.bad)
        finished = step + 1
        stop, checkpoint, log = due(finished, stopping, metrics.seconds_since_flush)
        if checkpoint or log:
            metrics.flush(durable=checkpoint)  # before saving, which needs its count of skipped steps
        if checkpoint:
            save(finished)
        if stop:
            return False
        waiting_since = time.monotonic()
    return True


def _seed(number: int, device: torch.device) -> None:
    """torch.manual_seed for the devices in use; that one asks all others too, which costs a millisecond where there is
    no GPU.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _gradients(
    batch: Any, inputs: Inputs, train_state: TrainState, settings: Train, device: torch.device
) -> torch.Tensor:
    """Add up the gradients of a batch, part by part; returns its mean loss on this rank, left on the device."""
    parts, dtype = settings.runtime.accumulation, autocast_dtype(settings.runtime.precision, device)
    total = torch.zeros((), device=device)
    train_state.optimizer.zero_grad(set_to_none=True)
    for number, part in enumerate(micro_batches(batch, parts), start=1):
        images, targets = inputs(part)
        with gradients_exchanged(train_state.ddp_model, number == parts):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = train_state.ddp_model(images, targets) / parts
            (loss if train_state.scale is None else loss * train_state.scale.value).backward()
        total += loss.detach()
    return total


def micro_batches(batch: Any, parts: int) -> Iterator[Any]:
    """A batch cut along its first axis into `parts` batches of the same kind, in the same memory."""
    if parts == 1:
        yield batch
        return
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor | np.ndarray)}
    rows = len(next(iter(arrays.values())))
    for number in range(parts):
        part = slice(rows * number // parts, rows * (number + 1) // parts)
        yield dataclasses.replace(batch, **{name: value[part] for name, value in arrays.items()})


def _update(
    train_state: TrainState, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change the weights, unless loss or gradient is not finite; returns the gradient's true norm and 1.0 where it was
    skipped.
    """
    divisor = None
    if train_state.scale is not None:
        norm, divisor = norm / train_state.scale.value, train_state.scale.value
    if clip is not None:
        divisor = (norm / clip).clamp(min=1.0).float() * (1.0 if divisor is None else divisor)
    skipped = 1.0 - (loss.isfinite() & norm.isfinite()).float()
    for group in train_state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # less in a trunk's first layers, where it is fine-tuned
    # The two attributes through which fused optimisers serve GradScaler: gradients are divided by the one, the other
    # skips the step. On a CPU there is nothing to wait for, and the step without a test is faster.
    ask = loss.device.type != "cpu"
    train_state.optimizer.grad_scale, train_state.optimizer.found_inf = divisor, skipped if ask else None  # type: ignore[attr-defined]
    if ask or not skipped:
        train_state.optimizer.step()
    if train_state.scale is not None:
        train_state.scale.update(skipped)
    if train_state.ema is not None:
        train_state.ema.update(step, skipped)
    return norm, skipped


class _Due:
    """What is to be done after a step. Ranks have to agree, which waits for the device: alone at every step, together
    now and then.
    """

    def __init__(self, settings: Train, budget: Budget, world: World) -> None:
        self._steps, self._world, self._every_s = budget.steps, world, settings.log.every_seconds
        self._save_steps = max(1, settings.checkpoint.every_samples // settings.batch_size)
        self._save_s = 60 * (settings.checkpoint.every_minutes or float("inf"))
        self._saved = time.monotonic()

    def __call__(
        self, finished: int, stopping: Callable[[], bool], seconds_since_log: float
    ) -> tuple[bool, bool, bool]:
        """After `finished` steps: whether to stop, to save, to write a log line."""
        ask = self._world.size == 1 or finished % _ASK_EVERY_STEPS == 0
        late = time.monotonic() - self._saved >= self._save_s
        wishes = (finished < self._steps and stopping(), late, seconds_since_log >= self._every_s)
        stop, late, log = self._world.any(*wishes) if ask else (False, False, False)
        save = finished % self._save_steps == 0 or finished == self._steps or stop or late
        if save:
            self._saved = time.monotonic()
        return stop, save, log
