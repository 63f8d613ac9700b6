"""Training from top to bottom: data, resume point, model, costs, metrics, checkpoints, the loop, the end.

    train run, clip, lit            OUT             -> train_run     -+
    train run --synthetic           random images   -> synthetic_run -+-> Trainer -> run_loop -> RUN (metrics, checkpoints)
    train finetune, caption, llava  model, batches  -> train_model   -+

B batch (of all ranks), V vocabulary.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from labels.arrays import Column
from labels.config import dump_yaml, load_pipeline
from labels.settings import MACHINE, MAY_CHANGE, Optimizer, Pipeline, Train, marked_keys
from labels.storage import UserError, fingerprint, make_folder, write_json
from train.checkpoint import CheckpointWriter, State, checkpoint_folders, load_checkpoint, read_state, snapshot
from train.costs import Costs, messages, model_costs, peak_flops, splits_vocabulary
from train.data.dataset import BetonSet
from train.data.inputs import ImageInput, synthetic_batches, synthetic_inputs
from train.data.open import Chosen, data_facts, make_loader, open_data
from train.distributed import World, distributed_world, spread
from train.loop import Budget, Inputs, TrainState, run_loop, stop_signals
from train.losses.head import HeadLoss
from train.losses.kinds import check_accumulation
from train.metrics import Metrics, Speed, make_trackers
from train.model import Classifier, build_trunk, set_up_trunk
from train.optim import Ema, LossScale, autocast_dtype, by_decay, make_optimizer

SUPERCLASS = "superclass"
Batches = Callable[[int, int], Iterable[Any]]
"""First step, number of all steps -> this rank's share of each batch, see run_loop."""
MakeOptimizer = Callable[[nn.Module, Optimizer], torch.optim.Optimizer]
"""A model after `spread`, the optimizer's section -> the optimizer; every trained parameter is in one of its groups."""


@dataclass(frozen=True)
class Method:
    """One way of pre-training: all in which `train run`, `train clip` and `train lit` differ.

    Attributes:
        name: as state.json and data.json keep it.
        command: of `train`, for messages.
        column: what the loader's rows hold.
        build: model, optimizer, loss scale and average, for the settings and the data, on a rank.
        costs: of that model.
        inputs: makes the model's arguments from a batch; the images' part is given.
        kept: what has to stay the same from the first to the last step, apart from the section `train`; JSON values.
        facts: for data.json.
    """

    name: str
    command: str
    column: Column
    build: Callable[[Train, BetonSet, World], TrainState]
    costs: Callable[[Train, BetonSet], Costs]
    inputs: Callable[[ImageInput, BetonSet], Inputs] = lambda images, _: images
    kept: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def classification() -> Method:
    """SuperClass: the tokens of a caption are the labels of its image."""
    return Method(
        SUPERCLASS,
        "train run",
        "label_ids",
        build=lambda settings, betons, world: make_train_state(settings, torch.from_numpy(betons.idf), world),
        costs=lambda settings, betons: model_costs(settings.model, betons.vocabulary),
    )


