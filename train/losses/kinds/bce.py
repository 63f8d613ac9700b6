"""Binary cross-entropy, summed over the classes (CatLIP's reduction, arXiv 2404.15653).

-sum_c [y log s(x) + (1 - y) log s(-x)], s the sigmoid. The paper does not state the reduction, nor how IDF applies: see
Classwise in train/losses/head.py. R rows, V vocabulary, K label limit.
"""

from torch import Tensor, sigmoid
from torch.nn import functional

from labels.settings import Loss
from train.losses.head import Classwise, Head, Positives, softplus_sum


def batch_loss(settings: Loss, head: Head, labels: Positives) -> Tensor:
    return head.mean(Classwise(negative, positive), labels)


def negative(x: Tensor, gradient: bool) -> Tensor:
    """Losses [R] of logits [R, V] that are all negatives; with `gradient`, leaves the slope in the logits."""
    losses = softplus_sum(x)
    if gradient:
        x.sigmoid_()
    return losses


def positive(x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and slopes [R, K] of the labels' logits [R, K]."""
    return functional.softplus(-x), -sigmoid(-x)
