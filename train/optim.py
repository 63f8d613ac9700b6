"""AdamW with the reference's weight-decay exemptions, and linear warm-up with a cosine to zero."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from labels.settings import Optimizer
from train.distributed import local


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over two groups: decayed, and exempt (biases, norms, tokens: all that is a single vector).

    Source: x-cls/superclass, training/main.py (`exclude`: ndim < 2, bn, ln, bias).
    """
    decayed, exempt = (list(named.values()) for named in by_decay(model))
    # The fused step takes split and whole tensors one kind at a time.
    groups = [
        {
            "params": [parameter for parameter in members if isinstance(parameter, DTensor) == split],
            "weight_decay": decay,
        }
        for members, decay in ((decayed, settings.weight_decay), (exempt, 0.0))
        for split in (False, True)
    ]
    return adamw([group for group in groups if group["params"]], settings)


def adamw(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over groups of parameters that tell their weight decay and, if another than 1, the factor `lr_scale` on the
    loop's rate.

    Fused, since only that form skips a step that the device itself found not to be finite (`found_inf`). The moments
    are made at once, for parameters too that never get a gradient: a checkpoint then always has all of them.
    """
    betas = (settings.betas[0], settings.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        step = torch.zeros((), device=parameter.device)
        optimizer.state[parameter] = {
            "step": step,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
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


# ---- precision: In which numbers a step computes: autocast's type, and the loss scale that fp16 needs.


_FIRST_SCALE, _GROW_EVERY_STEPS = 2.0**16, 2000


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in, None for fp32; `auto`: bf16 where the device computes in it, fp32 elsewhere."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
    if precision != "auto":
        return named[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


class LossScale:
    """fp16's dynamic loss scale: halved after a step that was not finite, doubled after 2,000 good ones.

    The rule is torch.amp.GradScaler's; the finite test and the skipped step are the loop's own, the same in every
    precision.

    Args:
        device: where both numbers live, so that no step waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(_FIRST_SCALE, device=device)
        self._good = torch.tensor(0.0, device=device)

    def update(self, skipped: torch.Tensor) -> None:
        """After a step: `skipped` is 1.0 where it was not finite, else 0.0."""
        self._good = (self._good + 1) * (1 - skipped)
        grow = self._good >= _GROW_EVERY_STEPS
        self.value = torch.where(skipped > 0, self.value * 0.5, torch.where(grow, self.value * 2.0, self.value))
        self._good = torch.where(grow, torch.zeros_like(self._good), self._good)

    def state(self) -> list[float]:
        """Both numbers, for a checkpoint."""
        return [self.value.item(), self._good.item()]

    def load(self, state: list[float]) -> None:
        """Go on from `state()`."""
        self.value.fill_(state[0])
        self._good.fill_(state[1])


# ---- ema: A moving average of the weights, kept beside them in fp32 and saved with them; off by default, as in the
# paper.


class Ema:
    """Averages of all weights and floating buffers of a model; integer buffers are copied.

    Args:
        model: as it is trained, after FSDP has split it; the averages are split alike.
        decay: of the average. The first steps decay faster, by min(decay, (1 + step) / (10 + step)), so that the random
            beginning fades.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._live = decay, model.state_dict()
        self.average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        self._floats = [local(self._live[name]) for name in floating], [local(self.average[name]) for name in floating]
        self._others = [name for name in self._live if name not in set(floating)]

    @torch.no_grad()
    def update(self, step: int, skipped: torch.Tensor) -> None:
        """After step `step` (from 0); where `skipped` is 1.0 nothing moves."""
        weight = (1 - skipped) * (1 - min(self._decay, (1 + step) / (10 + step)))
        live, average = self._floats
        way = torch._foreach_sub(live, average)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(way, weight)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(average, way)  # type: ignore[reportPrivateImportUsage]
        for name in self._others:
            self.average[name].copy_(self._live[name])
