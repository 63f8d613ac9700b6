"""Cross-entropy against the IDF-weighted label distribution (SuperClass, section 3.2). R rows, V vocabulary."""

import torch

from train.losses.blocks import float_blocks
from train.losses.positives import Positives


def softmax_rows(logits: torch.Tensor, labels: Positives, gradient: bool) -> torch.Tensor:
    """-sum_c t_c log softmax(x)_c of every row, as logsumexp(x) - sum_c t_c x_c; then the logits hold softmax(x) - t.

    Rows without weight have loss 0 and gradient 0, as in the reference (x-cls/superclass, ClsLoss).

    Args:
        logits: [R, V].
        labels: of the rows.
        gradient: whether to leave the gradient in `logits`.

    Returns:
        [R], float32 or float64.
    """
    exact = labels.shares.dtype
    picked = logits.gather(1, labels.ids).to(exact)
    top, total = picked.new_empty(2, len(logits), 1)
    for rows, block in float_blocks(logits, keep=gradient):
        top[rows] = block.amax(dim=1, keepdim=True)
        block.sub_(top[rows]).exp_()
        total[rows] = block.sum(dim=1, keepdim=True)
        if gradient:
            block.mul_(labels.weighted[rows, None] / total[rows])
    above = picked - top  # [R, K]; never the large common part of all logits
    if gradient:
        logits.scatter_(1, labels.ids, (labels.weighted[:, None] * above.exp() / total - labels.shares).to(logits.dtype))
    targets = labels.shares.masked_fill(~labels.valid, 0.0)
    losses = total.squeeze(1).log() * labels.weighted - (targets * above).sum(dim=1)
    return losses
