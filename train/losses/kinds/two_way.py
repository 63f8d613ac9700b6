"""Two-way multi-label loss (Kobayashi, CVPR 2023): hardest positives against hardest negatives, along the classes and
along the batch.

R rows of an axis (samples, or classes), N values a row (classes, or samples). With Tp = 4, Tn = 1: p = Tp logsumexp
over positives of (log w - x / Tp), n = Tn logsumexp over negatives of (x / Tn); softplus(n + p), mean over the samples
that have a positive, plus the same by class over the batch, mean over the classes that have a positive.

- IDF: w weighs the positives inside the logsumexp (Positives.weights; 1 without IDF, the paper's form). A label of
weight 0 is neither. - Only classes with a label in the batch have the second term, some quarter of them at a batch of
4,096 captions. A first pass makes the
  logits of just these classes, a part at a time, and keeps a few sums of each; with them the second pass, over rows,
  makes the gradient of both terms. So the second term takes a part of one product more, not of three, and no logits of
  the whole batch are kept.
- The batch is the global one: ranks merge the logsumexp of each class (a few numbers a class), so that two ranks give
what one gives. Under
  gradient accumulation it is the micro-batch of all ranks: the loss of the whole batch is not a mean over its parts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional

from labels.settings import Loss
from train.losses.distributed import everyone, merge_exponentials, ranks, sum_over
from train.losses.head import Head, Positives, float_blocks

WHOLE_BATCH = True
_TP = 4.0
# Tn is 1, and left out.


@dataclass(frozen=True)
class Term:
    """What an axis's gradient is made of, a value a row (a sample, or a class); float32, float64 where the logits are.

    At a negative x it is `negative * exp(x - high)`, at a positive of weight w `-positive * exp(log w - x / Tp - top)`.
    """

    high: torch.Tensor
    negative: torch.Tensor
    top: torch.Tensor
    positive: torch.Tensor


def batch_loss(settings: Loss, head: Head, labels: Positives) -> torch.Tensor:
    """See train/losses/kinds/__init__.py."""
    of_classes = head.group  # ranks that hold the other classes: the loss is then this rank's part of a sum
    of_samples = (
        None if of_classes else everyone()
    )  # ranks that hold the other samples: it is then one whose mean over the ranks counts
    samples = sum_over(labels.weighted.sum(), of_samples)
    row, place = labels.valid.nonzero(as_tuple=True)
    column, weight = labels.ids[row, place], labels.weights[row, place]
    seen = torch.zeros(len(head.weight), dtype=torch.int32, device=column.device)
    classes = sum_over(seen.index_fill_(0, column[weight > 0], 1), of_samples).nonzero().squeeze(1)
    seen_anywhere = sum_over(torch.tensor(len(classes), device=column.device), of_classes)
    by_sample, by_class = (ranks(of_samples) / max(1, count) for count in (samples.item(), seen_anywhere.item()))

    slot = torch.full_like(seen, -1).index_copy_(
        0, classes, torch.arange(len(classes), dtype=torch.int32, device=column.device)
    )[column]
    term = Term(*weight.new_zeros(4, len(seen)))  # of classes without a label, which have none: 0

    def of_class(logits: torch.Tensor, part: slice) -> torch.Tensor:
        here = (slot >= part.start) & (slot < part.stop)
        losses, found = axis_rows(
            logits, slot[here].long() - part.start, row[here], weight[here], gradient=False, group=of_samples
        )
        term.high[classes[part]], term.top[classes[part]] = found.high, found.top
        # Relative to the first term's scale, with which `head.rows` multiplies the sum of both gradients.
        term.negative[classes[part]] = found.negative * (by_class / by_sample)
        term.positive[classes[part]] = found.positive * (by_class / by_sample)
        return losses

    def of_sample(logits: torch.Tensor, labels: Positives, gradient: bool) -> torch.Tensor:
        row, place = labels.valid.nonzero(as_tuple=True)
        column, weight = labels.ids[row, place], labels.weights[row, place]
        return axis_rows(logits, row, column, weight, gradient, of_classes, term if gradient else None)[0]

    second = head.classes(of_class, classes).sum() * by_class
    return head.rows(of_sample, labels, by_sample, beside=4).sum() * by_sample + second


def axis_rows(
    logits: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    weight: torch.Tensor,
    gradient: bool,
    group: dist.ProcessGroup | None,
    term: Term | None = None,
) -> tuple[torch.Tensor, Term]:
    """softplus(n + p) of every row, 0 for rows without positives; then the logits hold the gradient.

    Args:
        logits: [R, N].
        row, column, weight: [P] each, where the positives stand and what they weigh.
        gradient: whether to leave the gradient in `logits`.
        group: ranks that hold the other values of the same rows; then the losses are this rank's parts of a sum.
        term: of the N columns, to be added to the gradient.

    Returns:
        The losses [R], and what their gradient is made of [R].
    """
    exact = weight.dtype
    lowest, tiny = torch.finfo(exact).min, torch.finfo(exact).tiny
    score = weight.log() - logits[row, column].to(exact) / _TP  # [P]
    # Finite, where there is no positive: no infinity is taken from another.
    top = score.new_full((len(logits),), -torch.inf).scatter_reduce_(0, row, score, "amax").clamp_(min=lowest)
    total = torch.zeros_like(top).index_add_(0, row, (score - top[row]).exp())
    merge_exponentials(top, total, group)
    present = total > 0
    p = torch.where(present, _TP * (top + total.log()), -torch.inf)  # [R]

    logits[row, column] = -torch.inf  # no negatives, of either term
    losses, slope, high, negative = torch.empty_like(p), torch.empty_like(p), torch.empty_like(p), torch.empty_like(p)
    for part, block in float_blocks(logits, keep=gradient, whole=group is not None):
        # Clamped for columns without a term: their exponential is to be finite, since it is multiplied by 0.
        second = None if term is None else (block - term.high).clamp_(max=0.0).exp_()
        high[part] = block.amax(dim=1).clamp_(min=lowest)
        block.sub_(high[part, None]).exp_()
        others = block.sum(dim=1)
        factor = merge_exponentials(high[part], others, group)
        both = high[part] + others.log() + p[part]  # [r], n + p
        losses[part] = torch.where(present[part], functional.softplus(both), 0.0) / ranks(group)
        slope[part] = torch.where(present[part], both.sigmoid(), 0.0)
        negative[part] = torch.where(others > 0, slope[part] / others, 0.0)
        if gradient:
            block.mul_((negative[part] * factor)[:, None])
        if term is not None and second is not None:
            block.addcmul_(second, term.negative)
    found = Term(high, negative, top, slope / total.clamp(min=tiny))
    if gradient:
        at_labels = found.positive[row] * (score - top[row]).exp()
        if term is not None:
            at_labels += term.positive[column] * (score - term.top[column]).exp()
        logits[row, column] = -at_labels.to(logits.dtype)
    return losses, found
