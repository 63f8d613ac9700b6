"""`train probe`: a linear classifier on frozen features, by one of two recipes.

lbfgs: features of the central crop -> `Axes` (standardised, principal axes) -> weight decay chosen on a split of the
       training part -> `fit` on all of it -> accuracy on the test part. The usual replacement, on small data, for
       MAE's linear probe (arXiv 2111.06377), which the paper uses; results say so. With `folds`, both parts together:
       each image is tested once, by a classifier that was fitted on the other folds, weight decay included.
mae:   MAE's own recipe (appendix A; main_linprobe.py): BatchNorm1d(W, affine=False) and Linear(W, C), trained by epochs
       with LARS (momentum 0.9, trust 0.001, no weight decay), on random crops through the encoder or cached features.

N samples, B batch, W feature width, C classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional

from labels.settings import Positive, Section, Seeds
from labels.storage import UserError
from train.encoders.encoder import Encoder
from train.evals.data.images import LabelledImages
from train.evals.data.sets import DataSet
from train.evals.features import Extractor, decode_crop
from train.evals.protocol import Evaluation, Score, accuracies, hits, top_k


class MaeProbe(Section):
    epochs: Positive = 90
    batch_size: Annotated[int, Field(ge=2)] = 16_384  # BatchNorm needs two
    base_lr: Annotated[float, Field(gt=0)] = 0.1
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    augment: bool = True

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, epochs {self.epochs}; allowed: less than epochs")
        return self


class Probe(Section):
    recipe: Literal["lbfgs", "mae"] = "lbfgs"
    weight_decay: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    folds: Annotated[int, Field(ge=2)] | None = None
    seeds: Seeds = [0, 1, 2]
    max_iterations: Positive = 200
    mae: MaeProbe = MaeProbe()

    @model_validator(mode="after")
    def _folds(self) -> Self:
        if self.folds and self.recipe != "lbfgs":
            raise ValueError(f"folds is {self.folds}, recipe {self.recipe}; allowed: folds with the recipe lbfgs")
        return self


Part = tuple[np.ndarray, np.ndarray]  # features float [N, W], classes int64 [N]


class LinearProbe(Evaluation):
    name, takes, section = "probe", "classes", Probe

    def describe(self, settings: Probe) -> str:
        if settings.recipe == "lbfgs":
            over = f", {settings.folds} folds over both parts" if settings.folds else ""
            return f"L-BFGS logistic regression on cached features, stand-in for MAE's recipe{over}"
        cached = "cached features of the central crop, no augmentation"
        features = "random resized crops and flips" if settings.mae.augment else cached
        return f"MAE's linear probe: LARS, BatchNorm head, {settings.mae.epochs} epochs, {features}"

    def check(self, data: DataSet, settings: Probe) -> None:
        if settings.folds:
            if settings.folds > (images := int(data.groups.max()) + 1):
                problem = f"probe.folds is {settings.folds}, the data has {images} different images"
                raise UserError(problem, allowed=f"2 to {images}", fix="--set probe.folds=2, or more images")
        elif settings.recipe == "lbfgs" and len(data.train) == len(set(data.train.targets.tolist())):
            raise _no_pair()

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Probe, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        train, device, classes = data.train, extract.device, len(data.classes)
        test = extract(encoder, data.test), data.test.targets
        if settings.recipe == "lbfgs":
            fitted = extract(encoder, train), train.targets
            if not settings.folds:
                return linear_probe(fitted, test, classes, settings, seeds, device)
            labelled = np.concatenate([fitted[0], test[0]]), np.concatenate([fitted[1], test[1]])
            return folded_probe(labelled, data.groups, classes, settings, seeds, device)
        scores = []
        for seed in seeds:
            if settings.mae.augment:
                epochs = augmented_epochs(encoder, train, extract, seed)
            else:
                epochs = cached_epochs(extract(encoder, train), device)
            scores.append(mae_probe(epochs, train.targets, test, classes, settings.mae, seed, device))
        return scores


EVALUATION = LinearProbe()


def majority(train_y: np.ndarray, test_y: np.ndarray, *, classes: int) -> dict[str, Any]:
    """Accuracies on the test part of always guessing the most frequent classes of the training part."""
    counts = torch.from_numpy(np.bincount(train_y, minlength=classes))
    return accuracies(counts.expand(len(test_y), classes), torch.from_numpy(test_y))


# -- lbfgs: choose the weight decay, refit, test

_FLOAT64_NUMBERS = 2**23  # training features up to this size are computed with in float64
_SWEEP_TOLERANCE = 5e-5  # a sweep only ranks weight decays


def linear_probe(
    train: Part, test: Part, classes: int, settings: Probe, seeds: Sequence[int], device: torch.device
) -> list[Score]:
    """The whole recipe for one encoder. Each seed draws another validation split; its rows are the score's `split`.

    The refit is convex and deterministic: seeds that choose the same weight decay have the same accuracies.
    """
    (train_x, train_y), (test_x, test_y) = train, test
    # The rounding of float32 averages out over many samples; over few it would end the search early.
    dtype = torch.float64 if train_x.size <= _FLOAT64_NUMBERS else torch.float32
    raw, raw_test = (torch.from_numpy(x).to(device, dtype) for x in (train_x, test_x))
    axes = Axes.of(raw)
    x, y = axes(raw), torch.from_numpy(train_y).to(device)
    x_test, y_test = axes(raw_test), torch.from_numpy(test_y).to(device)
    options: dict[str, Any] = {"curvature": axes.curvature, "max_iterations": settings.max_iterations}
    refits: dict[float, tuple[Tensor, dict[str, Any]]] = {}  # logits of the test part, how the solver ended
    scores = []
    for seed in seeds:
        parts = stratified_split(train_y, settings.validation_fraction, seed)
        accuracy = sweep(x, train_y, parts, classes, axes.curvature, settings)
        best = max(accuracy, key=lambda value: (accuracy[value], value))  # of equals the strongest
        if best not in refits:
            solution = fit(x, y, weight_decay=best, start=start_at_zero(x.shape[1], classes, device), **options)
            solver = {"converged": solution.converged, "evaluations": solution.evaluations}
            refits[best] = solution.logits(x_test), solver
        logits, solver = refits[best]
        at_edge = len(accuracy) > 1 and best in (min(accuracy), max(accuracy))
        validation = {str(value): share for value, share in accuracy.items()}
        detail = {"weight_decay": best, "at_edge": at_edge, "validation": validation, **solver}
        metrics, correct = accuracies(logits, y_test), hits(logits, y_test)
        scores.append(Score("probe", seed, metrics, detail, split=parts[1], correct=correct))
    return scores


def folded_probe(
    labelled: Part, groups: np.ndarray, classes: int, settings: Probe, seeds: Sequence[int], device: torch.device
) -> list[Score]:
    """The recipe once for each fold, which is its test part. `groups` [N]: images of one number are in one fold; each
    seed draws other folds, and other validation splits of the rest.
    """
    x, y = labelled
    assert settings.folds
    scores = []
    for seed in seeds:
        folds, correct, of_folds = draw_folds(y, groups, settings.folds, seed), np.zeros(len(y), bool), []
        for fold in range(settings.folds):
            tested = folds == fold
            fitted, test = (x[~tested], y[~tested]), (x[tested], y[tested])
            of_folds += linear_probe(fitted, test, classes, settings, [seed], device)
            correct[tested] = of_folds[-1].correct
        sizes = np.bincount(folds)
        top5 = [score.metrics["top5"] for score in of_folds]
        metrics = {
            "top1": float(correct.mean()),
            "top5": None if None in top5 else float(np.average(top5, weights=sizes)),
        }
        names = ("weight_decay", "at_edge", "converged", "evaluations")
        detail = {"folds": settings.folds} | {name: [score.detail[name] for score in of_folds] for name in names}
        scores.append(Score(f"probe, {settings.folds} folds", seed, metrics, detail, trials=len(y), correct=correct))
    return scores


def draw_folds(y: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each row, int64 [N]. A group is in one fold; of the groups of a class (that of a group's first row), the
    folds have equal numbers, give or take one, and also of all groups.
    """
    first = np.unique(groups, return_index=True)[1]
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(y[first][order], kind="stable")]
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[order] = np.arange(len(first)) % folds
    return fold_of_group[groups]


