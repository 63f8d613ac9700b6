"""Random cases for the losses, and the dense reference of each: dense targets, autograd, float64.

B batch, V vocabulary, K label limit, W feature width.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from labels.manifest import PAD_ID
from labels.settings import Loss
from train.losses.head import HeadLoss

B, W, V, K = 9, 5, 40, 6


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def some_labels(generator: torch.Generator, rows: int = B, classes: int = V, limit: int = K) -> torch.Tensor:
    """Ascending sets of 0 to `limit` labels."""
    label_ids = torch.full((rows, limit), PAD_ID, dtype=torch.int32)
    for row in label_ids:
        count = int(torch.randint(0, min(limit, classes) + 1, (1,), generator=generator))
        row[:count] = torch.randperm(classes, generator=generator)[:count].sort().values
    return label_ids


def some_case(
    seed: int, rows: int = B, classes: int = V, limit: int = K, width: int = W
) -> tuple[Operands, torch.Tensor, torch.Tensor]:
    """Float32 operands, labels and IDF weights, a fifth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    features, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((rows, width), (classes, width), (classes,))
    )
    idf = torch.rand(classes, generator=generator) * 9 * (torch.rand(classes, generator=generator) > 0.2)
    return (features, weight, bias), some_labels(generator, rows, classes, limit), idf


def gradients(loss: torch.Tensor, operands: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, operands))


def fused_and_dense(
    settings: Loss, operands: Operands, label_ids: torch.Tensor, idf: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss and three gradients, of the module in the operands' type and of the dense formula in float64."""
    mine = [operand.clone().requires_grad_() for operand in operands]
    theirs = [operand.double().requires_grad_() for operand in operands]
    loss = HeadLoss(settings, idf)(mine[0], mine[1], mine[2], label_ids)
    dense = dense_loss(settings, nn.functional.linear(*theirs), label_ids, idf.double())
    return [loss, *gradients(loss, mine)], [dense, *gradients(dense, theirs)]


def assert_near(
    found: list[torch.Tensor], expected: list[torch.Tensor], relative: float = 1e-6, cancelled: float = 1e-12
) -> None:
    """Each tensor is within `relative` of its largest value, plus `cancelled` for sums whose parts may cancel."""
    for value, wanted in zip(found, expected, strict=True):
        assert torch.isfinite(value).all()
        assert (value.double() - wanted.double()).abs().max() <= relative * wanted.abs().max() + cancelled


def dense_targets(label_ids: torch.Tensor, idf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y in {0, 1}^[B, V] and the weights w y of the positives, each row's w scaled to mean 1 (all 0 stays 0)."""
    y = torch.zeros(len(label_ids), len(idf), dtype=idf.dtype)
    for row, ids in zip(y, label_ids.tolist(), strict=True):
        row[[label for label in ids if label != PAD_ID]] = 1.0
    weights = y * idf
    total = weights.sum(dim=1, keepdim=True)
    return y, weights * y.sum(dim=1, keepdim=True) / torch.where(total > 0, total, 1.0)


def dense_loss(settings: Loss, logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch, scalar. `idf` counts only if the settings say so."""
    y, weights = dense_targets(label_ids, idf if settings.idf else torch.ones_like(idf))
    if settings.name == "softmax":
        targets = weights / y.sum(dim=1, keepdim=True).clamp(min=1)
        return -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
    if settings.name == "two_way":
        return _two_way_axis(logits, y, weights) + _two_way_axis(logits.T, y.T, weights.T)
    if settings.name == "asl":
        return _asl(settings, logits, y, weights).sum(dim=1).mean()
    losses = -(weights * functional.logsigmoid(logits) + (1 - y) * functional.logsigmoid(-logits))
    return losses.sum(dim=1).mean() if settings.name == "bce" else losses.mean()


def _asl(settings: Loss, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(x)
    q = (1 - p + settings.clip).clamp(max=1)
    positive = -((1 - p) ** settings.gamma_positive) * p.clamp(min=1e-8).log()
    negative = -((1 - q) ** settings.gamma_negative) * q.clamp(min=1e-8).log()
    return weights * positive + (1 - y) * negative


def _two_way_axis(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    has = (weights > 0).any(dim=1)
    if not has.any():
        return (x * 0).sum()
    x, y, weights = x[has], y[has], weights[has]
    p = 4 * torch.logsumexp((weights.log() - x / 4).masked_fill(weights == 0, -torch.inf), dim=1)
    no_others = (y == 1).all(dim=1)
    n = torch.logsumexp(x.masked_fill((y == 1) & ~no_others[:, None], -torch.inf), dim=1)
    return functional.softplus(torch.where(no_others, -torch.inf, n + p)).mean()
