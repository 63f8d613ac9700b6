"""Losses that take every class by itself: binary cross-entropy and the asymmetric loss. R rows, V vocabulary, K label limit.

Each is the loss of a row without labels, one dense reduction, and a correction at the labels. The dense part sees -inf at the labels,
where a loss of negatives is 0: nothing large is added and taken away again. IDF weighs the positives (Positives.weights, mean 1 over a
row's labels, so that positives and negatives keep their balance); the paper compares these losses without IDF and says nothing of it.
A row without labels is all negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from train.losses.blocks import float_blocks
from train.losses.positives import Positives

_EPS = 1e-8


@dataclass(frozen=True)
class Classwise:
    """A row loss (see head.RowLoss): the sum over all classes.

    Attributes:
        negative: logits [R, V] -> losses [R]; with True, leaves the slope in the logits.
        positive: logits [R, K] -> losses [R, K], slopes [R, K].
    """

    negative: Callable[[torch.Tensor, bool], torch.Tensor]
    positive: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, logits: torch.Tensor, labels: Positives, gradient: bool) -> torch.Tensor:
        picked = logits.gather(1, labels.ids)
        logits.scatter_(1, labels.ids, picked.masked_fill(labels.labelled, -torch.inf))
        losses = labels.shares.new_empty(len(logits))
        for rows, block in float_blocks(logits, keep=gradient):
            losses[rows] = self.negative(block, gradient)
        loss, slope = self.positive(picked.to(losses.dtype))
        if gradient:
            slope = (labels.weights * slope).to(logits.dtype)
            logits.scatter_(1, labels.ids, torch.where(labels.labelled, slope, logits.gather(1, labels.ids)))
        return losses + (labels.weights * loss * labels.valid).sum(dim=1)


def bce() -> Classwise:
    """-sum_c [y log s(x) + (1 - y) log s(-x)], s the sigmoid: summed over the classes (CatLIP's reduction, arXiv 2404.15653)."""

    def negative(x: torch.Tensor, gradient: bool) -> torch.Tensor:
        losses = functional.softplus(x).sum(dim=1)
        if gradient:
            x.sigmoid_()
        return losses

    return Classwise(negative, lambda x: (functional.softplus(-x), -torch.sigmoid(-x)))


def asymmetric(gamma_negative: float, gamma_positive: float, clip: float) -> Classwise:
    """ASL (Ridnik et al., ICCV 2021), summed over the classes.

    With p = s(x), q = min(1 - p + clip, 1): -(1 - p)^gp log p for a label, -(1 - q)^gn log q for any other class; logarithms of at least
    1e-8. The gradient is that of the whole formula, powers included.
    """

    def negative(x: torch.Tensor, gradient: bool) -> torch.Tensor:
        other = torch.neg(x).sigmoid_()  # 1 - p, exact also where p is nearly 1
        p = x.sigmoid_()
        q = (other + clip).clamp_(max=1.0)
        rest = (p - clip).clamp_(min=0.0)  # 1 - q, exact also where q is nearly 1
        inside = None
        if clip <= _EPS:  # else q is at least clip
            inside = q > _EPS
            q.clamp_(min=_EPS)
        log_q = q.log()
        if gamma_negative == 0:
            losses = -log_q.sum(dim=1)
            slope = (rest > 0) / q if inside is None else (rest > 0) * inside / q
        else:
            power = rest.pow(gamma_negative - 1)
            losses = -(power * rest).mul_(log_q).sum(dim=1)
            slope = rest.div_(q) if inside is None else rest.mul_(inside).div_(q)
            slope.sub_(log_q, alpha=gamma_negative).mul_(power)
        if gradient:
            x.mul_(other).mul_(slope)  # d p / d x = p (1 - p)
        return losses

    def positive(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, other = torch.sigmoid(x), torch.sigmoid(-x)
        log_p, power = p.clamp(min=_EPS).log(), other.pow(gamma_positive)
        return -power * log_p, power * (gamma_positive * p * log_p - (p > _EPS) * other)

    return Classwise(negative, positive)
