"""Held-out samples: the validation loss during a run, and the visual weights that a run gives itself.

    train.validation.held_out: a share, an output folder, uids or an SQL condition -> hold_out -> the held-out set
    held-out set -> HeldOut: central crops in batches -> the model in evaluation mode -> loss, or GainSums
    train.weights: visual -> after each share of the budget in train.visual.at: GainSums -> new weights of the loss

The validation loss always has IDF as its weights, so that runs with other weights can be compared. Visual weights are
a function of the model after a step: a resumed run has the same. They are kept in RUN/visual/samples-....parquet.
B batch, K label limit, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from labels.idf import Sums, calibrate, combined, read_visual, write_visual
from labels.manifest import Manifest
from labels.settings import Train
from labels.storage import Layout, UserError, is_url, local_copy, user_path
from train.data.dataset import BetonSet
from train.data.inputs import ImageInput, resamples
from train.data.loader import Batch, Loader
from train.data.mixture import check_agreement
from train.data.open import Chosen, loading_threads, open_data, subset_samples
from train.distributed import World, everyone, sum_over
from train.loop import TrainState
from train.losses.gains import GainSums
from train.losses.head import HeadLoss, positives
from train.losses.kinds import kind
from train.metrics import Metrics
from train.optim import autocast_dtype

_PREFETCH_BYTES = 1 << 28
_KEY = "train.validation.held_out"
_FORMS = "a share such as 0.01, an output folder, or what train.data.subset takes"


def hold_out(betons: BetonSet, settings: Train, world: World, stopping: Callable[[], bool]) -> BetonSet | None:
    """The held-out set of `train.validation.held_out`, which `betons` then lacks; None if there is none."""
    named = settings.validation.held_out
    if named is None:
        return None
    if not isinstance(named, str):
        return betons.hold_out(round(1 / named))
    if is_url(named) or user_path(named).is_dir():
        return open_other(named, betons, settings, world, stopping)
    samples, name = subset_samples(betons, named, settings.data.metadata, _KEY)
    return betons.hold_out_samples(samples, name)


def open_other(
    out: str, betons: BetonSet, settings: Train, world: World, stopping: Callable[[], bool]
) -> BetonSet | None:
    """The set of another output folder, with the same labels; UserError if it shares a shard with `betons`."""
    data = settings.data.model_copy(update={"subset": None})
    other = open_data(Chosen([out]), data, world, stopping)
    if other is not None:
        check_agreement([*betons.opened, *other.opened])
        check_apart([opened.manifest for opened in betons.opened], other.manifest, out)
    return other


def check_apart(trained: list[Manifest], other: Manifest, name: str) -> None:
    """UserError if a shard of `other` has the keys of one that was trained on."""
    seen = {part.keys_sha256 for manifest in trained for part in manifest.shards if part.rows}
    if shared := [part.name for part in other.shards if part.rows and part.keys_sha256 in seen]:
        raise UserError(
            f"{name} shares {len(shared)} of its {len(other.shards)} shards with the training set, first {shared[0]}",
            allowed="samples that are not trained on: memorised captions look visible",
            fix="give another output folder, or train with a share of the samples held out: train.validation.held_out",
        )


class HeldOut:
    """Passes of a Classifier over a held-out set, through `ddp_model` (train/distributed.py); all ranks together."""

    def __init__(self, betons: BetonSet, settings: Train, world: World) -> None:
        self._betons, self._settings, self._world = betons, settings, world
        plain = {"color_jitter_probability": 0.0, "grey_probability": 0.0, "flip": False}
        self._data = settings.data.model_copy(update=plain | {"prefetch": min(settings.data.prefetch, _PREFETCH_BYTES)})
        size, seed = settings.model.image_size, settings.runtime.seed
        self._inputs = ImageInput(self._data, world.device, image_size=size, seed=seed)
        self._idf = torch.from_numpy(betons.idf).to(world.device)
        self._best_constant: dict[int, float] = {}

    def loss(self, model: nn.Module, ddp_model: nn.Module, samples: int) -> dict[str, float]:
        """`validation_loss`, the mean over at most `samples` samples, and for a loss that is a distribution's
        `validation_gain`: nats below the loss of the best constant prediction, the entropy of the mean target.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        targets = None
        if samples not in self._best_constant and _is_distribution(self._settings):
            targets = torch.zeros(self._betons.vocabulary, dtype=torch.float64, device=self._world.device)
        with self._evaluating(model):
            for images, label_ids in self._batches(samples):
                total += self._forward(ddp_model, images, label_ids)
                count += 1
                if targets is not None:
                    labels = positives(label_ids, self._idf)
                    targets.index_add_(0, labels.ids[labels.valid], labels.shares[labels.valid].double())
        [loss] = self._world.total(total.item())
        loss /= count * self._world.size
        if targets is not None:
            share = sum_over(targets, everyone()) / sum_over(targets.sum(), everyone())
            self._best_constant[samples] = -torch.xlogy(share, share).sum().item()
        found = {"validation_loss": loss}
        if samples in self._best_constant:
            found["validation_gain"] = self._best_constant[samples] - loss
        return found

    def gains(self, model: nn.Module, ddp_model: nn.Module, samples: int) -> Sums:
        """The sums of log p over at most `samples` samples, of all ranks."""
        loss: HeadLoss = model.loss  # type: ignore[assignment]
        sums = GainSums(
            self._betons.vocabulary,
            self._world.device,
            distribution=_is_distribution(self._settings),
            memory=self._settings.loss.memory,
        )
        with self._evaluating(model), loss.observed(sums.add):
            for images, label_ids in self._batches(samples):
                self._forward(ddp_model, images, label_ids)
        return sums.of_all_ranks()

    def _forward(self, ddp_model: nn.Module, images: Tensor, label_ids: Tensor) -> Tensor:
        device = self._world.device
        dtype = autocast_dtype(self._settings.runtime.precision, device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return ddp_model(images, label_ids)

    def _batches(self, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        settings, ranks = self._settings, self._world.size
        samples = min(samples, self._betons.samples)
        largest = settings.batch_size // settings.runtime.accumulation
        batch = samples // -(-samples // largest) // ranks * ranks  # as many samples as whole batches can take
        if not batch:
            raise UserError(
                f"{self._betons.samples} samples are held out, the number of ranks is {ranks}",
                allowed=f"{ranks} or more",
                fix=f"hold out more samples: {_KEY}",
            )
        with Loader(
            self._betons,
            self._data,
            image_size=settings.model.image_size,
            batch_size=batch,
            seed=settings.runtime.seed,
            first_step=0,
            last_step=samples // batch,
            rank=self._world.rank,
            world=ranks,
            threads=loading_threads(settings.data),
            pinned=self._world.device.type == "cuda",
            device=resamples(settings.data, self._world.device),
            centre=True,
        ) as loader:
            one: Batch
            for one in loader:
                yield self._inputs(one)

    @contextmanager
    def _evaluating(self, model: nn.Module) -> Iterator[None]:
        """The model in evaluation mode, without gradients, and with IDF as the label weights."""
        loss: HeadLoss = model.loss  # type: ignore[assignment]
        weights = loss.idf.clone()
        model.eval()
        try:
            with torch.no_grad():
                loss.idf.copy_(self._idf)
                yield
                loss.idf.copy_(weights)
        finally:
            model.train()


def _is_distribution(settings: Train) -> bool:
    return getattr(kind(settings.loss.name), "DISTRIBUTION", False)


class VisualWeights:
    """The label weights of a run with `train.weights: visual`: IDF at first, then what the run itself has measured."""

    def __init__(self, run: Path, betons: BetonSet, held_out: HeldOut, settings: Train, world: World) -> None:
        self._run, self._betons, self._held_out = run, betons, held_out
        self._settings, self._world = settings, world
        steps = settings.samples // settings.batch_size
        self._tokens = read_tokens(betons)
        self._at = sorted({max(1, round(share * steps)) for share in settings.visual.at})

    def resume(self, finished: int, train_state: TrainState) -> None:
        """Take the weights in force after `finished` steps."""
        passed = [step for step in self._at if step <= finished]
        if not passed:
            return
        path = self._path(passed[-1])
        if path.is_file():
            table, _ = read_visual(path)
            self._take(table["visual_gain"].to_numpy(), train_state)
        elif passed[-1] == finished:  # stopped between this step and its measurement
            self.after(finished, train_state)
        else:
            raise UserError(f"{path} is missing", fix="put it back, or begin the run again in another folder")

    def after(self, finished: int, train_state: TrainState) -> dict[str, float]:
        """Measure, if it is due after `finished` steps, and take the new weights; returns figures for the log."""
        if finished not in self._at:
            return {}
        sums = self._held_out.gains(train_state.model, train_state.ddp_model, self._settings.visual.samples)
        gains = calibrate(sums, self._tokens["document_frequency"].to_numpy())
        if self._world.is_first:
            facts = facts_of(self._betons, finished * self._settings.batch_size)
            write_visual(self._path(finished), self._tokens, self._betons.idf, sums, gains, facts)
        self._take(gains.visual_gain, train_state)
        return {"visible_tokens": float((gains.visual_gain > 0).sum())}

    def _take(self, visual_gain: np.ndarray, train_state: TrainState) -> None:
        visual = self._settings.visual
        weights = combined(self._betons.idf, visual_gain, visual.combination, visual.floor)
        train_state.model.loss.idf.copy_(torch.from_numpy(weights))  # type: ignore[union-attr, operator]

    def _path(self, finished: int) -> Path:
        return self._run / "visual" / f"samples-{finished * self._settings.batch_size:012d}.parquet"


class BetweenSteps:
    """What a run does with its held-out samples after some of its steps."""

    def __init__(self, run: Path, betons: BetonSet, held: BetonSet, settings: Train, world: World) -> None:
        held_out = HeldOut(held, settings, world)
        self._held_out, self._settings = held_out, settings
        self._visual = VisualWeights(run, betons, held_out, settings, world) if settings.weights == "visual" else None
        self._steps = settings.samples // settings.batch_size
        self._every = max(1, settings.validation.every_samples // settings.batch_size)

    def resume(self, finished: int, train_state: TrainState) -> None:
        """Before the first step of a process: the run's own label weights."""
        if self._visual:
            self._visual.resume(finished, train_state)

    def after(self, finished: int, train_state: TrainState, metrics: Metrics) -> None:
        """After `finished` steps: validate, weigh, or nothing. All ranks call it."""
        found = {}
        if finished % self._every == 0 or finished == self._steps:
            found = self._held_out.loss(train_state.model, train_state.ddp_model, self._settings.validation.samples)
        if self._visual:
            found |= self._visual.after(finished, train_state)
        if found:
            metrics.flush()
            metrics.note(**found)


def read_tokens(betons: BetonSet) -> pa.Table:
    """idf.parquet of the labels."""
    with local_copy(Layout(betons.labels_out).idf_parquet) as file, pq.ParquetFile(file, pre_buffer=False) as opened:
        return opened.read(use_threads=False)


def facts_of(betons: BetonSet, samples_seen: int) -> dict[str, Any]:
    """What a visual.parquet remembers of its run."""
    tokenizer = betons.labels.tokenizer
    facts = {"tokenizer": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint}
    return facts | {"samples_seen": samples_seen, "trained_on": betons.identity["betons"]}
