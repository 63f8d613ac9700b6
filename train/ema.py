"""A moving average of the weights, kept beside them in fp32 and saved with them; off by default, as in the paper."""

import torch
from torch import nn

from train.parallel import local


class Ema:
    """Averages of all weights and floating buffers of a model; integer buffers are copied.

    Args:
        model: as it is trained, after FSDP has split it; the averages are split alike.
        decay: of the average. The first steps decay faster, by min(decay, (1 + step) / (10 + step)), so that the random beginning fades.
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
