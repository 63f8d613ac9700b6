"""The one training loop, from top to bottom: batches, a model with its loss, an optimizer step, metrics, checkpoints.

    batch [B, ...] -> inputs -> images [B, 3, S, S], targets -> ddp_model -> mean loss -> gradients -> optimizer step

Whether loss and gradient norm are finite is decided on the device, over all ranks; a step that is not is skipped there,
so no step waits for the host. Skipped steps are counted when losses are copied for the log (train/metrics.py).
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labels.settings import Train
from train.distributed import World, gradients_exchanged, loss_and_gradient_norm
from train.metrics import Metrics
from train.optim import Ema, LossScale, autocast_dtype, learning_rate

Inputs = Callable[[Any], tuple[Tensor, Tensor]]
"""A batch -> the model's two arguments, on its device: images float [B, 3, S, S] and targets."""
STOPPED_EXIT_CODE = 75  # a run was stopped and saved: the same command resumes it (EX_TEMPFAIL of sysexits.h)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send them before they take a machine away
_AGREE_EVERY_STEPS = 10


class Stopped(Exception):
    """Training inside a larger task was stopped by a signal, and is saved: the same command resumes it."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or SIGUSR1 has arrived; restores the old handlers at the end."""
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
    """`steps` in all, `warmup_steps` first of them; this process starts at `first_step`."""

    steps: int
    warmup_steps: int
    first_step: int
    cooldown_steps: int | None = None  # the last steps of schedule wsd; None: cosine


@dataclass(frozen=True)
class TrainState:
    """What is trained, and all tensors of a checkpoint."""

    model: nn.Module  # names of its children and parameters are the checkpoint's
    ddp_model: (
        nn.Module
    )  # `model` spread over the ranks (train/distributed.py): images, targets -> this rank's mean loss
    optimizer: torch.optim.Optimizer  # over the parameters of `model`; honours found_inf
    scale: LossScale | None = None  # with fp16
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
    between: Callable[[int], None] = lambda _: None,
) -> bool:
    """Train until the budget is spent (returns True), or until `stopping` returns True after a step (False).

    `batches` are dataclasses of tensors [B, ...] with a count `bad`, one per step from `budget.first_step`. `save` gets
    the number of finished steps when a checkpoint is due, also before the loop ends; `between` gets it after each step,
    before a checkpoint.
    """
    due = _Due(settings, budget, world)
    train_state.model.train()
    waiting_since = time.monotonic()
    for step, batch in enumerate(batches, start=budget.first_step):
        waited = time.monotonic() - waiting_since

        # -- forward and backward. Randomness inside the model depends on (seed, step, rank) alone
        _seed(settings.runtime.seed * 1_000_003 + step * world.size + world.rank, world.device)
        loss = _gradients(batch, inputs, train_state, settings, world.device)

        # -- one step of the optimizer
        lr = learning_rate(step, budget.steps, budget.warmup_steps, settings.optimizer.lr, budget.cooldown_steps)
        loss, norm = loss_and_gradient_norm(loss, train_state.model.parameters(), world)
        norm, skipped = _update(train_state, step, lr, loss, norm, settings.optimizer.clip_norm)

        # -- metrics, log, checkpoint
        metrics.record(loss, norm, skipped, lr, waited, batch.bad)
        finished = step + 1
        stop, checkpoint, log = due(finished, stopping, metrics.seconds_since_flush)
        if checkpoint or log:
            metrics.flush(durable=checkpoint)  # before saving, which needs its count of skipped steps
        if not stop:
            between(finished)
        if checkpoint:
            save(finished)
        if stop:
            return False
        waiting_since = time.monotonic()
    return True


def _seed(number: int, device: torch.device) -> None:
    """torch.manual_seed for the devices in use; that function tries all kinds: a millisecond where there is no GPU."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _gradients(batch: Any, inputs: Inputs, train_state: TrainState, settings: Train, device: torch.device) -> Tensor:
    """Add up the gradients of a batch, part by part; returns its mean loss on this rank, on the device."""
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
    """A batch cut along its first axis into `parts` batches of the same class, in the same memory."""
    if parts == 1:
        yield batch
        return
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, Tensor | np.ndarray)}
    rows = len(next(iter(arrays.values())))
    for number in range(parts):
        part = slice(rows * number // parts, rows * (number + 1) // parts)
        yield dataclasses.replace(batch, **{name: value[part] for name, value in arrays.items()})


def _update(
    train_state: TrainState, step: int, lr: float, loss: Tensor, norm: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Change the weights, unless loss or gradient is not finite; returns the unscaled gradient norm, and 1.0 if the
    step was skipped, else 0.0.
    """
    scale, ema, optimizer = train_state.scale, train_state.ema, train_state.optimizer
    divisor = None
    if scale is not None:
        norm, divisor = norm / scale.value, scale.value
    if clip is not None:
        divisor = (norm / clip).clamp(min=1.0).float() * (1.0 if divisor is None else divisor)
    skipped = 1.0 - (loss.isfinite() & norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # below 1 in a trunk's first layers, in fine-tuning
    # The two attributes through which fused optimizers serve GradScaler: `grad_scale` divides the gradients,
    # `found_inf` skips the step. On a CPU there is nothing to wait for, and the step without that test is faster.
    on_device = loss.device.type != "cpu"
    optimizer.grad_scale, optimizer.found_inf = divisor, skipped if on_device else None  # type: ignore[attr-defined]
    if on_device or not skipped:
        optimizer.step()
    if scale is not None:
        scale.update(skipped)
    if ema is not None:
        ema.update(step, skipped)
    return norm, skipped


class _Due:
    """What to do after a step. Ranks must agree, which waits for the device: ranks do it only every few steps."""

    def __init__(self, settings: Train, budget: Budget, world: World) -> None:
        self._steps, self._world, self._log_s = budget.steps, world, settings.log.every_seconds
        self._save_steps = max(1, settings.checkpoint.every_samples // settings.batch_size)
        self._save_s = 60 * (settings.checkpoint.every_minutes or float("inf"))
        self._saved = time.monotonic()

    def __call__(
        self, finished: int, stopping: Callable[[], bool], seconds_since_log: float
    ) -> tuple[bool, bool, bool]:
        """After `finished` steps: whether to stop, to save, to write a log line."""
        stop, late, log = False, False, False
        if self._world.size == 1 or finished % _AGREE_EVERY_STEPS == 0:
            late = time.monotonic() - self._saved >= self._save_s
            stop = finished < self._steps and stopping()
            stop, late, log = self._world.any(stop, late, seconds_since_log >= self._log_s)
        save = finished % self._save_steps == 0 or finished == self._steps or stop or late
        if save:
            self._saved = time.monotonic()
        return stop, save, log
