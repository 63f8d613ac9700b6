"""In which numbers a step computes: autocast's type, and the loss scale that fp16 needs."""

import torch

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

    The rule is torch.amp.GradScaler's; the finite test and the skipped step are the loop's own, the same in every precision.

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
