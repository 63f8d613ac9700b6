"""Losses that take every class by itself, such as binary cross-entropy and the asymmetric loss. R rows, V vocabulary, K label limit.

Each is the loss of a row without labels, one dense reduction, and a correction at the labels. The dense part sees -inf at the labels,
where a loss of negatives is 0: nothing large is added and taken away again. IDF weighs the positives (Positives.weights, mean 1 over a
row's labels, so that positives and negatives keep their balance); the paper compares these losses without IDF and says nothing of it.
A row without labels is all negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from train.losses.blocks import float_blocks
from train.losses.positives import Positives

_HALVINGS = 6


def softplus_sum(x: torch.Tensor) -> torch.Tensor:
    """sum_c log(1 + e^x_c) of every row of [R, V], as max(x, 0) + log1p(e^-|x|): one logarithm for 64 classes.

    (1 + a)(1 + b) = 1 + (a + b + ab): the product's excess over 1 is kept, not the product, so that no small e^x is lost beside the 1.
    torch's log1p takes 5 ns a value, more than all else together.
    """
    losses = x.relu().sum(dim=1)
    excess = x.abs().neg_().exp_()
    columns = excess.shape[1]
    for _ in range(_HALVINGS):
        half, odd = columns // 2, columns % 2
        if not half:
            break
        if odd:
            _join(excess[:, :1], excess[:, columns - 1 : columns])
        _join(excess[:, :half], excess[:, half : 2 * half])
        columns = half
    return losses.add_(excess[:, :columns].log1p().sum(dim=1))


def _join(left: torch.Tensor, right: torch.Tensor) -> None:
    left.addcmul_(left, right).add_(right)


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
        labels.put(logits, picked.masked_fill(labels.labelled, -torch.inf))
        losses = labels.shares.new_empty(len(logits))
        for rows, block in float_blocks(logits, keep=gradient):
            losses[rows] = self.negative(block, gradient)
        loss, slope = self.positive(picked.to(losses.dtype))
        if gradient:
            slope = (labels.weights * slope).to(logits.dtype)
            labels.put(logits, torch.where(labels.labelled, slope, logits.gather(1, labels.ids)))
        return losses + (labels.weights * loss * labels.valid).sum(dim=1)
