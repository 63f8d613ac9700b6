"""How a step changes the weights: AdamW with the reference's weight-decay exemptions, linear warm-up, then cosine or
cooldown, the type that autocast computes in, fp16's loss scale, and a moving average of the weights (off by default, as
in the paper). The finite test and the skipped step are the loop's (`_update` in train/loop.py).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from labels.settings import Optimizer
from train.distributed import local

_FIRST_SCALE, _GROW_EVERY_STEPS = 2.0**16, 2000


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over decayed and exempt parameters (biases, norms, tokens: all single vectors).

    Source: x-cls/superclass, training/main.py (`exclude`: ndim < 2, bn, ln, bias).
    """
    decayed, exempt = (list(named.values()) for named in by_decay(model))
    # The fused step takes only split or only whole tensors in a group.
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
    """AdamW over groups with `params`, `weight_decay` and, optionally, a factor `lr_scale` on the loop's rate.

    Fused, since only that form skips a step that the device found not finite (`found_inf`). The moments are made now,
    also for parameters that never get a gradient, so that every checkpoint has all of them.
    """
    betas = (settings.betas[0], settings.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def by_decay(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained parameters by name: those with weight decay, and those that are exempt."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name: parameter for name, parameter in trained.items() if sum(side > 1 for side in parameter.shape) >= 2}
    return decayed, {name: parameter for name, parameter in trained.items() if name not in decayed}


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, cooldown_steps: int | None = None) -> float:
    """Of step `step` (from 0) of `steps`: linear to `peak` over the warm-up, then a cosine to 0. With `cooldown_steps`:
    constant up to these last steps, in which it falls by 1 - sqrt.

    Of the cooldowns compared in arXiv 2405.18392, 1 - sqrt ends in the lowest loss, below linear; over the last 20% of
    the steps it equals a cosine of the same length.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if cooldown_steps is not None:
        begin = steps - cooldown_steps
        return peak if step <= begin else peak * (1 - math.sqrt((step - begin) / cooldown_steps))
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in, None for fp32; `auto`: bf16 where the device supports it, else fp32."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
    if precision != "auto":
        return dtypes[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if _cpu_has_bf16() else None


def _cpu_has_bf16() -> bool:
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):  # torch 2.11 has it, 2.8 has not
        capabilities = cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


class LossScale:
    """fp16's dynamic loss scale: halved after a step that was not finite, doubled after 2,000 good ones.

    The rule is torch.amp.GradScaler's. Both numbers are on the device, so that no step waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(_FIRST_SCALE, device=device)
        self._good = torch.tensor(0.0, device=device)

    def update(self, skipped: Tensor) -> None:
        """After a step; `skipped` is 1.0 if it was not finite, else 0.0."""
        self._good = (self._good + 1) * (1 - skipped)
        grow = self._good >= _GROW_EVERY_STEPS
        self.value = torch.where(skipped > 0, self.value * 0.5, torch.where(grow, self.value * 2.0, self.value))
        self._good = torch.where(grow, torch.zeros_like(self._good), self._good)

    def state(self) -> list[float]:
        """Both numbers, for a checkpoint."""
        return [self.value.item(), self._good.item()]

    def load(self, state: list[float]) -> None:
        """Restore `state()`."""
        self.value.fill_(state[0])
        self._good.fill_(state[1])


class Ema:
    """fp32 moving averages of all weights and floating buffers of a model; integer buffers are copied.

    The averages are split like the model, which FSDP has split before. The first steps decay faster, by
    min(decay, (1 + step) / (10 + step)), so that the random initial weights fade.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # The parameters themselves: FSDP may move the memory of an unevenly split one in the first step (torch 2.8).
        self._decay, self._live = decay, model.state_dict(keep_vars=True)
        self.average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        self._others = [name for name in self._live if name not in set(self._floating)]

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """After step `step` (from 0); if `skipped` is 1.0 nothing changes."""
        weight = (1 - skipped) * (1 - min(self._decay, (1 + step) / (10 + step)))
        live, average = ([local(tensors[name]) for name in self._floating] for tensors in (self._live, self.average))
        difference = torch._foreach_sub(live, average)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(difference, weight)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(average, difference)  # type: ignore[reportPrivateImportUsage]
        for name in self._others:
            self.average[name].copy_(self._live[name])
