"""Two-way multi-label loss (Kobayashi, CVPR 2023): hardest positives against hardest negatives, by sample and by class.

Of an axis with R rows (samples, or classes) of N values: p = Tp logsumexp over positives of (log w - x / Tp), n = Tn
logsumexp over negatives of (x / Tn), Tp = 4, Tn = 1. The loss is softplus(n + p), mean over the samples that have a
positive, plus the same by class over the batch, mean over the classes that have a positive.

- IDF: w (Positives.weights; 1 without IDF, the paper's form) weighs the positives; a label of weight 0 is neither.
- A first pass over only the classes with a label in the batch (a quarter of them at 4,096 captions) keeps a few sums of
  each; the second pass, over rows, makes the gradient of both terms: part of one more product, not three.
- The batch is that of all ranks: ranks merge the logsumexp of each class, so that two ranks give the result of one.
  Under gradient accumulation it would be a micro-batch, so accumulation is refused.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from labels.settings import Loss
from train.distributed import everyone, merge_exponentials, ranks, sum_over
from train.losses.head import Head, Positives, float_blocks

WHOLE_BATCH = True
_TP = 4.0  # Tn is 1


@dataclass(frozen=True)
class Term:
    """What the gradient along an axis is made of, a value per row (a sample, or a class).

    At a negative x it is `negative * exp(x - high)`, at a positive of weight w `-positive * exp(log w - x / Tp - top)`.
    """

    high: Tensor
    negative: Tensor
    top: Tensor
    positive: Tensor


def batch_loss(settings: Loss, head: Head, labels: Positives) -> Tensor:
    # Other ranks hold either the other classes, and the loss is this rank's part of a sum, or the other samples, and
    # the loss is the mean over ranks.
    of_classes = head.group
    of_samples = None if of_classes else everyone()
    samples = sum_over(labels.weighted.sum(), of_samples)
    row, column, weight = _entries(labels)
    seen = torch.zeros(len(head.weight), dtype=torch.int32, device=column.device)
    classes = sum_over(seen.index_fill_(0, column[weight > 0], 1), of_samples).nonzero().squeeze(1)
    seen_anywhere = sum_over(torch.tensor(len(classes), device=column.device), of_classes)
    by_sample, by_class = (ranks(of_samples) / max(1, count) for count in (samples.item(), seen_anywhere.item()))

    numbers = torch.arange(len(classes), dtype=torch.int32, device=column.device)
    slot = torch.full_like(seen, -1).index_copy_(0, classes, numbers)[column]
    term = Term(*weight.new_zeros(4, len(seen)))  # 0 for classes without a label

    def class_loss(logits: Tensor, part: slice) -> Tensor:
        inside = (slot >= part.start) & (slot < part.stop)
        entries = slot[inside].long() - part.start, row[inside], weight[inside]
        losses, own = axis_rows(logits, *entries, gradient=False, group=of_samples)
        term.high[classes[part]], term.top[classes[part]] = own.high, own.top
        # Relative to the first term's scale, by which `head.rows` multiplies the sum of both gradients.
        term.negative[classes[part]] = own.negative * (by_class / by_sample)
        term.positive[classes[part]] = own.positive * (by_class / by_sample)
        return losses

    def sample_loss(logits: Tensor, labels: Positives, gradient: bool) -> Tensor:
        return axis_rows(logits, *_entries(labels), gradient, of_classes, term if gradient else None)[0]

    second = head.classes(class_loss, classes).sum() * by_class
    return head.rows(sample_loss, labels, by_sample, extra_bytes=4).sum() * by_sample + second


def _entries(labels: Positives) -> tuple[Tensor, Tensor, Tensor]:
    """Row, class and weight of every label, [P] each."""
    row, slot = labels.valid.nonzero(as_tuple=True)
    return row, labels.ids[row, slot], labels.weights[row, slot]


def axis_rows(
    logits: Tensor,
    row: Tensor,
    column: Tensor,
    weight: Tensor,
    gradient: bool,
    group: dist.ProcessGroup | None,
    term: Term | None = None,
) -> tuple[Tensor, Term]:
    """softplus(n + p) of every row of [R, N], 0 for rows without positives, and what its gradient is made of.

    `row`, `column`, `weight` [P] are those of the positives. With `gradient`, leaves the gradient in the logits, plus
    that of `term`, of the N columns. `group`: ranks that hold the other values of the same rows; the losses are then
    this rank's parts of a sum.
    """
    exact = weight.dtype
    lowest, tiny = torch.finfo(exact).min, torch.finfo(exact).tiny
    score = weight.log() - logits[row, column].to(exact) / _TP  # [P]
    # Finite without positives: no infinity is subtracted from another.
    top = score.new_full((len(logits),), -torch.inf).scatter_reduce_(0, row, score, "amax").clamp_(min=lowest)
    total = torch.zeros_like(top).index_add_(0, row, (score - top[row]).exp())
    merge_exponentials(top, total, group)
    present = total > 0
    p = torch.where(present, _TP * (top + total.log()), -torch.inf)  # [R]

    logits[row, column] = -torch.inf  # not a negative of either term
    losses, slope, high, negative = torch.empty_like(p), torch.empty_like(p), torch.empty_like(p), torch.empty_like(p)
    for part, block in float_blocks(logits, keep=gradient, whole=group is not None):
        # Clamped for columns without a term: their exponential must be finite, since it is multiplied by 0.
        second = None if term is None else (block - term.high).clamp_(max=0.0).exp_()
        high[part] = block.amax(dim=1).clamp_(min=lowest)
        block.sub_(high[part, None]).exp_()
        sums = block.sum(dim=1)
        factor = merge_exponentials(high[part], sums, group)
        both = high[part] + sums.log() + p[part]  # [r], n + p
        losses[part] = torch.where(present[part], functional.softplus(both), 0.0) / ranks(group)
        slope[part] = torch.where(present[part], both.sigmoid(), 0.0)
        negative[part] = torch.where(sums > 0, slope[part] / sums, 0.0)
        if gradient:
            block.mul_((negative[part] * factor)[:, None])
        if term is not None and second is not None:
            block.addcmul_(second, term.negative)
    own = Term(high, negative, top, slope / total.clamp(min=tiny))
    if gradient:
        at_labels = own.positive[row] * (score - top[row]).exp()
        if term is not None:
            at_labels += term.positive[column] * (score - term.top[column]).exp()
        logits[row, column] = -at_labels.to(logits.dtype)
    return losses, own