def train_run(
    data: Path | Chosen, run: Path, pipeline: Pipeline, labels: Path | None = None, method: Method | None = None
) -> bool:
    """Pre-train in the folder `run`, or resume what it holds.

    Args:
        data: OUT of a build, or what open_data opens.
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
        # -- the data
        check_batch_divides(settings, world.size)
        chosen = data if isinstance(data, Chosen) else Chosen([str(data)], [labels] if labels else [])
        betons = open_data(chosen, settings.data, world, stopping, method.column)
        if betons is None:
            return False

        # -- the resume point
        checkpoint, state = resume_point(run, betons, settings, method)
        trainer = Trainer(run, settings, checkpoint, state, world, stopping)
        if trainer.finished:
            if world.is_first:
                print(f"{run} is finished: {state.samples_seen:,} samples seen")
            return True

        # -- model, optimizer, loss scale, average
        train_state = method.build(settings, betons, world)
        trainer.load(train_state)

        # -- what the run is: costs, configuration, data
        costs = method.costs(settings, betons)
        if world.is_first:
            dump_yaml(run / "config.yaml", pipeline, exclude={"recipes": True})
            write_json(run / "data.json", data_facts(betons) | method.facts)
            trainer.log_start(train_state.model, costs, _data_line(betons, trainer.budget.steps * settings.batch_size))

        # -- metrics, checkpoints, the loop
        def batches(first_step: int, steps: int) -> Iterable[Any]:
            return make_loader(betons, settings, first_step, steps, world)

        images = ImageInput(
            settings.data, world.device, image_size=settings.model.image_size, seed=settings.runtime.seed
        )
        shown = pipeline.model_dump(exclude={"recipes"})
        return trainer.train(train_state, batches, method.inputs(images, betons), shown, costs)


def synthetic_run(run: Path, pipeline: Pipeline, vocabulary: int, label_limit: int) -> bool:
    """`train run --synthetic`: the whole budget on random images that are made on the device; no checkpoint is read or
    written.

    Returns:
        True when the budget is spent, False when a signal stopped it.
    """
    settings = pipeline.train
    with distributed_world(settings.runtime) as world, stop_signals() as stopping:
        check_batch_divides(settings, world.size)
        state = State(samples_seen=0, number=0, labels="", idf="", betons="", options="", vocabulary=vocabulary)
        trainer = Trainer(run, settings, None, state, world, stopping)
        train_state, costs = (
            make_train_state(settings, torch.ones(vocabulary), world),
            model_costs(settings.model, vocabulary),
        )
        if world.is_first:
            trainer.log_start(train_state.model, costs, f"random images, {vocabulary:,} classes")

        def batches(first_step: int, steps: int) -> Iterable[Any]:
            return synthetic_batches(settings, vocabulary, label_limit, world, steps - first_step)

        shown = pipeline.model_dump(exclude={"recipes"})
        return trainer.train(train_state, batches, synthetic_inputs, shown, costs, checkpoints=False)


def train_model(
    model: nn.Module,
    batches: Batches,
    inputs: Inputs,
    settings: Train,
    run: Path,
    identity: str,
    world: World,
    stopping: Callable[[], bool],
    optimizer: MakeOptimizer = make_optimizer,
) -> bool:
    """Train a model on any batches, or resume it from `run`; afterwards it has the weights of the newest checkpoint.

    Parts of it that are frozen and no children of the module (fields in a tuple) are not in the checkpoints.

    Args:
        model: on the device; two arguments as `inputs` makes them -> the mean loss.
        settings: budget, optimizer, runtime, checkpoint and log; its model, data and loss are not looked at.
        run: folder of metrics.jsonl and checkpoints.
        identity: fingerprint of all that decides the result; a run with another one is not resumed.
        stopping: asked after every step.
        optimizer: makes it.

    Returns:
        True when the budget is spent, False when it was stopped and saved.

    Raises:
        UserError: `run` was begun with something else, or the batch cannot be shared evenly.
    """
    check_batch_divides(settings, world.size, "the batch size")
    train_state = as_train_state(model, spread(model, settings.runtime.parallel, world), settings, world, optimizer)
    checkpoint, state = _resume_point_of_model(run, identity)
    trainer = Trainer(run, settings, checkpoint, state, world, stopping)
    trainer.load(train_state)
    return trainer.finished or trainer.train(train_state, batches, inputs, settings.model_dump())


class Trainer:
    """One run in one folder, from its resume point to its end.

    Args:
        run: the folder.
        settings: `train`.
        checkpoint, state: the resume point; None and the state before the first step.
        world: this process among all.
        stopping: asked after every step; True saves and leaves.

    Attributes:
        budget: steps.
    """

    def __init__(
        self,
        run: Path,
        settings: Train,
        checkpoint: Path | None,
        state: State,
        world: World,
        stopping: Callable[[], bool],
    ) -> None:
        self._run, self._settings, self._world, self._stopping = run, settings, world, stopping
        self._checkpoint, self._state = checkpoint, state
        size = settings.batch_size
        warmup_steps = round(settings.optimizer.warmup_samples / size)
        self.budget = Budget(settings.samples // size, warmup_steps, state.samples_seen // size)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.budget.first_step >= self.budget.steps

    def load(self, train_state: TrainState) -> None:
        """Put the weights and all else of the resume point into `train_state`."""
        if self._checkpoint:
            load_checkpoint(self._checkpoint, train_state, self._state)

    def log_start(self, model: nn.Module, costs: Costs, data: str) -> None:
        """Print model, data, budget, weight-decay exemptions and messages between ranks."""
        settings, budget, device = self._settings, self.budget, self._world.device
        dtype = str(autocast_dtype(settings.runtime.precision, device) or "fp32").removeprefix("torch.")
        decayed, exempt = by_decay(model)
        exempt_numbers = sum(parameter.numel() for parameter in exempt.values())
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in exempt}))
        trunk = f"{costs.trunk / 1e6:.1f}M{' frozen' if costs.frozen else ''}"
        resumed = f"; resumed at step {budget.first_step}" if budget.first_step else ""
        lines = [
            f"{self._run}: {settings.model.trunk}, {trunk} + {costs.head_name} {costs.head / 1e6:.1f}M parameters, "
            f"{costs.flops / 1e9:.1f} GFLOP a sample, {self._world.size} x {device.type} in {dtype}; "
            f"{data}, budget {budget.steps * settings.batch_size:,} samples = {budget.steps} steps{resumed}",
            f"weight decay {settings.optimizer.weight_decay:g} on {len(decayed)} tensors, none on {len(exempt)} single "
            f"vectors ({exempt_numbers:,} numbers: {kinds})",
        ]
        if self._world.size > 1:
            lines.append(messages(costs, settings, self._world.size, device))
        print("\n".join(lines), flush=True)

    def train(
        self,
        train_state: TrainState,
        batches: Batches,
        inputs: Inputs,
        shown: dict[str, Any],
        costs: Costs | None = None,
        *,
        checkpoints: bool = True,
    ) -> bool:
        """Run the loop from the resume point on, with metrics and checkpoints.

        Args:
            batches: iterators with `close`, such as generators; closed whatever ends the loop.
            inputs: makes the model's two arguments from a batch.
            shown: the configuration, for trackers.
            costs: of the model, for MFU; None: there is none.
            checkpoints: whether any are written.

        Returns:
            True when the budget is spent, False when it was stopped and saved.
        """
        settings, budget, world = self._settings, self.budget, self._world
        if world.is_first:
            make_folder(self._run)
        metrics = self._metrics(shown, costs)
        keep, keep_every = settings.checkpoint.keep, settings.checkpoint.keep_every
        with CheckpointWriter(self._run, keep, keep_every) as writer:

            def save(finished: int) -> None:
                if not checkpoints or (metrics.skipped_in_a_row and finished < budget.steps):
                    return  # these weights may be what made the numbers infinite: the checkpoint before is worth more
                self._state = self._state.model_copy(
                    update={
                        "samples_seen": finished * settings.batch_size,
                        "number": self._state.number + 1,
                        "skipped_steps": metrics.skipped,
                        "skipped_in_a_row": metrics.skipped_in_a_row,
                        "loss_scale": train_state.scale.state() if train_state.scale else None,
                    }
                )
                tensors = snapshot(train_state, world.is_first)
                if world.is_first:
                    writer.save(tensors, self._state)

            try:
                with closing(iter(batches(budget.first_step, budget.steps))) as iterator:  # type: ignore[type-var]
                    return run_loop(
                        iterator, inputs, train_state, settings, budget, world, metrics, save, self._stopping
                    )
            finally:
                metrics.close()

    def _metrics(self, shown: dict[str, Any], costs: Costs | None) -> Metrics:
        settings, first_step, world = self._settings, self.budget.first_step, self._world
        return Metrics(
            self._run,
            world,
            settings,
            steps=self.budget.steps,
            first_step=first_step,
            skipped=(self._state.skipped_steps, self._state.skipped_in_a_row),
            speed=Speed(costs.flops, peak_flops(settings, world.device)) if costs else Speed(0, None),
            trackers=make_trackers(self._run, settings.log, first_step, shown) if world.is_first else [],
        )


# -- what is trained


def make_train_state(settings: Train, idf: torch.Tensor, world: World) -> TrainState:
    """Trunk, head and loss with the weights of `runtime.seed`, over all ranks, with optimizer, loss scale and average.

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


