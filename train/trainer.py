"""Every training run from top to bottom: data, resume point, model, costs, metrics, checkpoints, the loop, the end.

    train run, clip, lit            label dataset   -> train_run     -+
    train run --synthetic           random images   -> synthetic_run -+-> Trainer -> run_loop -> run folder
    train finetune, caption, llava  model, batches  -> train_model   -+

The run folder holds config.yaml, data.json, metrics.jsonl and checkpoints. It is resumed only if the fingerprints of
everything that determines the result are the same.
"""

import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labels.arrays import Column
from labels.config import dump_yaml
from labels.settings import Optimizer, Pipeline, Train
from labels.show.terminal import count
from labels.storage import UserError, fingerprint, local_path, make_folder, write_json
from train.checkpoint import (
    CheckpointWriter,
    State,
    checkpoint_folders,
    first_state,
    is_finite,
    kept_settings,
    load_checkpoint,
    recorded,
    resume_point,
    resume_point_of_model,
    snapshot,
)
from train.costs.flops import Costs, messages, model_costs, peak_flops, splits_vocabulary
from train.costs.memory import out_of_memory
from train.data.dataset import BetonSet
from train.data.inputs import ImageInput, synthetic_batches, synthetic_inputs
from train.data.open import Chosen, data_facts, make_loader, open_data
from train.distributed import World, distributed_world, only_run, spread
from train.held_out import BetweenSteps, hold_out
from train.loop import Budget, Inputs, TrainState, run_loop, stop_signals
from train.losses.head import HeadLoss
from train.losses.kinds import check_accumulation
from train.metrics import STABLE, Metrics, Speed, make_trackers
from train.model import Classifier, build_trunk, check_single_images, set_up_trunk
from train.optim import Ema, LossScale, autocast_dtype, by_decay, make_optimizer, muon_matrices

SUPERCLASS = "superclass"
Batches = Callable[[int, int], Iterable[Any]]
"""First step, number of all steps -> this rank's share of each batch, see run_loop."""
MakeOptimizer = Callable[[nn.Module, Optimizer], torch.optim.Optimizer]
"""A model after `spread`, the optimizer's section -> the optimizer; every trained parameter is in one of its groups."""


@dataclass(frozen=True)
class Method:
    """A way of pre-training: everything in which `train run`, `train clip` and `train lit` differ."""

    name: str  # in state.json and data.json
    command: str  # for messages
    column: Column  # of the label files, what the loader's rows hold
    build: Callable[[Train, BetonSet, World], TrainState]
    costs: Callable[[Train, BetonSet], Costs]
    inputs: Callable[[ImageInput, BetonSet], Inputs] = lambda images, _: images  # makes the model's two arguments
    kept: dict[str, Any] = field(default_factory=dict)  # must not change on resume, besides `train`; JSON values
    facts: dict[str, Any] = field(default_factory=dict)  # for data.json


def classification(
    init: dict[str, Any] | None = None, initialise: Callable[[BetonSet, Classifier], None] | None = None
) -> Method:
    """SuperClass: the tokens of a caption are the labels of its image.

    `initialise` changes the initial weights, `init` describes them: for data.json, with a `fingerprint` and `head`.
    """

    def build(settings: Train, betons: BetonSet, world: World) -> TrainState:
        change = partial(initialise, betons) if initialise else None
        return make_train_state(settings, torch.from_numpy(betons.weights), world, change)

    kept = {"init": {key: init[key] for key in ("fingerprint", "head")}} if init else {}
    return Method(
        SUPERCLASS,
        "train run",
        "label_ids",
        build,
        costs=lambda settings, betons: model_costs(settings.model, betons.vocabulary),
        kept=kept,
        facts={"kept": kept, "init": init} if init else {},
    )