def stratified_split(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the (fitting, validation) parts of y [N], about `fraction` of every class in the second.

    A class of two samples or more has at least one in each part; a single sample stays in the fitting part.
    """
    random = np.random.default_rng(seed)
    fitting, validation = [], []
    for label in np.unique(y):
        order = random.permutation(np.flatnonzero(y == label))
        count = min(max(1, round(fraction * len(order))), len(order) - 1)
        validation.append(order[:count])
        fitting.append(order[count:])
    if not sum(map(len, validation)):
        raise _no_pair()
    return np.sort(np.concatenate(fitting)), np.sort(np.concatenate(validation))


def _no_pair() -> UserError:
    problem = "no class of the training part has two samples"
    return UserError(problem, allowed="two or more, one of them for validation")


def sweep(
    x: Tensor, y: np.ndarray, parts: tuple[np.ndarray, np.ndarray], classes: int, curvature: Tensor, settings: Probe
) -> dict[float, float]:
    """Validation accuracy by weight decay, fitted on one part of the coordinates x [N, W], measured on the other."""
    fitting, validation = (torch.from_numpy(part).to(x.device) for part in parts)
    targets = torch.from_numpy(y).to(x.device)
    x_fit, y_fit, x_validation, y_validation = x[fitting], targets[fitting], x[validation], targets[validation]
    options: dict[str, Any] = {"max_iterations": settings.max_iterations, "tolerance": _SWEEP_TOLERANCE}
    solution = start_at_zero(x.shape[1], classes, x.device)
    accuracy: dict[float, float] = {}
    for decay in sorted(set(settings.weight_decay), reverse=True):  # strong to weak: each starts at the last solution
        solution = fit(x_fit, y_fit, weight_decay=decay, curvature=curvature, start=solution, **options)
        accuracy[decay] = top_k(solution.logits(x_validation), y_validation, 1)
    return accuracy


# lbfgs: multinomial logistic regression with L2
#
#     minimise over w, b:   mean_i -log softmax(x_i w + b)[y_i]  +  weight_decay / 2 * ||w||^2     (b is not penalised)
#
# This is scikit-learn's LogisticRegression with C = 1 / (weight_decay * N), on standardised features.

_TOLERANCE = 1e-5  # largest entry of the gradient, in the preconditioned coordinates of `fit`
_HISTORY = 20
_CHUNK_LOGITS = 2**25  # logits in memory at a time: 256 MiB in float64
_FLAT = 1e-6  # a feature with a smaller standard deviation counts as constant


@dataclass(frozen=True)
class Axes:
    """Standardised features in their principal axes: an exact change of coordinates that keeps ||w||.

    There the Hessian is nearly diagonal; scaled by it, L-BFGS converges in a few dozen steps.
    """

    mean: Tensor  # [W], of the training part
    deviation: Tensor  # [W]
    rotation: Tensor  # [W, W], orthogonal
    curvature: Tensor  # [W], the variance along each axis

    @classmethod
    def of(cls, x: Tensor) -> "Axes":
        """Axes of the training features x [N, W]."""
        mean = x.mean(0, dtype=torch.float64).to(x.dtype)
        deviation = x.sub(mean).square().mean(0).sqrt().clamp_min(_FLAT)
        standard = (x - mean) / deviation
        curvature, rotation = torch.linalg.eigh(standard.T @ standard / len(x))
        return cls(mean, deviation, rotation, curvature.double().clamp_min(0))

    def __call__(self, x: Tensor) -> Tensor:
        """Features [N, W] -> coordinates [N, W]."""
        return ((x - self.mean) / self.deviation) @ self.rotation


@dataclass(frozen=True)
class Solution:
    weight: Tensor  # float64 [W, C]
    bias: Tensor  # float64 [C]
    loss: float
    evaluations: int  # of the objective
    converged: bool

    def logits(self, x: Tensor) -> Tensor:
        """Coordinates [N, W] -> logits [N, C]."""
        return (x @ self.weight.to(x.dtype)).double() + self.bias


def start_at_zero(width: int, classes: int, device: torch.device) -> Solution:
    """All weights and biases 0."""
    zeros = torch.zeros(width + 1, classes, dtype=torch.float64, device=device)
    return Solution(zeros[:-1], zeros[-1], float("inf"), 0, False)


def fit(
    x: Tensor,  # coordinates [N, W], float32 or float64: products are computed in this type, sums in float64
    y: Tensor,  # classes int64 [N]
    *,
    weight_decay: float,
    curvature: Tensor,  # [W], estimates the Hessian's diagonal: it changes the path to the minimum, not the minimum
    start: Solution,
    max_iterations: int,
    tolerance: float = _TOLERANCE,
) -> Solution:
    """Minimise the objective above."""
    # At uniform p the Hessian is p(1-p) * curvature + weight_decay. p(1-p) shrinks as the fit grows confident: a
    # quarter of 1/C was the fastest over a sweep. The floor keeps directions without variance finite when weight_decay
    # is 0.
    diagonal = curvature / (4 * len(start.bias)) + weight_decay
    scale = diagonal.clamp_min(1e-9 * float(diagonal.max())).rsqrt()[:, None]  # [W, 1]
    inner = (start.weight / scale).requires_grad_()  # [W, C]
    bias = start.bias.clone().requires_grad_()
    rows = max(1, _CHUNK_LOGITS // len(bias))
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        inner.grad = bias.grad = None
        total = weight_decay / 2 * (inner * scale).square().sum()
        total.backward()
        for x_rows, y_rows in zip(x.split(rows), y.split(rows), strict=True):
            logits = (x_rows @ (inner * scale).to(x.dtype)).double() + bias
            loss = functional.cross_entropy(logits, y_rows, reduction="sum") / len(x)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    options: dict[str, Any] = {"history_size": _HISTORY, "line_search_fn": "strong_wolfe", "tolerance_change": 1e-12}
    solver = torch.optim.LBFGS([inner, bias], max_iter=max_iterations, tolerance_grad=tolerance, **options)
    solver.step(closure)
    loss = float(closure())
    assert inner.grad is not None and bias.grad is not None
    slope = max(float(inner.grad.abs().max()), float(bias.grad.abs().max()))
    return Solution((inner * scale).detach(), bias.detach(), loss, evaluations, slope <= tolerance)


# -- mae: the head is tested once, after its last epoch

_TEST_ROWS = 16_384
Epoch = Callable[[int, np.ndarray], Iterable[Tensor]]
"""Number of an epoch, rows int [R] in their order -> features float32 of these rows, in pieces [*, W] on the device."""


def mae_probe(
    epoch_features: Epoch,
    train_y: np.ndarray,
    test: Part,
    classes: int,
    settings: MaeProbe,
    seed: int,
    device: torch.device,
) -> Score:
    """Train the head and test it. `seed`: of the head's weights and of the order."""
    test_x, test_y = test
    batch = min(settings.batch_size, len(train_y))
    steps = len(train_y) // batch  # the remaining samples are not used in this epoch, as in MAE's loader
    targets = torch.from_numpy(train_y).to(device)
    norm, linear = _make_head(test_x.shape[1], classes, seed, device)
    optimizer = make_optimizer(linear)
    loss = torch.full((), math.nan)
    for epoch in range(settings.epochs):
        rows = np.random.default_rng([seed, epoch]).permutation(len(train_y))[: steps * batch]
        for step, x in enumerate(_regrouped(epoch_features(epoch, rows), batch)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, batch, epoch + step / steps)
            y = targets[torch.from_numpy(rows[step * batch : (step + 1) * batch]).to(device)]
            loss = functional.cross_entropy(linear(norm(x)), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    if not torch.isfinite(loss + linear.weight.sum()).item():
        problem = (
            f"the probe has diverged: probe.mae.base_lr is {settings.base_lr:g}, the last loss {float(loss.detach()):g}"
        )
        raise UserError(problem, allowed="a finite loss", fix="--set probe.mae.base_lr=0.1, or a lower one")
    norm.eval()
    with torch.inference_mode():
        parts = torch.from_numpy(test_x).split(_TEST_ROWS)
        logits, y = torch.cat([linear(norm(part.to(device))).cpu() for part in parts]), torch.from_numpy(test_y)
    variant = "probe, MAE's recipe" if settings.augment else "probe, MAE's head"
    peak = settings.base_lr * batch / 256
    detail = {"batch_size": batch, "learning_rate": peak, "final_loss": float(loss.detach())}
    return Score(variant, seed, accuracies(logits, y), detail, correct=hits(logits, y))


def learning_rate(settings: MaeProbe, batch: int, epoch: float) -> float:
    """The rate at a fractional epoch: linear over the warm-up to base_lr * batch / 256, then cosine to 0."""
    peak = settings.base_lr * batch / 256
    if epoch < settings.warmup_epochs:
        return peak * epoch / settings.warmup_epochs
    done = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(linear: nn.Linear) -> Lars:
    """LARS as MAE has it: the trust ratio for matrices alone, a bias takes plain steps with momentum."""
    groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias], "always_adapt": False}]
    options: dict[str, Any] = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coeff": 0.001}
    return Lars(groups, **options)