def as_train_state(
    model: nn.Module, ddp_model: nn.Module, settings: Train, world: World, optimizer: MakeOptimizer = make_optimizer
) -> TrainState:
    """A model with its optimizer, loss scale and average, as the settings have it.

    Args:
        model: on its device, split by FSDP if it is to be.
        ddp_model: what `spread` made of it.
        settings: `train`.
        world: this process among all.
        optimizer: makes it.
    """
    scaled = autocast_dtype(settings.runtime.precision, world.device) == torch.float16
    decay = settings.optimizer.ema_decay
    return TrainState(
        model,
        ddp_model,
        optimizer(model, settings.optimizer),
        scale=LossScale(world.device) if scaled else None,
        ema=Ema(model, decay) if decay else None,
    )


def check_batch_divides(settings: Train, ranks: int, name: str = "train.batch_size") -> None:
    """Refuse a batch that cannot be shared evenly by the ranks, and by the parts that each takes one after another."""
    check_accumulation(settings)
    parts = ranks * settings.runtime.accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"{name} is {settings.batch_size}, the number of ranks {ranks}, train.runtime.accumulation {settings.runtime.accumulation}",
            allowed=f"a multiple of {parts}",
        )


def _data_line(betons: BetonSet, samples: int) -> str:
    return (
        f"{betons.samples:,} samples in {len(betons.paths)} betons, labels of {betons.labels_out} "
        f"({betons.labels.tokenizer.name}, {betons.vocabulary:,} classes), {samples / betons.samples:.2f} epochs"
    )


