"""Cross-entropy against the IDF-weighted label distribution (SuperClass, section 3.2). R rows, V vocabulary."""

from functools import partial

import torch
import torch.distributed as dist

from labels.settings import Loss
from train.losses import softmax_kernel
from train.losses.blocks import float_blocks
from train.losses.head import Head
from train.losses.positives import Positives
from train.losses.ranks import merge_exponentials, ranks

DISTRIBUTION = True


def batch_loss(settings: Loss, head: Head, labels: Positives) -> torch.Tensor:
    """See train/losses/kinds/__init__.py."""
    return head.mean(partial(softmax_rows, group=head.group), labels)


def softmax_rows(logits: torch.Tensor, labels: Positives, gradient: bool, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """-sum_c t_c log softmax(x)_c of every row, as logsumexp(x) - sum_c t_c x_c; then the logits hold softmax(x) - t.

    Rows without weight have loss 0 and gradient 0, as in the reference (x-cls/superclass, ClsLoss).

    Args:
        logits: [R, V].
        labels: of the rows.
        gradient: whether to leave the gradient in `logits`.
        group: ranks that hold the other classes of the same rows; then the losses are this rank's parts of a sum.

    Returns:
        [R], float32 or float64.
    """
    exact = labels.shares.dtype
    picked = logits.gather(1, labels.ids).to(exact)
    if softmax_kernel.serves(logits):
        top, total = softmax_kernel.statistics(logits)
        merge_exponentials(top, total, group)
        if gradient:
            softmax_kernel.put_gradient(logits, top, total, labels)
        return _losses(picked - top, total, labels, group)
    top, total = picked.new_empty(2, len(logits), 1)
    for rows, block in float_blocks(logits, keep=gradient, whole=group is not None):
        top[rows] = block.amax(dim=1, keepdim=True)
        torch.softmax(block, dim=1, out=block)  # in fewer passes, and with a faster exponential, than its steps one by one
        own = block.amax(dim=1, keepdim=True).reciprocal_()  # the largest is exp(0) / total
        total[rows] = own
        factor = merge_exponentials(top[rows], total[rows], group)
        if gradient:
            block.mul_(labels.weighted[rows, None] * own / total[rows] * factor)
    above = picked - top  # [R, K]; never the large common part of all logits
    if gradient:
        labels.put(logits, (labels.weighted[:, None] * above.exp() / total - labels.shares).to(logits.dtype))
    return _losses(above, total, labels, group)


def _losses(above: torch.Tensor, total: torch.Tensor, labels: Positives, group: dist.ProcessGroup | None) -> torch.Tensor:
    """From the labels' logits [R, K] less the row's largest, and the rows' sums of exponentials [R, 1]."""
    targets = labels.shares.masked_fill(~labels.valid, 0.0)
    return total.squeeze(1).log() * labels.weighted / ranks(group) - (targets * above).sum(dim=1)