def train_run(
    data: Path | Chosen,
    run: Path,
    pipeline: Pipeline,
    labels: Path | None = None,
    method: Method | None = None,
    branch: Path | None = None,
) -> bool:
    """Pre-train in the folder `run`, or resume it; returns False if a signal stopped the run, after saving it.

    `data` is an output folder of build-labels, or what open_data opens; `labels` is such a folder with the same rows,
    whose labels and IDF are used instead. `method` is classification of captions by default. `branch`: a checkpoint of
    another run, which a run without any goes on from. Whatever does not fit is a UserError, before anything expensive
    starts.
    """
    settings, method = pipeline.train, method or classification()
    with distributed_world(settings.runtime) as world, stop_signals() as stopping, ExitStack() as stack:
        # -- the data
        check_batch_divides(settings, world.size)
        chosen = data if isinstance(data, Chosen) else Chosen([str(data)], [labels] if labels else [])
        opened = _open_sets(chosen, settings, method, world, stopping)
        if opened is None:
            return False
        betons, held = opened

        # -- the resume point
        stack.enter_context(only_run(run, world))
        checkpoint, state = resume_point(
            run, betons, settings, name=method.name, command=method.command, kept=method.kept, branch=branch
        )
        trainer = Trainer(run, settings, checkpoint, state, world, stopping)
        if trainer.finished:
            if world.is_first:
                print(f"{run} is finished: {count(state.samples_seen, 'sample')} seen")
            return True

        # -- model, optimizer, loss scale, average
        train_state = method.build(settings, betons, world)
        trainer.load(train_state)
        between = BetweenSteps(run, betons, held, settings, world) if held else None

        # -- what the run is: costs, configuration, data
        costs = method.costs(settings, betons)
        if world.is_first:
            if state.options == fingerprint(
                kept_settings(settings, method.kept)
            ):  # else it has those of an older version
                dump_yaml(run / "config.yaml", pipeline, exclude={"recipes": True})
                write_json(run / "data.json", data_facts(betons) | recorded(run, "branch") | method.facts)
                if branch and not checkpoint_folders(run):  # the curve from the first step on
                    shutil.copyfile(branch.parent.parent / "metrics.jsonl", run / "metrics.jsonl")
            epochs = trainer.budget.steps * settings.batch_size / betons.samples
            line = (
                f"{count(betons.samples, 'sample')} in {count(len(betons.paths), 'beton')}, "
                f"labels of {betons.labels_out} ({betons.labels.tokenizer.name}, {betons.vocabulary:,} classes), "
                f"{epochs:.2f} epochs"
            )
            trainer.log_start(train_state.model, costs, line)

        # -- metrics, checkpoints, the loop
        def batches(first_step: int, steps: int) -> Iterable[Any]:
            return make_loader(betons, settings, first_step, steps, world)

        size, seed = settings.model.image_size, settings.runtime.seed
        images = ImageInput(settings.data, world.device, image_size=size, seed=seed)
        shown = pipeline.model_dump(exclude={"recipes"})
        return trainer.train(train_state, batches, method.inputs(images, betons), shown, costs, between=between)


def _open_sets(
    chosen: Chosen, settings: Train, method: Method, world: World, stopping: Callable[[], bool]
) -> tuple[BetonSet, BetonSet | None] | None:
    """The training set with its label weights, and the held-out set if there is one; None if it was stopped."""
    own = settings.validation.held_out is not None, settings.weights != "idf"
    if method.name != SUPERCLASS and any(own):
        key = "train.validation.held_out" if own[0] else "train.weights"
        raise UserError(
            f"{key} is set, but `{method.command}` has no classification head",
            allowed="`train run` alone has held-out samples and label weights",
            fix=f"omit {key}",
        )
    betons = open_data(chosen, settings.data, world, stopping, method.column)
    if betons is None:
        return None
    held = hold_out(betons, settings, world, stopping)
    if own[0] and held is None:
        return None
    if settings.weights not in ("idf", "visual"):
        betons.weigh(local_path(settings.weights), settings.visual.combination, settings.visual.floor)
    return betons, held


