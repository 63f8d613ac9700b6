"""Multinomial logistic regression with L2, by L-BFGS in the features' principal axes.

    minimise over w, b:   mean_i -log softmax(x_i w + b)[y_i]  +  weight_decay / 2 * ||w||^2        (b is not penalised)

This is scikit-learn's LogisticRegression with C = 1 / (weight_decay * N), on standardised features.
N samples, W feature width, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    # At uniform p the Hessian is p(1-p) * curvature + weight_decay. p(1-p) shrinks as the fit grows confident: a quarter
    # of 1/C was the fastest over a sweep. The floor keeps directions without variance finite when weight_decay is 0.
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
