"""`train run`: pre-training by classification, put together from betons, model, loss and the loop; and by any other method.

OUT (betons), OUT or OTHER_OUT (labels, idf) -> BetonSet -> Loader -> ImageInput -> loop (Classifier, AdamW) -> RUN (metrics, checkpoints)
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from labels.config import dump_yaml
from labels.errors import UserError
from labels.files import make_folder, write_json
from labels.settings import Pipeline, Train
from train.announce import announce, in_words
from train.betons import BetonSet
from train.checkpoint import CheckpointWriter, State, load_checkpoint, snapshot
from train.costs import Costs, model_costs, peak_flops, splits_vocabulary
from train.data import Chosen, data_facts, make_loader, open_data
from train.distributed import World, distributed_world
from train.ema import Ema
from train.images import ImageInput
from train.loop import Budget, TrainState, run_loop
from train.losses.head_loss import HeadLoss
from train.method import SUPERCLASS, Method
from train.metrics import Metrics, Speed
from train.model import Classifier, build_trunk, set_up_trunk
from train.optim import make_optimizer
from train.parallel import spread
from train.precision import LossScale, autocast_dtype
from train.resume import resume_point
from train.signals import stop_signals
from train.synthetic import synthetic_batches, synthetic_inputs
from train.trackers import make_trackers


def train_run(data: Path | Chosen, run: Path, pipeline: Pipeline, labels: Path | None = None, method: Method | None = None) -> bool:
    """Train, or go on with, the run in `run`.

    Args:
        data: OUT of a build, or what train/data.py opens.
        run: folder of the run; its checkpoints are resumed from.
        pipeline: resolved configuration.
        labels: OUT of a build over the same rows, whose labels and IDF are taken instead of the betons' own.
        method: what is trained; by default the classification of captions.

    Returns:
        True when the budget is spent, False when the run was stopped by a signal and saved.

    Raises:
        UserError: whatever does not fit, before anything expensive begins.
    """
    settings, method = pipeline.train, method or classification()
    with distributed_world(settings.runtime) as world, stop_signals() as stopping:
        check_shares(settings, world.size)
        chosen = data if isinstance(data, Chosen) else Chosen([str(data)], [labels] if labels else [])
        betons = open_data(chosen, settings.data, world, stopping, method.column)
        if betons is None:
            return False
        checkpoint, state = resume_point(run, betons, settings, method)
        budget = _budget(settings, state.samples_seen)
        if budget.first_step >= budget.steps:
            if world.is_first:
                print(f"{run} is finished: {state.samples_seen:,} samples seen")
            return True
        train_state = method.build(settings, betons, world)
        if checkpoint:
            load_checkpoint(checkpoint, train_state, state)
        costs = method.costs(settings, betons)
        if world.is_first:
            dump_yaml(run / "config.yaml", pipeline, leave_out={"recipes": True})
            write_json(run / "data.json", data_facts(betons) | method.facts)
            announce(run, settings, costs, train_state.model, in_words(betons, budget.steps * settings.batch_size), budget, world)
        return _train(betons, run, pipeline, method, train_state, state, budget, costs, world, stopping)


def _train(
    betons: BetonSet, run: Path, pipeline: Pipeline, method: Method, train_state: TrainState, state: State, budget: Budget, costs: Costs,
    world: World, stopping: Callable[[], bool],
) -> bool:  # fmt: skip
    settings, number = pipeline.train, state.number
    metrics = _metrics(run, pipeline, state, budget, costs, world)
    loader = make_loader(betons, settings, budget.first_step, budget.steps, world)

    with CheckpointWriter(run, settings.checkpoint.keep, settings.checkpoint.keep_every) as writer:

        def save(finished: int) -> None:
            nonlocal number
            if metrics.skipped_in_a_row and finished < budget.steps:
                return  # these weights may be what made the numbers infinite: the checkpoint before is worth more
            number += 1
            tensors = snapshot(train_state, world.is_first)
            counts = {"skipped_steps": metrics.skipped, "skipped_in_a_row": metrics.skipped_in_a_row}
            scale = train_state.scale.state() if train_state.scale else None
            now = {"samples_seen": finished * settings.batch_size, "number": number, "loss_scale": scale, **counts}
            if world.is_first:
                writer.save(tensors, state.model_copy(update=now))

        try:
            with loader:
                images = ImageInput(settings.data, world.device, image_size=settings.model.image_size, seed=settings.runtime.seed)
                return run_loop(loader, method.inputs(images, betons), train_state, settings, budget, world, metrics, save, stopping)
        finally:
            metrics.close()


def synthetic_run(run: Path, pipeline: Pipeline, vocabulary: int, label_limit: int) -> bool:
    """`train run --synthetic`: the whole budget on random images that lie on the device; metrics in `run`, no checkpoint.

    Returns:
        True when the budget is spent, False when a signal stopped it.
    """
    settings = pipeline.train
    with distributed_world(settings.runtime) as world, stop_signals() as stopping:
        check_shares(settings, world.size)
        train_state = make_train_state(settings, torch.ones(vocabulary), world)
        budget, costs = _budget(settings, 0), model_costs(settings.model, vocabulary)
        state = State(samples_seen=0, number=0, labels="", idf="", betons="", options="", vocabulary=vocabulary)
        if world.is_first:
            make_folder(run)
            announce(run, settings, costs, train_state.model, f"random images, {vocabulary:,} classes", budget, world)
        metrics = _metrics(run, pipeline, state, budget, costs, world)
        try:
            batches = synthetic_batches(settings, vocabulary, label_limit, world, budget.steps)
            return run_loop(batches, synthetic_inputs, train_state, settings, budget, world, metrics, lambda _: None, stopping)
        finally:
            metrics.close()


def classification() -> Method:
    """SuperClass: the tokens of a caption are the labels of its image."""
    return Method(
        SUPERCLASS,
        "train run",
        "label_ids",
        build=lambda settings, betons, world: make_train_state(settings, torch.from_numpy(betons.idf), world),
        costs=lambda settings, betons: model_costs(settings.model, betons.vocabulary),
    )


def make_train_state(settings: Train, idf: torch.Tensor, world: World) -> TrainState:
    """Trunk, head and loss with the weights of `runtime.seed`, spread over the ranks, with what trains them.

    Args:
        settings: `train`.
        idf: float32 [V].
        world: this process among all.
    """
    torch.manual_seed(settings.runtime.seed)
    model = Classifier(build_trunk(settings.model), HeadLoss(settings.loss, idf)).to(world.device)
    set_up_trunk(model.trunk, settings.model)
    linear: nn.Linear = model.head[1]  # type: ignore[assignment]
    split = splits_vocabulary(linear.out_features, linear.in_features, settings, world.size, world.device)
    ddp_model = spread(model, settings.runtime.parallel, world, split=linear if split else None)
    return as_train_state(model, ddp_model, settings, world)


def as_train_state(model: nn.Module, ddp_model: nn.Module, settings: Train, world: World) -> TrainState:
    """A model with what trains it: optimiser, loss scale and average, as the settings have it.

    Args:
        model: on its device, split by FSDP if it is to be.
        ddp_model: what `spread` made of it.
        settings: `train`.
        world: this process among all.
    """
    scaled = autocast_dtype(settings.runtime.precision, world.device) == torch.float16
    decay = settings.optimizer.ema_decay
    return TrainState(
        model, ddp_model, make_optimizer(model, settings.optimizer),
        scale=LossScale(world.device) if scaled else None, ema=Ema(model, decay) if decay else None,
    )  # fmt: skip


def _metrics(run: Path, pipeline: Pipeline, state: State, budget: Budget, costs: Costs, world: World) -> Metrics:
    settings, first = pipeline.train, budget.first_step
    trackers = make_trackers(run, settings.log, first, pipeline.model_dump(exclude={"recipes"})) if world.is_first else []
    return Metrics(
        run, world, settings, steps=budget.steps, first_step=first, skipped=(state.skipped_steps, state.skipped_in_a_row),
        speed=Speed(costs.flops, peak_flops(settings, world.device)), trackers=trackers,
    )  # fmt: skip


def _budget(settings: Train, seen: int) -> Budget:
    warmup = round(settings.optimizer.warmup_samples / settings.batch_size)
    return Budget(settings.samples // settings.batch_size, warmup, seen // settings.batch_size)


def check_shares(settings: Train, ranks: int) -> None:
    """Refuse a batch that the ranks, and the parts that each takes one after another, cannot share out evenly."""
    parts = ranks * settings.runtime.accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"train.batch_size is {settings.batch_size}, the number of ranks {ranks}, train.runtime.accumulation "
            f"{settings.runtime.accumulation}",
            allowed=f"a multiple of {parts}",
        )
