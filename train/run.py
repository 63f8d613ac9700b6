"""`train run`: pre-training by classification, put together from betons, model, loss and the loop.

OUT (betons), OUT or OTHER_OUT (labels, idf) -> BetonSet -> Loader -> ImageInput -> loop (Classifier, AdamW) -> RUN (metrics, checkpoints)
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from labels.config import dump_yaml, load_pipeline
from labels.errors import UserError
from labels.files import fingerprint, write_json
from labels.settings import Pipeline, Train
from train.betons import BetonSet
from train.checkpoint import checkpoint_folders, load_checkpoint, read_state, save_checkpoint
from train.data import Chosen, data_facts, make_loader, open_data
from train.distributed import World, world
from train.images import ImageInput
from train.loop import Budget, run_loop
from train.losses.head_loss import HeadLoss
from train.metrics import Metrics
from train.model import Classifier, build_trunk
from train.optim import make_optimizer

STOPPED_EXIT_CODE = 75
"""A run that was asked to stop, saved and left: start it again to go on (EX_TEMPFAIL of sysexits.h)."""

# What may differ between the parts of one run: nothing of it changes what is computed.
_FREE = {
    "runtime": {"device", "threads"},
    "data": {"threads", "prefetch", "verify", "cache", "cache_size"},
    "checkpoint": {"every_samples", "keep"},
    "log": {"every_seconds", "tensorboard"},
}


def train_run(data: Path | Chosen, run: Path, pipeline: Pipeline, labels: Path | None = None) -> bool:
    """Train, or go on with, the run in `run`.

    Args:
        data: OUT of a build, or what train/data.py opens.
        run: folder of the run; its checkpoints are resumed from.
        pipeline: resolved configuration.
        labels: OUT of a build over the same rows, whose labels and IDF are taken instead of the betons' own.

    Returns:
        True when the budget is spent, False when the run was stopped by a signal and saved.

    Raises:
        UserError: whatever does not fit, before anything expensive begins.
    """
    settings = pipeline.train
    with world(settings.runtime) as here, _stop_signals() as stopping:
        chosen = data if isinstance(data, Chosen) else Chosen([str(data)], [labels] if labels else [])
        betons = open_data(chosen, settings.data, here, stopping)
        if betons is None:
            return False
        if settings.batch_size % here.size:
            raise UserError(
                f"train.batch_size is {settings.batch_size}, the number of ranks {here.size}", allowed="a multiple of the number of ranks"
            )
        steps = settings.samples // settings.batch_size
        seen = _resume_point(run, betons, settings)
        first_step = seen // settings.batch_size
        if first_step >= steps:
            if here.is_first:
                print(f"{run} is finished: {seen:,} samples seen")
            return True
        torch.manual_seed(settings.runtime.seed)
        model = Classifier(build_trunk(settings.model), HeadLoss(settings.loss, torch.from_numpy(betons.idf))).to(here.device)
        optimizer = make_optimizer(model, settings.optimizer)
        if first_step:
            load_checkpoint(checkpoint_folders(run)[-1], model, optimizer)
        if here.is_first:
            dump_yaml(run / "config.yaml", pipeline)
            write_json(run / "data.json", data_facts(betons))
            _announce(run, betons, model, settings, steps, first_step, here)
        return _train(betons, run, settings, model, optimizer, Budget(steps, _warmup_steps(settings), first_step), here, stopping)


def _train(
    betons: BetonSet, run: Path, settings: Train, model: Classifier, optimizer: torch.optim.Optimizer, budget: Budget, here: World,
    stopping: Any,
) -> bool:  # fmt: skip
    wrapped = DistributedDataParallel(model) if here.size > 1 else model
    state = betons.identity | {"vocabulary": betons.vocabulary, "options": _options(settings)}

    def save(finished: int) -> None:
        if here.is_first:
            save_checkpoint(run, model, optimizer, state | {"samples_seen": finished * settings.batch_size}, settings.checkpoint.keep)

    metrics = Metrics(
        run, here, steps=budget.steps, batch_size=settings.batch_size, first_step=budget.first_step, tensorboard=settings.log.tensorboard
    )
    loader = make_loader(betons, settings, budget.first_step, budget.steps, here)
    inputs = ImageInput(settings.data, here.device, image_size=settings.model.image_size, seed=settings.runtime.seed)
    try:
        with loader:
            return run_loop(loader, inputs, wrapped, optimizer, settings, budget, here, metrics, save, stopping)
    finally:
        metrics.close()


def _warmup_steps(settings: Train) -> int:
    return round(settings.optimizer.warmup_samples / settings.batch_size)


def _options(settings: Train) -> str:
    return fingerprint(settings.model_dump(exclude=_FREE))


def _resume_point(run: Path, betons: BetonSet, settings: Train) -> int:
    """Samples seen by the newest checkpoint of `run`, 0 if there is none; refuses to mix configurations or data."""
    folders = checkpoint_folders(run)
    if not folders:
        return 0
    state = read_state(folders[-1])
    told = {
        "labels": ("with other labels: fingerprint", betons.labels_out),
        "idf": ("with another IDF table: SHA-256", betons.labels_out),
        "betons": ("on other betons: fingerprint", betons.out),
    }
    for name, value in betons.identity.items():
        before = state.get(name, state["labels"])  # a run of the time before --labels has no `betons`: its labels were theirs
        if before != value:
            what, where = told[name]
            raise UserError(
                f"{run} was trained {what} {before[:16]}, {where} has {value[:16]}",
                mend="give the --beton and --labels that the run was begun with, or another --out",
            )
    if state["options"] != _options(settings):
        before = load_pipeline(run / "config.yaml").train
        raise UserError(
            f"{run} was begun with another configuration: {'; '.join(_differences(before, settings))}",
            allowed="the configuration it was begun with",
            mend=f"take --config {run / 'config.yaml'}, or another --out",
        )
    return int(state["samples_seen"])


def _differences(before: Train, now: Train) -> list[str]:
    old, new = (yaml.safe_dump(part.model_dump(exclude=_FREE), default_flow_style=None) for part in (before, now))
    return [
        f"was `{was.strip()}`, is now `{is_now.strip()}`"
        for was, is_now in zip(old.splitlines(), new.splitlines(), strict=False)
        if was != is_now
    ]


def _announce(run: Path, betons: BetonSet, model: Classifier, settings: Train, steps: int, first_step: int, here: World) -> None:
    trunk = sum(parameter.numel() for parameter in model.trunk.parameters())
    head = sum(parameter.numel() for parameter in model.head.parameters())
    print(
        f"{run}: {settings.model.trunk}, {trunk / 1e6:.1f}M + head {head / 1e6:.1f}M parameters, {here.size} x {here.device.type}; "
        f"{betons.samples:,} samples in {len(betons.paths)} betons, labels of {betons.labels_out} ({betons.labels.tokenizer.name}, "
        f"{betons.vocabulary:,} classes), budget {steps * settings.batch_size:,} samples = {steps} steps "
        f"= {steps * settings.batch_size / betons.samples:.2f} epochs" + (f"; resumed at step {first_step}" if first_step else ""),
        flush=True,
    )


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """Yield a function that says whether SIGTERM has come; the old handler is put back at the end."""
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)
