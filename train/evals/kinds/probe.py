"""`train probe`: a linear classifier on frozen features, by one of two recipes."""

from collections.abc import Sequence
from typing import Any

from labels.config import own_section
from labels.errors import UserError
from labels.settings import Pipeline
from train.encoders.encoder import Encoder
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.protocol import Score
from train.evals.protocols.lbfgs_probe import PROTOCOL, Probe, linear_probe, stratified_split
from train.evals.protocols.mae_probe import augmented_epochs, cached_epochs, mae_probe


class LinearProbe:
    """See `Evaluation`."""

    name, takes = "probe", "classes"

    def settings(self, pipeline: Pipeline) -> Probe:
        return own_section(pipeline, self.name, Probe)

    def describe(self, settings: Probe) -> str:
        if settings.recipe == "lbfgs":
            return PROTOCOL
        features = "random resized crops and flips" if settings.mae.augment else "cached features of the central crop, no augmentation"
        return f"MAE's linear probe: LARS, BatchNorm head, {settings.mae.epochs} epochs, {features}"

    def check(self, data: DataSet, settings: Probe) -> None:
        if settings.recipe == "lbfgs" and len(data.train) == len(set(data.train.targets.tolist())):
            raise UserError("no class of the training part has two samples", allowed="two or more, one of them to validate on")

    def unfit(self, encoder: Encoder) -> str | None:
        return None

    def scores(self, encoder: Encoder, data: DataSet, settings: Probe, extract: Extractor, seeds: Sequence[int]) -> list[Score]:
        if settings.recipe == "mae":
            return [self._mae(encoder, data, settings, extract, seed) for seed in seeds]
        train_x, test_x = extract(encoder, data.train), extract(encoder, data.test)
        found = linear_probe(
            train_x, data.train.targets, test_x, data.test.targets,
            classes=len(data.classes), settings=settings, seeds=seeds, device=extract.device,
        )  # fmt: skip
        validation = [stratified_split(data.train.targets, settings.validation_fraction, seed)[1] for seed in seeds]
        return [Score("probe", one.pop("seed"), _metrics(one), one, rows) for one, rows in zip(found, validation, strict=True)]

    def _mae(self, encoder: Encoder, data: DataSet, settings: Probe, extract: Extractor, seed: int) -> Score:
        test_x = extract(encoder, data.test)
        if settings.mae.augment:
            epochs = augmented_epochs(encoder, data.train, extract, seed)
        else:
            epochs = cached_epochs(extract(encoder, data.train), extract.device)
        found = mae_probe(
            epochs, data.train.targets, test_x, data.test.targets,
            classes=len(data.classes), settings=settings.mae, seed=seed, device=extract.device,
        )  # fmt: skip
        return Score("probe, MAE's recipe" if settings.mae.augment else "probe, MAE's head", seed, _metrics(found), found)


EVALUATION = LinearProbe()


def _metrics(found: dict[str, Any]) -> dict[str, float | None]:
    """Take the accuracies out of what a recipe gives; the rest is detail."""
    return {name: found.pop(name) for name in ("top1", "top5")}
