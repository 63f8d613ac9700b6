"""Cross-entropy against the IDF-weighted label distribution (SuperClass, section 3.2). R rows, V vocabulary."""

import os
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist

from labels.settings import Loss
from train.losses.distributed import merge_exponentials, ranks
from train.losses.head import Head, Positives, float_blocks

# ---- softmax_kernel: softmax.py's pass over a chunk's logits as one Triton kernel, for CUDA: logsumexp online,
# gradient in place, labels included.
#
# R rows, V classes, K label limit. A program takes a row: it reads the logits once for maximum and sum, and once more,
# while they are still in the L2 cache, to put the gradient into their place; all in float32, whatever the logits' type.
# torch's own operations, a block at a time, read and write them several times. Where Triton is missing softmax.py does
# without; torch's CUDA builds bring it. Tested in Triton's interpreter, which runs it on the CPU; no GPU has measured
# it.


_BLOCK = 4096
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_INSTALLED = find_spec("triton") is not None

if _INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def _statistics(logits, tops, totals, columns, block: tl.constexpr):  # noqa: ANN202  (types are Triton's)
        row = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, block)
        # One maximum and sum a lane; together they are one of each in the end. Finite, so that no infinity is taken
        # from another.
        top = tl.full((block,), -3.0e38, tl.float32)
        total = tl.zeros((block,), tl.float32)
        for start in range(0, columns, block):
            inside = start + place < columns
            x = tl.load(logits + row * columns + start + place, mask=inside, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, x)
            total = total * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        highest = tl.max(top, 0)
        tl.store(tops + row, highest)
        tl.store(totals + row, tl.sum(total * tl.exp(top - highest), 0))

    @triton.jit
    def _gradient(  # noqa: ANN202
        logits, tops, totals, weighted, ids, shares, columns, limit, block: tl.constexpr, places: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, block)
        start_of_row = logits + row * columns
        top = tl.load(tops + row)
        scale = tl.load(weighted + row) / tl.load(totals + row)
        # The labels' logits are read before any thread writes, and written after all threads have.
        label = tl.arange(0, places)
        is_label = label < limit
        column = tl.load(ids + row * limit + label, mask=is_label, other=0)
        share = tl.load(shares + row * limit + label, mask=is_label, other=0.0)
        picked = tl.load(start_of_row + column, mask=is_label, other=0.0).to(tl.float32)
        tl.debug_barrier()
        for start in range(0, columns, block):
            inside = start + place < columns
            x = tl.load(start_of_row + start + place, mask=inside, other=-float("inf")).to(tl.float32)
            tl.store(start_of_row + start + place, (tl.exp(x - top) * scale).to(logits.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        tl.store(
            start_of_row + column, (tl.exp(picked - top) * scale - share).to(logits.dtype.element_ty), mask=is_label
        )


def serves(logits: torch.Tensor) -> bool:
    """Whether the kernels take these logits: on CUDA (in Triton's interpreter anywhere), not in float64, Triton there."""
    return (logits.is_cuda or _INTERPRETED) and logits.dtype != torch.float64 and _INSTALLED


def statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit and sum of exp(x - largest) of every row.

    Args:
        logits: [R, V], contiguous; float32, bfloat16 or float16.

    Returns:
        float32 [R, 1] each.
    """
    tops, totals = torch.empty(2, len(logits), 1, device=logits.device)
    _statistics[(len(logits),)](logits, tops, totals, logits.shape[1], block=_block(logits))  # type: ignore[arg-type]
    return tops, totals


def put_gradient(logits: torch.Tensor, tops: torch.Tensor, totals: torch.Tensor, labels: Positives) -> None:
    """softmax(x) - t in the place of x; 0 in rows without weight.

    Args:
        logits: [R, V], as given to `statistics`.
        tops, totals: float32 [R, 1] each, over all classes, also those that other ranks have.
        labels: of the rows, in float32.
    """
    limit = labels.ids.shape[1]
    _gradient[(len(logits),)](
        logits,
        tops,
        totals,
        labels.weighted.float(),
        labels.ids.contiguous(),
        labels.shares.contiguous(),
        logits.shape[1],
        limit,
        block=_block(logits),  # type: ignore[arg-type]
        places=triton.next_power_of_2(max(limit, 1)),  # type: ignore[arg-type]
    )


def _block(logits: torch.Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(logits.shape[1]))


DISTRIBUTION = True


def batch_loss(settings: Loss, head: Head, labels: Positives) -> torch.Tensor:
    """See train/losses/kinds/__init__.py."""
    return head.mean(partial(softmax_rows, group=head.group), labels)


def softmax_rows(
    logits: torch.Tensor, labels: Positives, gradient: bool, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
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
    if serves(logits):
        top, total = statistics(logits)
        merge_exponentials(top, total, group)
        if gradient:
            put_gradient(logits, top, total, labels)
        return _losses(picked - top, total, labels, group)
    top, total = picked.new_empty(2, len(logits), 1)
    for rows, block in float_blocks(logits, keep=gradient, whole=group is not None):
        top[rows] = block.amax(dim=1, keepdim=True)
        torch.softmax(
            block, dim=1, out=block
        )  # in fewer passes, and with a faster exponential, than its steps one by one
        own = block.amax(dim=1, keepdim=True).reciprocal_()  # the largest is exp(0) / total
        total[rows] = own
        factor = merge_exponentials(top[rows], total[rows], group)
        if gradient:
            block.mul_(labels.weighted[rows, None] * own / total[rows] * factor)
    above = picked - top  # [R, K]; never the large common part of all logits
    if gradient:
        labels.put(logits, (labels.weighted[:, None] * above.exp() / total - labels.shares).to(logits.dtype))
    return _losses(above, total, labels, group)


def _losses(
    above: torch.Tensor, total: torch.Tensor, labels: Positives, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """From the labels' logits [R, K] less the row's largest, and the rows' sums of exponentials [R, 1]."""
    targets = labels.shares.masked_fill(~labels.valid, 0.0)
    return total.squeeze(1).log() * labels.weighted / ranks(group) - (targets * above).sum(dim=1)
