"""Binary cross-entropy, summed over the classes (CatLIP's reduction, arXiv 2404.15653). R rows, V vocabulary, K label
limit.

-sum_c [y log s(x) + (1 - y) log s(-x)], s the sigmoid.
"""

import torch
from torch.nn import functional

from labels.settings import Loss
from train.losses.head import Classwise, Head, Positives, softplus_sum


def batch_loss(settings: Loss, head: Head, labels: Positives) -> torch.Tensor:
    """See train/losses/kinds/__init__.py."""
    return head.mean(Classwise(negative, positive), labels)


def negative(x: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Losses [R] of logits [R, V] that are all negatives; with `gradient`, leaves the slope in their place."""
    losses = softplus_sum(x)
    if gradient:
        x.sigmoid_()
    return losses


def positive(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and slopes [R, K] of the labels' logits [R, K]."""
    return functional.softplus(-x), -torch.sigmoid(-x)
