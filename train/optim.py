"""AdamW with the reference's weight-decay exemptions, and linear warm-up with a cosine to zero."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from labels.settings import Optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over two groups: decayed, and exempt (biases, norms, tokens: all that is a single vector).

    Source: x-cls/superclass, training/main.py (`exclude`: ndim < 2, bn, ln, bias).
    """
    decayed, exempt = (list(named.values()) for named in by_decay(model))
    # The fused step takes split and whole tensors one kind at a time.
    groups = [
        {"params": [parameter for parameter in members if isinstance(parameter, DTensor) == split], "weight_decay": decay}
        for members, decay in ((decayed, settings.weight_decay), (exempt, 0.0))
        for split in (False, True)
    ]
    return adamw([group for group in groups if group["params"]], settings)


def adamw(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over groups of parameters that tell their weight decay and, if another than 1, the factor `lr_scale` on the loop's rate.

    Fused, since only that form skips a step that the device itself found not to be finite (`found_inf`). The moments are made at once,
    for parameters too that never get a gradient: a checkpoint then always has all of them.
    """
    betas = (settings.betas[0], settings.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        step = torch.zeros((), device=parameter.device)
        optimizer.state[parameter] = {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def by_decay(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained parameters by name: those that weight decay acts on, and those that are exempt."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name: parameter for name, parameter in trained.items() if sum(side > 1 for side in parameter.shape) >= 2}
    return decayed, {name: parameter for name, parameter in trained.items() if name not in decayed}


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Rate of step `step` (from 0) of `steps`: linear to `peak` over the warm-up, then a cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
