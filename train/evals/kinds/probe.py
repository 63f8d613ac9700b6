"""`train probe`: a linear classifier on frozen features, by one of two recipes."""

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
from train.evals.protocol import Evaluation, Score, accuracies, top_k

# ---- logistic: Multinomial logistic regression with L2, by L-BFGS in the features' principal axes.
#
#     minimise over w, b:   mean_i -log softmax(x_i w + b)[y_i]  +  weight_decay / 2 * ||w||^2        (b is not penalised)
#
# This is scikit-learn's LogisticRegression with C = 1 / (weight_decay * N), on standardised features.
# N samples, W feature width, C classes.


TOLERANCE = 1e-5  # largest entry of the gradient, in the preconditioned coordinates of `fit`
_HISTORY = 20
_CHUNK_LOGITS = 2**25  # logits held at once: 256 MiB in float64
_FLAT = 1e-6  # a feature with a smaller standard deviation counts as constant


@dataclass(frozen=True)
class Axes:
    """Standardised features in their principal axes: an exact change of coordinates that keeps ||w||.

    mean, deviation: [W], of the training part. rotation: [W, W], orthogonal. curvature: [W], the variance along each
    axis. There the Hessian is nearly diagonal, so that scaling by it lets L-BFGS converge in a few dozen steps.
    """

    mean: Tensor
    deviation: Tensor
    rotation: Tensor
    curvature: Tensor

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
    """A minimum: weight [W, C] and bias [C] in float64, and how it was come by."""

    weight: Tensor
    bias: Tensor
    loss: float
    evaluations: int
    converged: bool

    def logits(self, x: Tensor) -> Tensor:
        """Coordinates [N, W] -> logits [N, C]."""
        return (x @ self.weight.to(x.dtype)).double() + self.bias


def fit(
    x: Tensor,
    y: Tensor,
    *,
    weight_decay: float,
    curvature: Tensor,
    start: Solution,
    max_iterations: int,
    tolerance: float = TOLERANCE,
) -> Solution:
    """Minimise the objective at the head of this file.

    Args:
        x: coordinates [N, W], float32 or float64; the products are taken in this type, all sums in float64.
        y: classes [N], int64.
        curvature: [W], what the Hessian's diagonal is guessed from; it changes the way to the minimum, not the minimum.
        start: where to begin, as the solution of a neighbouring weight decay.
    """
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


def start_at_zero(width: int, classes: int, device: torch.device) -> Solution:
    """All weights and biases 0."""
    zeros = torch.zeros(width + 1, classes, dtype=torch.float64, device=device)
    return Solution(zeros[:-1], zeros[-1], float("inf"), 0, False)


# ---- mae_probe: The linear probe by MAE's recipe (arXiv 2111.06377, appendix A; main_linprobe.py): LARS and a BatchNorm head, trained by epochs.
#
# head: BatchNorm1d(W, affine=False, eps=1e-6) -> Linear(W, C), weight drawn from N(0, 0.01), bias 0
# rate: base_lr * batch / 256, linear over the warm-up, then cosine to 0, set at every step; LARS momentum 0.9, trust 0.001, no weight decay
# The head of the last epoch is tested, once. N samples, B batch of the head, W feature width, C classes.


class MaeProbe(Section):
    epochs: Positive = 90
    batch_size: Positive = 16_384
    base_lr: Annotated[float, Field(gt=0)] = 0.1
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    augment: bool = True

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, epochs {self.epochs}; allowed: less than epochs")
        return self


_TEST_ROWS = 16_384
Epoch = Callable[[int, np.ndarray], Iterable[Tensor]]
"""Number of an epoch, rows int [R] in their order -> features float32 of these rows, in pieces [*, W] on the device."""


def learning_rate(settings: MaeProbe, batch: int, epoch: float) -> float:
    """The rate at a fractional epoch."""
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


