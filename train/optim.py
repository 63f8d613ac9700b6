"""How a step changes the weights: AdamW with the reference's weight-decay exemptions, or Muon for the trunk's matrices;
linear warm-up, then cosine or cooldown; the type that autocast computes in, fp16's loss scale, and a moving average of
the weights (off by default, as in the paper). The finite test and the skipped step are the loop's (`_update` in
train/loop.py).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from labels.settings import Optimizer
from labels.storage import UserError
from train.distributed import local

_FIRST_SCALE, _GROW_EVERY_STEPS = 2.0**16, 2000
_MUON_MOMENTUM = 0.95  # of all published runs: arXiv 2502.16982, 2509.02046


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW over decayed and exempt parameters (biases, norms, tokens: all single vectors); with `name: muon`, Muon
    over the trunk's matrices, which are decayed, and AdamW over all else.

    Source: x-cls/superclass, training/main.py (`exclude`: ndim < 2, bn, ln, bias).
    """
    decayed, exempt = by_decay(model)
    matrices = muon_matrices(model) if settings.name == "muon" else {}
    members = [
        ([parameter for name, parameter in decayed.items() if name not in matrices], settings.weight_decay),
        (list(exempt.values()), 0.0),
    ]
    # The fused step takes only split or only whole tensors in a group.
    groups = [
        {
            "params": [parameter for parameter in parameters if isinstance(parameter, DTensor) == split],
            "weight_decay": decay,
        }
        for parameters, decay in members
        for split in (False, True)
    ]
    others = adamw([group for group in groups if group["params"]], settings)
    return MuonAndAdamW(list(matrices.values()), others, settings) if settings.name == "muon" else others


def muon_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What Muon trains, by name: the weights of the trunk's linear layers, without those of its patch embedding.

    UserError if torch has no Muon, or the trunk no such layer.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"train.optimizer.name is muon, but torch {torch.__version__} has no Muon",
            allowed="torch 2.9 or newer",
            fix="pip install 'torch>=2.9', or --set train.optimizer.name=adamw",
        )
    matrices = {
        name: parameter
        for name, parameter in by_decay(model)[0].items()
        if name.startswith("trunk.") and name.endswith(".weight") and "patch_embed" not in name
        if isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear)
    }
    if not matrices:
        raise UserError(
            "train.optimizer.name is muon, but the trunk has no linear layer that is trained",
            allowed="a trunk such as a ViT or ConvNeXt that is not frozen",
            fix="--set train.optimizer.name=adamw",
        )
    return matrices


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon over matrices and AdamW over all else, as one optimizer with the loop's `found_inf`.

    Muon's steps are scaled to the size of AdamW's (`match_rms_adamw`, arXiv 2502.16982), so that learning rate and
    weight decay have the meaning that they have there. torch's Muon does not know `grad_scale` and `found_inf`: here
    the gradients are divided before; on a device, which must not be waited for, a skipped step is taken back after.
    """

    def __init__(self, matrices: list[nn.Parameter], others: torch.optim.AdamW, settings: Optimizer) -> None:
        self._adamw = others
        self._muon = torch.optim.Muon(  # type: ignore[reportAttributeAccessIssue]
            matrices,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=_MUON_MOMENTUM,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )
        for group in self._muon.param_groups:
            group["lr_scale"] = (settings.muon_lr or settings.lr) / settings.lr
        for matrix in matrices:
            self._muon.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})
        self.state.update(self._adamw.state)
        self.state.update(self._muon.state)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both; nothing changes where `found_inf` is 1.0."""
        self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        matrices = [matrix for matrix in self._muon.param_groups[0]["params"] if matrix.grad is not None]
        if self.grad_scale is not None:
            for matrix in matrices:
                local(matrix.grad).div_(self.grad_scale)
        if self.found_inf is None:
            self._muon.step()
            return
        changing = [local(tensor) for each in matrices for tensor in (each, self.state[each]["momentum_buffer"])]
        before = [tensor.clone() for tensor in changing]
        self._muon.step()
        for tensor, old in zip(changing, before, strict=True):
            torch.where(self.found_inf > 0, old, tensor, out=tensor)


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
