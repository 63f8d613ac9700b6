"""CLIP's loss over the batch of all ranks (arXiv 2103.00020): open_clip's, with local_loss and gather_with_grad.

    logits = scale * images texts'      rows and columns: the pairs of all ranks
    loss   = (mean cross-entropy of the rows against the diagonal + the same of the columns) / 2

Each rank computes the rows of its own images and the columns of its own texts, so that no rank holds all logits;
gathered features return their gradients to the rank that they come from. The mean of the ranks' losses is the loss of
the whole batch, and so are the gradients that DDP and FSDP average. B pairs of this rank, G of all ranks, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from train.distributed import ranks, sum_over


def contrastive_loss(
    images: Tensor, texts: Tensor, valid: Tensor, scale: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """This rank's part of the loss, a scalar (0 without valid pairs), from unit vectors [B, D], pair by pair.

    A sample with `valid`, bool [B], False (damaged image, caption without tokens) has no loss and is no negative.
    """
    images, texts = images.float(), texts.float()  # logits up to 100: half precision would round cosines to 0.01
    all_images, all_texts = gather(images, group), gather(texts, group)
    invalid = ~gather(valid.to(torch.uint8), group).bool()  # [G]
    rank = 0 if group is None else dist.get_rank(group)
    own = torch.arange(len(images), device=images.device) + rank * len(images)
    total = torch.zeros((), device=images.device)
    for mine, others in ((images, all_texts), (texts, all_images)):
        logits = (scale * mine @ others.T).masked_fill(invalid, float("-inf"))  # [B, G]
        each = functional.cross_entropy(logits.masked_fill(~valid[:, None], 0.0), own, reduction="none")
        total = total + (each * valid).sum() / 2
    pairs = sum_over(valid.sum().float(), group)
    return total * ranks(group) / pairs.clamp(min=1)


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, ...] of every rank as one [G, ...], in the order of the ranks; gradients return to all ranks."""
    return tensor if group is None else _Gather.apply(tensor, group)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """torch.distributed.nn.all_gather, which is deprecated; the gradient is this rank's part of all ranks' sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = sum_over(gradient.contiguous().clone(), ctx.group)
        start = dist.get_rank(ctx.group) * ctx.count
        return gradient[start : start + ctx.count], None
