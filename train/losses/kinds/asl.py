"""The asymmetric loss (Ridnik et al., ICCV 2021), summed over the classes. R rows, V vocabulary, K label limit.

With p = s(x), q = min(1 - p + clip, 1): -(1 - p)^gp log p for a label, -(1 - q)^gn log q for any other class, with
logarithms of at least 1e-8. The gradient is that of the whole formula, powers included.
"""

import torch
from torch import Tensor

from labels.settings import Loss
from train.losses.head import Classwise, Head, Positives

_EPS = 1e-8


def batch_loss(settings: Loss, head: Head, labels: Positives) -> Tensor:
    return head.mean(_asymmetric(settings.gamma_negative, settings.gamma_positive, settings.clip), labels)


def _asymmetric(gamma_negative: float, gamma_positive: float, clip: float) -> Classwise:
    def negative(x: Tensor, gradient: bool) -> Tensor:
        not_p = torch.neg(x).sigmoid_()  # 1 - p, exact also where p is nearly 1
        p = x.sigmoid_()
        q = (not_p + clip).clamp_(max=1.0)
        rest = (p - clip).clamp_(min=0.0)  # 1 - q, exact also where q is nearly 1
        inside = None
        if clip <= _EPS:  # otherwise q is at least clip
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
            x.mul_(not_p).mul_(slope)  # d p / d x = p (1 - p)
        return losses

    def positive(x: Tensor) -> tuple[Tensor, Tensor]:
        p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
        log_p, power = p.clamp(min=_EPS).log(), not_p.pow(gamma_positive)
        return -power * log_p, power * (gamma_positive * p * log_p - (p > _EPS) * not_p)

    return Classwise(negative, positive)
