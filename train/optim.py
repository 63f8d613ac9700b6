"""AdamW with the reference's weight-decay exemptions, and linear warm-up with a cosine to zero."""

import math

import torch
from torch import nn

from labels.settings import Optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over two groups: decayed, and exempt (biases, norms, tokens: all that is a single vector).

    Source: x-cls/superclass, training/main.py (`exclude`: ndim < 2, bn, ln, bias).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exempt = [parameter for parameter in parameters if parameter.squeeze().ndim < 2]
    decayed = [parameter for parameter in parameters if parameter.squeeze().ndim >= 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]), eps=settings.eps, fused=True)


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Rate of step `step` (from 0) of `steps`: linear to `peak` over the warm-up, then a cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
