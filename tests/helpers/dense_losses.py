"""The losses of METHOD, section 1, as they are written there: dense targets, autograd, float64. What the fused losses
are held against.

B batch, V vocabulary, K label limit.
"""

import torch
from torch.nn import functional

from labels.manifest import PAD_ID
from labels.settings import Loss


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