def synthetic_run(run: Path, pipeline: Pipeline, vocabulary: int, label_limit: int) -> bool:
    """`train run --synthetic`: the whole budget on random images made on the device, without checkpoints; returns False
    if a signal stopped it.
    """
    settings = pipeline.train
    with distributed_world(settings.runtime) as world, stop_signals() as stopping, only_run(run, world):
        check_batch_divides(settings, world.size)
        trainer = Trainer(run, settings, None, first_state("", vocabulary), world, stopping)
        train_state = make_train_state(settings, torch.ones(vocabulary), world)
        costs = model_costs(settings.model, vocabulary)
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

    `model` is on the device, and returns the mean loss of the two arguments that `inputs` makes. Frozen parts that are
    not children of the module (fields in a tuple, such as a captioner's decoder) are not in the checkpoints. `settings`
    give budget, optimizer, runtime, checkpoint and log. `identity` is the fingerprint of everything that determines the
    result; UserError if `run` has another one. Returns False if it was stopped, after saving.
    """
    check_batch_divides(settings, world.size, "the batch size")
    train_state = as_train_state(model, spread(model, settings.runtime.parallel, world), settings, world, optimizer)
    with only_run(run, world):
        checkpoint, state = resume_point_of_model(run, identity)
        trainer = Trainer(run, settings, checkpoint, state, world, stopping)
        trainer.load(train_state)
        return trainer.finished or trainer.train(train_state, batches, inputs, settings.model_dump())


class Trainer:
    """One run in one folder, from its resume point (`checkpoint` None: from the first step) to its end."""

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
        cooldown = settings.cooldown
        cooldown_steps = (cooldown[1] - cooldown[0]) // size if cooldown else None
        self.budget = Budget(settings.samples // size, warmup_steps, state.samples_seen // size, cooldown_steps)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.budget.first_step >= self.budget.steps

    def load(self, train_state: TrainState) -> None:
        """Load the resume point into `train_state`."""
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
        cooldown = "" if budget.cooldown_steps is None else f", the last {budget.cooldown_steps:,} a cooldown"
        resumed = f"; resumed at step {budget.first_step}" if budget.first_step else ""
        lines = [
            f"{self._run}: {settings.model.trunk}, {trunk} + {costs.head_name} {costs.head / 1e6:.1f}M parameters, "
            f"{costs.flops / 1e9:.1f} GFLOP a sample, {self._world.size} x {device.type} in {dtype}; "
            f"{data}, budget {budget.steps * settings.batch_size:,} samples = {count(budget.steps, 'step')}"
            f"{cooldown}{resumed}",
            f"weight decay {settings.optimizer.weight_decay:g} on {len(decayed)} tensors, none on {len(exempt)} single "
            f"vectors ({exempt_numbers:,} numbers: {kinds})",
        ]
        if settings.optimizer.name == "muon":
            matrices = muon_matrices(model).values()
            numbers = sum(matrix.numel() for matrix in matrices) / 1e6
            lines[-1] += f"; Muon on {len(matrices)} matrices ({numbers:.1f}M numbers), AdamW on all else"
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
        between: BetweenSteps | None = None,
    ) -> bool:
        """Run the loop from the resume point on, with metrics and checkpoints; returns False if it was stopped.

        `batches` gives iterators with `close`, such as generators, closed whatever ends the loop. `shown` is the
        configuration for trackers; `costs` of the model give MFU; `between` uses held-out samples.
        """
        settings, budget, world = self._settings, self.budget, self._world
        if world.is_first:
            make_folder(self._run)
        metrics = self._metrics(shown, costs)
        with CheckpointWriter(self._run, settings.checkpoint.keep, settings.checkpoint.keep_every) as writer:

            def save(finished: int) -> None:
                if not checkpoints or not self._worth_saving(train_state, finished, metrics):
                    return
                self._state = self._state.model_copy(
                    update={
                        "samples_seen": finished * settings.batch_size,
                        "number": self._state.number + 1,
                        "skipped_steps": metrics.skipped,
                        "skipped_in_a_row": metrics.skipped_in_a_row,
                        "cooldown": settings.cooldown,
                        "loss_scale": train_state.scale.state() if train_state.scale else None,
                    }
                )
                tensors = snapshot(train_state, world.is_first)
                if world.is_first:
                    writer.save(tensors, self._state)

            def after(finished: int) -> None:
                if between:
                    between.after(finished, train_state, metrics)

            try:
                if between:
                    between.resume(budget.first_step, train_state)
                with closing(iter(batches(budget.first_step, budget.steps))) as iterator:  # type: ignore[type-var]
                    return run_loop(
                        iterator, inputs, train_state, settings, budget, world, metrics, save, self._stopping, after
                    )
            except torch.OutOfMemoryError:
                raise out_of_memory(settings, costs, world.size, world.device) from None
            finally:
                metrics.close()

    def _worth_saving(self, train_state: TrainState, finished: int, metrics: Metrics) -> bool:
        """After a skipped step the weights may be what makes the loss infinite: a later checkpoint is awaited.

        UserError if none can come: a tensor is not finite, or the last steps of the run were all skipped.
        """
        skipped, infinite = metrics.skipped_in_a_row, self._world.any(not is_finite(train_state))[0]
        if infinite or (finished == self.budget.steps and (skipped > 1 or metrics.skipped == finished)):
            what = "weights or moments are not finite" if infinite else f"the last {skipped} steps were skipped"
            raise UserError(
                f"{self._run}: {what} at step {finished} of {self.budget.steps}; no checkpoint of it was written",
                allowed="finite weights, and steps with a finite loss and gradient at the end",
                fix=f"{STABLE}; with another --out, if {self._run} has checkpoints",
            )
        if skipped and finished < self.budget.steps:
            if self._world.is_first:
                print(f"no checkpoint at step {finished}: the last steps were skipped ({skipped})", flush=True)
            return False
        return True

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


def make_train_state(
    settings: Train, idf: torch.Tensor, world: World, initialise: Callable[[Classifier], None] | None = None
) -> TrainState:
    """Trunk, head and loss with the initial weights of `runtime.seed`, over all ranks; `idf` float32 [V].

    `initialise` may change these weights.
    """
    torch.manual_seed(settings.runtime.seed)
    model = Classifier(build_trunk(settings.model), HeadLoss(settings.loss, idf))
    if initialise is not None:
        initialise(model)
    model = model.to(world.device)
    set_up_trunk(model.trunk, settings.model)
    linear: nn.Linear = model.head[1]  # type: ignore[assignment]
    split = splits_vocabulary(linear.out_features, linear.in_features, settings, world.size, world.device)
    ddp_model = spread(model, settings.runtime.parallel, world, split=linear if split else None)
    return as_train_state(model, ddp_model, settings, world)


def as_train_state(
    model: nn.Module, ddp_model: nn.Module, settings: Train, world: World, optimizer: MakeOptimizer = make_optimizer
) -> TrainState:
    """A model, with `ddp_model` from `spread`, and its optimizer, loss scale and average."""
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
    """Refuse a batch that the ranks, and the accumulated parts of each, cannot share evenly."""
    check_accumulation(settings)
    accumulation = settings.runtime.accumulation
    if settings.batch_size % (ranks * accumulation):
        raise UserError(
            f"{name} is {settings.batch_size}, the number of ranks {ranks}, train.runtime.accumulation {accumulation}",
            allowed=f"a multiple of {ranks * accumulation}",
        )
    if settings.batch_size == ranks * accumulation and name == "train.batch_size":
        check_single_images(settings.model)