def cached_epochs(train_x: np.ndarray, device: torch.device) -> Epoch:
    """The same features [N, W] in every epoch."""
    features = torch.from_numpy(train_x).to(device)
    return lambda epoch, rows: [features[torch.from_numpy(rows).to(device)]]


def augmented_epochs(encoder: Encoder, train: LabelledImages, extract: Extractor, seed: int) -> Epoch:
    """Random resized crops and flips of the images, through the encoder in every epoch."""

    def features(epoch: int, rows: np.ndarray) -> Iterator[Tensor]:
        crop = lambda encoded, side, row: decode_crop(encoded, side, seed, epoch, row)  # noqa: E731
        return extract.stream(encoder, train, rows, crop)

    return features


def _make_head(width: int, classes: int, seed: int, device: torch.device) -> tuple[nn.BatchNorm1d, nn.Linear]:
    linear = nn.Linear(width, classes)
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        linear.bias.zero_()
    return nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device), linear.to(device)


def _regrouped(pieces: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Pieces of any length -> batches of `batch` rows; a shorter rest is dropped."""
    waiting: list[Tensor] = []
    count = 0
    for piece in pieces:
        waiting.append(piece.clone() if piece.is_inference() else piece)  # the head's backward needs plain tensors
        count += len(piece)
        if count >= batch:
            joined = torch.cat(waiting)
            whole = count // batch * batch
            yield from joined[:whole].split(batch)
            waiting, count = [joined[whole:]], count - whole