def mae_probe(
    epoch_features: Epoch,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    classes: int,
    settings: MaeProbe,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train the head and test it.

    Args:
        epoch_features: the training part's features, again for every epoch.
        train_y, test_y: classes [N], int64. test_x: features [N, W].
        seed: of the head's weights and of the order.

    Returns:
        top1, top5 (None with 5 classes or fewer), batch_size (of the head, at most N), learning_rate (the peak),
        final_loss.
    """
    batch = min(settings.batch_size, len(train_y))
    steps = len(train_y) // batch  # what is left over sits out this epoch, as in MAE's loader
    targets = torch.from_numpy(train_y).to(device)
    norm, linear = _head(test_x.shape[1], classes, seed, device)
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
    norm.eval()
    with torch.inference_mode():
        parts = torch.from_numpy(test_x).split(_TEST_ROWS)
        logits = torch.cat([linear(norm(part.to(device))).cpu() for part in parts])
    rates = {"batch_size": batch, "learning_rate": settings.base_lr * batch / 256, "final_loss": float(loss.detach())}
    return {**accuracies(logits, torch.from_numpy(test_y)), **rates}


def cached_epochs(train_x: np.ndarray, device: torch.device) -> Epoch:
    """The same features [N, W] in every epoch."""
    held = torch.from_numpy(train_x).to(device)
    return lambda epoch, rows: [held[torch.from_numpy(rows).to(device)]]


def augmented_epochs(encoder: Encoder, train: LabelledImages, extract: Extractor, seed: int) -> Epoch:
    """Random resized crops and flips of the images, through the encoder in every epoch."""

    def features(epoch: int, rows: np.ndarray) -> Iterator[Tensor]:
        return extract.stream(
            encoder, train, rows, lambda encoded, side, row: decode_crop(encoded, side, seed, epoch, row)
        )

    return features


def _head(width: int, classes: int, seed: int, device: torch.device) -> tuple[nn.BatchNorm1d, nn.Linear]:
    linear = nn.Linear(width, classes)
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        linear.bias.zero_()
    return nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device), linear.to(device)


def _regrouped(pieces: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Pieces of any length -> batches of `batch` rows; a shorter rest is not given out."""
    held: list[Tensor] = []
    count = 0
    for piece in pieces:
        held.append(piece.clone() if piece.is_inference() else piece)  # the head's backward needs plain tensors
        count += len(piece)
        if count >= batch:
            joined = torch.cat(held)
            whole = count // batch * batch
            yield from joined[:whole].split(batch)
            held, count = [joined[whole:]], count - whole


# ---- lbfgs_probe: The linear probe: logistic regression on frozen features, its weight decay chosen within the
# training part.
#
# L-BFGS (logistic.py) is the usual stand-in, on small data, for the linear probe of MAE (arXiv 2111.06377) that the
# paper uses; a result names it as that. N samples, W feature width, C classes.


class Probe(Section):
    recipe: Literal["lbfgs", "mae"] = "lbfgs"
    weight_decay: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seeds: Seeds = [0, 1, 2]
    max_iterations: Positive = 200
    mae: MaeProbe = MaeProbe()


PROTOCOL = "L-BFGS logistic regression on cached features, stand-in for MAE's recipe"
_FLOAT64_NUMBERS = 2**23  # training features up to this size are computed with in float64
_SWEEP_TOLERANCE = 5 * TOLERANCE  # a sweep only ranks weight decays


def stratified_split(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the (fitting, validation) parts of y [N], about `fraction` of every class in the second.

    A class of two samples or more has at least one in each part; a single sample stays in the fitting part.

    Raises:
        UserError: no class has two samples.
    """
    random = np.random.default_rng(seed)
    fitting, validation = [], []
    for label in np.unique(y):
        order = random.permutation(np.flatnonzero(y == label))
        count = min(max(1, round(fraction * len(order))), len(order) - 1)
        validation.append(order[:count])
        fitting.append(order[count:])
    if not sum(map(len, validation)):
        raise UserError(
            "no class of the training part has two samples", allowed="two or more, one of them to validate on"
        )
    return np.sort(np.concatenate(fitting)), np.sort(np.concatenate(validation))


def choose_weight_decay(
    x: Tensor, y: np.ndarray, *, classes: int, curvature: Tensor, settings: Probe, seed: int
) -> tuple[float, dict[float, float]]:
    """The weight decay with the best validation accuracy within the training part; of equals the strongest.

    Args:
        x: coordinates [N, W] of the training part; y: its classes [N].

    Returns:
        The choice, and the accuracy in [0, 1] of every weight decay tried.
    """
    parts = stratified_split(y, settings.validation_fraction, seed)
    fitting, validation = (torch.from_numpy(part).to(x.device) for part in parts)
    targets = torch.from_numpy(y).to(x.device)
    x_fit, y_fit, x_validation, y_validation = x[fitting], targets[fitting], x[validation], targets[validation]
    solution = start_at_zero(x.shape[1], classes, x.device)
    accuracy: dict[float, float] = {}
    for weight_decay in sorted(set(settings.weight_decay), reverse=True):  # strong to weak: each starts at the last
        solution = fit(
            x_fit,
            y_fit,
            weight_decay=weight_decay,
            curvature=curvature,
            start=solution,
            max_iterations=settings.max_iterations,
            tolerance=_SWEEP_TOLERANCE,
        )
        accuracy[weight_decay] = top_k(solution.logits(x_validation), y_validation, 1)
    return max(accuracy, key=lambda value: (accuracy[value], value)), accuracy


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    classes: int,
    settings: Probe,
    seeds: Sequence[int],
    device: torch.device,
) -> list[dict[str, Any]]:
    """The whole protocol for one encoder: standardise, choose on splits of the training part, refit on all of it, test.

    Args:
        train_x, test_x: features [N, W], float; train_y, test_y: classes [N], int64 in [0, classes).
        seeds: each draws another validation split. The refit is convex and deterministic, so that seeds which choose
            the same weight decay have the same accuracies.

    Returns:
        For each seed: seed, weight_decay, at_edge (of the sweep), validation {weight decay: accuracy}, top1, top5 (None
        with 5 classes or fewer), converged, evaluations. Accuracies are fractions of 1.

    Raises:
        UserError: no class with two samples.
    """
    # The rounding of float32 averages out over many samples; over few it would end the search early.
    dtype = torch.float64 if train_x.size <= _FLOAT64_NUMBERS else torch.float32
    raw, raw_test = (torch.from_numpy(x).to(device, dtype) for x in (train_x, test_x))
    axes = Axes.of(raw)
    x, y = axes(raw), torch.from_numpy(train_y).to(device)
    x_test, y_test = axes(raw_test), torch.from_numpy(test_y).to(device)
    refits: dict[float, dict[str, Any]] = {}
    results = []
    for seed in seeds:
        best, accuracy = choose_weight_decay(
            x, train_y, classes=classes, curvature=axes.curvature, settings=settings, seed=seed
        )
        if best not in refits:
            zero = start_at_zero(x.shape[1], classes, device)
            solution = fit(
                x, y, weight_decay=best, curvature=axes.curvature, start=zero, max_iterations=settings.max_iterations
            )
            how = {"converged": solution.converged, "evaluations": solution.evaluations}
            refits[best] = {**accuracies(solution.logits(x_test), y_test), **how}
        edges = (min(accuracy), max(accuracy)) if len(accuracy) > 1 else ()
        validation = {str(value): share for value, share in accuracy.items()}
        results.append(
            {"seed": seed, "weight_decay": best, "at_edge": best in edges, "validation": validation, **refits[best]}
        )
    return results


def majority(train_y: np.ndarray, test_y: np.ndarray, *, classes: int) -> dict[str, Any]:
    """What the class counts of the training part alone score on the test part: top1 and top5 as in linear_probe."""
    counts = torch.from_numpy(np.bincount(train_y, minlength=classes))
    return accuracies(counts.expand(len(test_y), classes), torch.from_numpy(test_y))


class LinearProbe(Evaluation):
    name, takes, section = "probe", "classes", Probe

    def describe(self, settings: Probe) -> str:
        if settings.recipe == "lbfgs":
            return PROTOCOL
        features = (
            "random resized crops and flips"
            if settings.mae.augment
            else "cached features of the central crop, no augmentation"
        )
        return f"MAE's linear probe: LARS, BatchNorm head, {settings.mae.epochs} epochs, {features}"

    def check(self, data: DataSet, settings: Probe) -> None:
        if settings.recipe == "lbfgs" and len(data.train) == len(set(data.train.targets.tolist())):
            raise UserError(
                "no class of the training part has two samples", allowed="two or more, one of them to validate on"
            )

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Probe, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        if settings.recipe == "mae":
            return [self._mae(encoder, data, settings, extract, seed) for seed in seeds]
        train_x, test_x = extract(encoder, data.train), extract(encoder, data.test)
        found = linear_probe(
            train_x,
            data.train.targets,
            test_x,
            data.test.targets,
            classes=len(data.classes),
            settings=settings,
            seeds=seeds,
            device=extract.device,
        )
        validation = [stratified_split(data.train.targets, settings.validation_fraction, seed)[1] for seed in seeds]
        return [
            Score("probe", one.pop("seed"), _metrics(one), one, rows)
            for one, rows in zip(found, validation, strict=True)
        ]

    def _mae(self, encoder: Encoder, data: DataSet, settings: Probe, extract: Extractor, seed: int) -> Score:
        test_x = extract(encoder, data.test)
        if settings.mae.augment:
            epochs = augmented_epochs(encoder, data.train, extract, seed)
        else:
            epochs = cached_epochs(extract(encoder, data.train), extract.device)
        found = mae_probe(
            epochs,
            data.train.targets,
            test_x,
            data.test.targets,
            classes=len(data.classes),
            settings=settings.mae,
            seed=seed,
            device=extract.device,
        )
        return Score(
            "probe, MAE's recipe" if settings.mae.augment else "probe, MAE's head", seed, _metrics(found), found
        )


EVALUATION = LinearProbe()


def _metrics(found: dict[str, Any]) -> dict[str, float | None]:
    """Take the accuracies out of what a recipe gives; the rest is detail."""
    return {name: found.pop(name) for name in ("top1", "top5")}
