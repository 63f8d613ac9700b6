"""Two-way multi-label loss (Kobayashi, CVPR 2023): hardest positives against hardest negatives, along the classes and along the batch.

R rows of an axis (samples, or classes), N values a row (classes, or samples). With Tp = 4, Tn = 1:
p = Tp logsumexp over positives of (log w - x / Tp), n = Tn logsumexp over negatives of (x / Tn); softplus(n + p), mean over the
samples that have a positive, plus the same by class over the batch, mean over the classes that have a positive.

- IDF: w weighs the positives inside the logsumexp (Positives.weights; 1 without IDF, the paper's form). A label of weight 0 is neither.
- Only classes with a label in the batch have the second term, some fifth of them at a batch of 4,096 captions. So that term is a second,
  smaller pass over just these classes, all of the batch at once, and no logits of the whole batch are kept.
- The batch is the global one: ranks merge the logsumexp of each class (a few numbers a class), so that two ranks give what one gives. Under
  gradient accumulation it is the micro-batch of all ranks: the loss of the whole batch is not a mean over its parts.
"""

import torch
import torch.distributed as dist
from torch.nn import functional

from train.losses.blocks import float_blocks
from train.losses.head import Head
from train.losses.positives import Positives
from train.losses.ranks import merge_exponentials, ranks, sum_over

_TP = 4.0
# Tn is 1, and left out.


def two_way(head: Head, labels: Positives, of_samples: dist.ProcessGroup | None, of_classes: dist.ProcessGroup | None) -> torch.Tensor:
    """The loss of the batch, scalar; adds its gradients to the head's.

    Args:
        head: of this rank's samples and classes.
        labels: of these samples and classes.
        of_samples: ranks that hold the other samples; the loss is then one whose mean over the ranks counts.
        of_classes: ranks that hold the other classes; the loss is then this rank's part of a sum. One of the two groups is None.
    """
    samples = sum_over(labels.weighted.sum(), of_samples)
    row, place = labels.valid.nonzero(as_tuple=True)
    column, weight = labels.ids[row, place], labels.weights[row, place]
    seen = torch.zeros(len(head.weight), dtype=torch.int32, device=column.device)
    classes = sum_over(seen.index_fill_(0, column[weight > 0], 1), of_samples).nonzero().squeeze(1)
    seen_anywhere = sum_over(torch.tensor(len(classes), device=column.device), of_classes)

    def by_sample(logits: torch.Tensor, labels: Positives, gradient: bool) -> torch.Tensor:
        row, place = labels.valid.nonzero(as_tuple=True)
        return axis_rows(logits, row, labels.ids[row, place], labels.weights[row, place], gradient, of_classes)

    slot = torch.full_like(seen, -1).index_copy_(0, classes, torch.arange(len(classes), dtype=torch.int32, device=column.device))[column]

    def by_class(logits: torch.Tensor, part: slice) -> torch.Tensor:
        here = (slot >= part.start) & (slot < part.stop)
        return axis_rows(logits, slot[here].long() - part.start, row[here], weight[here], head.training, of_samples)

    scales = [ranks(of_samples) / max(1, count) for count in (samples.item(), seen_anywhere.item())]
    return head.rows(by_sample, labels, scales[0]).sum() * scales[0] + head.classes(by_class, classes, scales[1]).sum() * scales[1]


def axis_rows(
    logits: torch.Tensor, row: torch.Tensor, column: torch.Tensor, weight: torch.Tensor, gradient: bool, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """softplus(n + p) of every row, 0 for rows without positives; then the logits hold the gradient.

    Args:
        logits: [R, N].
        row, column, weight: [P] each, where the positives stand and what they weigh.
        gradient: whether to leave the gradient in `logits`.
        group: ranks that hold the other values of the same rows; then the losses are this rank's parts of a sum.
    """
    exact = weight.dtype
    score = weight.log() - logits[row, column].to(exact) / _TP  # [P]
    top = score.new_full((len(logits),), -torch.inf).scatter_reduce_(0, row, score, "amax")
    top.clamp_(min=torch.finfo(exact).min)  # finite, where there is no positive: no infinity is taken from another
    total = torch.zeros_like(top).index_add_(0, row, (score - top[row]).exp())
    merge_exponentials(top, total, group)
    positive = total > 0
    p = torch.where(positive, _TP * (top + total.log()), -torch.inf)  # [R]

    logits[row, column] = -torch.inf
    losses = torch.empty_like(p)
    slope = torch.empty_like(p)
    for part, block in float_blocks(logits, keep=gradient, whole=group is not None):
        high = block.amax(dim=1).clamp_(min=torch.finfo(exact).min)
        block.sub_(high[:, None]).exp_()
        others = block.sum(dim=1)
        factor = merge_exponentials(high, others, group)
        both = high + others.log() + p[part]  # [r], n + p
        losses[part] = torch.where(positive[part], functional.softplus(both), 0.0) / ranks(group)
        slope[part] = torch.where(positive[part], both.sigmoid(), 0.0)
        if gradient:
            block.mul_((torch.where(others > 0, slope[part] / others, 0.0) * factor)[:, None])
    if gradient:
        logits[row, column] = (-slope[row] * (score - top[row]).exp() / total.clamp(min=torch.finfo(exact).tiny)[row]).to(logits.dtype)
    return losses