# -- where a run resumes


def resume_point(run: Path, betons: BetonSet, settings: Train, method: Method) -> tuple[Path | None, State]:
    """The newest checkpoint of `run` and its state; None and the state before the first step where there is none.

    Raises:
        UserError: the run was begun by another method, with other data or another configuration.
    """
    kept = _kept(settings, method.kept)
    start = {"samples_seen": 0, "number": 0, "options": fingerprint(kept), "vocabulary": betons.vocabulary}
    folders = checkpoint_folders(run)
    if not folders:
        return None, State.model_validate(start | {"method": method.name} | betons.identity)
    state = read_state(folders[-1])
    if state.method != method.name:
        raise UserError(
            f"{run} holds a run of the method {state.method}, not of `{method.command}`", fix="give another --out"
        )
    differs = {
        "labels": ("with other labels: fingerprint", betons.labels_out),
        "idf": ("with another IDF table: SHA-256", betons.labels_out),
        "betons": ("on other betons: fingerprint", betons.out),
    }
    for name, value in betons.identity.items():
        before = getattr(state, name)
        if before != value:
            what, where = differs[name]
            raise UserError(
                f"{run} was trained {what} {before[:16]}, {where} has {value[:16]}",
                fix="give the --beton and --labels that the run was begun with, or another --out",
            )
    if state.options != fingerprint(kept):
        facts = run / "data.json"
        kept_before = json.loads(facts.read_bytes()).get("kept", {}) if facts.is_file() else {}
        before = _kept(load_pipeline(run / "config.yaml").train, kept_before)
        raise UserError(
            f"{run} was begun with another configuration: {'; '.join(_differences(before, kept))}",
            allowed="the configuration it was begun with",
            fix=f"take --config {run / 'config.yaml'}, or another --out",
        )
    return folders[-1], state


def _resume_point_of_model(run: Path, identity: str) -> tuple[Path | None, State]:
    folders = checkpoint_folders(run)
    if not folders:
        return None, State(samples_seen=0, number=0, labels="", idf="", betons="", options=identity, vocabulary=0)
    state = read_state(folders[-1])
    if state.options != identity:
        raise UserError(
            f"{run} was begun with other data, weights or settings: fingerprint {state.options}, now {identity}",
            fix="give what it was begun with, or another --out",
        )
    return folders[-1], state


def _kept(settings: Train, kept: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same: of `train`, and what the method adds."""
    return settings.model_dump(exclude=marked_keys(Train, MAY_CHANGE, MACHINE)) | kept


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = (yaml.safe_dump(part, default_flow_style=None).splitlines() for part in (before, now))
    return [
        f"was `{was.strip()}`, is now `{is_now.strip()}`"
        for was, is_now in zip(old, new, strict=False)
        if was != is_now
    ]
