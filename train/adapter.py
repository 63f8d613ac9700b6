"""Training of a model, or of a small part beside frozen ones, over the one loop: resumed from its own checkpoints, saved when asked to.

What is frozen is held outside the module's children, so that checkpoints hold what is trained alone.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from labels.errors import UserError
from labels.files import make_folder
from labels.settings import Optimizer, Train
from train.checkpoint import CheckpointWriter, State, checkpoint_folders, load_checkpoint, read_state, snapshot
from train.distributed import World
from train.loop import Budget, Inputs, TrainState, run_loop
from train.metrics import Metrics, Speed
from train.optim import make_optimizer
from train.parallel import spread
from train.precision import LossScale, autocast_dtype
from train.trackers import make_trackers

Batches = Callable[[int, int], Iterable[Any]]
"""First step, number of all steps -> this rank's share of each batch, see train/loop.py."""
MakeOptimizer = Callable[[nn.Module, Optimizer], torch.optim.Optimizer]
"""A model as it was spread, the optimiser's section -> the optimiser."""


def train_adapter(
    model: nn.Module, batches: Batches, inputs: Inputs, settings: Train, run: Path, identity: str, world: World,
    stopping: Callable[[], bool], make: MakeOptimizer = make_optimizer,
) -> bool:  # fmt: skip
    """Train `model`, or go on with what `run` holds of it; afterwards it has the weights of the newest checkpoint.

    Args:
        model: on the device; two arguments as `inputs` makes them -> the mean loss.
        settings: budget, optimiser, runtime, checkpoint and log; its model, data and loss are not looked at.
        run: folder of metrics.jsonl and checkpoints.
        identity: fingerprint of all that decides the result; a run of another one is not gone on with.
        stopping: asked after every step.
        make: what trains it; every trained parameter is in a group of its.

    Returns:
        True when the budget is spent, False when it was stopped and saved.

    Raises:
        UserError: `run` was begun with something else, or the batch cannot be shared evenly.
    """
    _check_shares(settings, world)
    scaled = autocast_dtype(settings.runtime.precision, world.device) == torch.float16
    ddp_model = spread(model, settings.runtime.parallel, world)
    train_state = TrainState(model, ddp_model, make(model, settings.optimizer), scale=LossScale(world.device) if scaled else None)
    state = _resumed(run, identity, train_state)
    warmup, steps = round(settings.optimizer.warmup_samples / settings.batch_size), settings.samples // settings.batch_size
    budget = Budget(steps, warmup, state.samples_seen // settings.batch_size)
    if budget.first_step >= budget.steps:
        return True
    make_folder(run)
    metrics = Metrics(
        run, world, settings, steps=steps, first_step=budget.first_step, skipped=(state.skipped_steps, state.skipped_in_a_row),
        speed=Speed(0, None), trackers=make_trackers(run, settings.log, budget.first_step, settings.model_dump()) if world.is_first else [],
    )  # fmt: skip
    with CheckpointWriter(run, settings.checkpoint.keep, settings.checkpoint.keep_every) as writer:

        def save(finished: int) -> None:
            nonlocal state
            if metrics.skipped_in_a_row and finished < steps:
                return  # these weights may be what made the numbers infinite: the checkpoint before is worth more
            now = {"samples_seen": finished * settings.batch_size, "number": state.number + 1, "skipped_steps": metrics.skipped}
            scale = train_state.scale.state() if train_state.scale else None
            state = state.model_copy(update={**now, "skipped_in_a_row": metrics.skipped_in_a_row, "loss_scale": scale})
            tensors = snapshot(train_state, world.is_first)
            if world.is_first:
                writer.save(tensors, state)

        try:
            return run_loop(batches(budget.first_step, steps), inputs, train_state, settings, budget, world, metrics, save, stopping)
        finally:
            metrics.close()


def rows_of_steps(count: int, size: int, seed: int, first_step: int, steps: int) -> Iterator[np.ndarray]:
    """The rows, int64 [size], of each step's batch: one permutation of [0, count) after the other, without a gap."""
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(first_step, steps):
        places, rows = np.arange(step * size, (step + 1) * size), np.empty(size, np.int64)
        for number in range(places[0] // count, places[-1] // count + 1):
            if number != epoch:
                epoch, order = number, np.random.default_rng([seed, number]).permutation(count)
            here = places // count == number
            rows[here] = order[places[here] % count]
        yield rows


def _resumed(run: Path, identity: str, train_state: TrainState) -> State:
    folders = checkpoint_folders(run)
    if not folders:
        return State(samples_seen=0, number=0, labels="", idf="", betons="", options=identity, vocabulary=0)
    state = read_state(folders[-1])
    if state.options != identity:
        raise UserError(
            f"{run} was begun with other data, weights or settings: fingerprint {state.options}, now {identity}",
            mend="give what it was begun with, or another --out",
        )
    load_checkpoint(folders[-1], train_state, state)
    return state


def _check_shares(settings: Train, world: World) -> None:
    parts = world.size * settings.runtime.accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"the batch size is {settings.batch_size}, the number of ranks {world.size}, train.runtime.accumulation "
            f"{settings.runtime.accumulation}",
            allowed=f"a multiple of {parts}",
        )
