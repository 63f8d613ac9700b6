"""Loss and gradients in one forward pass, as autograd sees them."""

from collections.abc import Callable
from typing import Any

import torch

Compute = Callable[[tuple[bool, ...]], tuple[torch.Tensor, list[torch.Tensor | None]]]
"""Which of features, weight and bias want a gradient -> loss, scalar; their gradients, for it alone."""


class _Fused(torch.autograd.Function):
    """The gradients are made with the loss; backward multiplies them by what comes from above and gives them away.

    They are as large as the head: a copy would cost as much memory again, and its first touch some hundredths of a
        second. So a second
    backward pass over a retained graph computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, compute: Compute
    ) -> torch.Tensor:
        ctx.compute, ctx.dtypes = compute, (features.dtype, weight.dtype, bias.dtype)
        loss, ctx.gradients = compute(ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss has no second derivative: backward(create_graph=True) is not supported")
        gradients, ctx.gradients = ctx.gradients or ctx.compute(ctx.needs_input_grad[:3])[1], None
        # Asking for the value costs nothing on a CPU, and without accumulation it is 1.
        if above.device.type != "cpu" or above.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(above)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (*(None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs), None)


@torch.compiler.disable
def fused(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, compute: Compute) -> torch.Tensor:
    """A scalar loss whose gradients with regard to the three are known as soon as it is.

    Args:
        features, weight, bias: as given by the caller, for autograd.
        compute: does the work, on the same three.

    Raises:
        RuntimeError: in backward, when a second derivative is asked for.
    """
    if torch.is_grad_enabled():
        return _Fused.apply(features, weight, bias, compute)  # type: ignore[return-value]
    return compute((False, False, False))[0]


def product_type(features: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What the head's products are computed in: autocast's type, else the operands'.

    A CPU without bf16 or fp16 instructions computes in float32: more exact, and many times as fast as torch's fallback.
    """
    kind = weight.device.type
    if weight.dtype == torch.float64:
        return torch.float64
    dtype = (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind)
        else torch.promote_types(features.dtype, weight.dtype)
    )
    return torch.float32 if kind == "cpu" and dtype != torch.float32 and not fast_on_cpu(dtype) else dtype


def fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit type by instructions of its own."""
    asked = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return asked()
