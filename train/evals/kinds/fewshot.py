"""Ridge regression on a few training images per class (big_vision's 10-shot).

The formula of big_vision's evaluators/fewshot_lsr.py, in float64, by eigendecomposition:

    x <- (x - mean) / (std + 1e-5), mean and std of the shots;  x <- [x, 100];  y <- 2 onehot - 1
    w = (x'x + l2 I)^-1 x'y     where N >= D (primal)
      = x' (xx' + l2 I)^-1 y    where D > N  (dual);     the class is argmax x w

N shots in all, D = W + 1 feature width with the constant, C classes, M test samples.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from labels.settings import PositiveOnce, Section, Seeds
from labels.storage import UserError
from train.encoders.encoder import Encoder
from train.evals.data.images import shorten
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.protocol import Evaluation, Score


class Fewshot(Section):
    shots: PositiveOnce = [10]
    seeds: Seeds = [0, 1, 2]
    l2: Annotated[float, Field(gt=0)] = 1024.0


_BIAS_CONSTANT = 100.0
_TEST_ROWS = 8192


class FewShot(Evaluation):
    name, takes, section = "fewshot", "classes", Fewshot

    def describe(self, settings: Fewshot) -> str:
        return f"ridge regression on whitened shots, l2 {settings.l2:g} (big_vision's fewshot_lsr)"

    def check(self, data: DataSet, settings: Fewshot) -> None:
        counts, most = np.bincount(data.train.targets, minlength=len(data.classes)), max(settings.shots)
        few = [f"{data.classes[label]} ({counts[label]})" for label in np.flatnonzero(counts < most)]
        if few:
            raise UserError(
                f"{len(few)} of {len(data.classes)} classes have less than {most} training images: {shorten(few)}",
                allowed=f"shots up to {counts.min()}, the smallest class",
                fix=f"--set fewshot.shots=[{counts.min()}], or data with more images per class",
            )

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Fewshot, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        train_x, test_x = (torch.from_numpy(extract(encoder, part)) for part in (data.train, data.test))
        train_y, test_y = (torch.from_numpy(part.targets) for part in (data.train, data.test))
        device, classes = extract.device, len(data.classes)
        scores = []
        for shots in settings.shots:
            for seed in seeds:
                rows = draw_shots(data.train.targets, classes, shots, seed)
                ridge = fit_ridge(train_x[rows].to(device), train_y[rows].to(device), classes, settings.l2)
                parts = test_x.split(_TEST_ROWS)
                predicted = torch.cat([ridge.logits(part.to(device)).argmax(1).cpu() for part in parts])
                correct = (predicted == test_y).numpy()
                metrics = {"top1": float(correct.mean()), "top5": None}
                scores.append(Score(f"{shots}-shot", seed, metrics, split=rows, correct=correct))
        return scores


EVALUATION = FewShot()


def draw_shots(y: np.ndarray, classes: int, shots: int, seed: int) -> np.ndarray:
    """Rows of y [N], int64 [classes * shots], class by class: the first `shots` of a permutation of each class's rows.

    One generator serves all classes in the order of their numbers, so that fewer shots are the first of more.
    """
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(np.flatnonzero(y == label))[:shots] for label in range(classes)])


class Ridge(NamedTuple):
    weight: Tensor  # [D, C]
    mean: Tensor  # [1, W], of the shots
    deviation: Tensor  # [1, W]

    def logits(self, x: Tensor) -> Tensor:
        """Features [M, W] -> scores [M, C]."""
        return _with_constant((x.double() - self.mean) / self.deviation) @ self.weight


def fit_ridge(x: Tensor, y: Tensor, classes: int, l2: float) -> Ridge:
    """Fit shots x [N, W] with classes y [N] by the formula at the head of this file."""
    x = x.double()
    mean, deviation = x.mean(0, keepdim=True), x.std(0, correction=0, keepdim=True) + 1e-5
    design = _with_constant((x - mean) / deviation)  # [N, D]
    targets = 2 * functional.one_hot(y, classes).double() - 1
    if design.shape[0] >= design.shape[1]:
        values, left = torch.linalg.eigh(design.T @ design)
        right = left.T @ (design.T @ targets)
    else:
        values, vectors = torch.linalg.eigh(design @ design.T)
        left, right = design.T @ vectors, vectors.T @ targets
    return Ridge((left / (values + l2)) @ right, mean, deviation)


def _with_constant(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 1), value=_BIAS_CONSTANT)
