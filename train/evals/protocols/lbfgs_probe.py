"""The linear probe: logistic regression on frozen features, its weight decay chosen within the training part.

L-BFGS (logistic.py) is the usual stand-in, on small data, for the linear probe of MAE (arXiv 2111.06377) that the paper
uses; a result names it as that. N samples, W feature width, C classes.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from labels.errors import UserError
from labels.settings import Positive, Section, Seeds
from train.evals.protocol import accuracies, top_k
from train.evals.protocols.logistic import TOLERANCE, Axes, fit, start_at_zero
from train.evals.protocols.mae_probe import MaeProbe


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
        raise UserError("no class of the training part has two samples", allowed="two or more, one of them to validate on")
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
        best, accuracy = choose_weight_decay(x, train_y, classes=classes, curvature=axes.curvature, settings=settings, seed=seed)
        if best not in refits:
            zero = start_at_zero(x.shape[1], classes, device)
            solution = fit(x, y, weight_decay=best, curvature=axes.curvature, start=zero, max_iterations=settings.max_iterations)
            how = {"converged": solution.converged, "evaluations": solution.evaluations}
            refits[best] = {**accuracies(solution.logits(x_test), y_test), **how}
        edges = (min(accuracy), max(accuracy)) if len(accuracy) > 1 else ()
        validation = {str(value): share for value, share in accuracy.items()}
        results.append({"seed": seed, "weight_decay": best, "at_edge": best in edges, "validation": validation, **refits[best]})
    return results


def majority(train_y: np.ndarray, test_y: np.ndarray, *, classes: int) -> dict[str, Any]:
    """What the class counts of the training part alone score on the test part: top1 and top5 as in linear_probe."""
    counts = torch.from_numpy(np.bincount(train_y, minlength=classes))
    return accuracies(counts.expand(len(test_y), classes), torch.from_numpy(test_y))
