"""Cross-entropy against the IDF-weighted label distribution (SuperClass, section 3.2).

Loss of a row: logsumexp(x) - sum_c t_c x_c; gradient: softmax(x) - t, in place of the logits x [R, V]. On a CPU in
blocks of rows that fit the cache; on CUDA by two Triton kernels, which read the logits twice and write them once (the
matrix products remain cuBLAS's). The kernels are tested in Triton's interpreter and compile for compute capabilities
8.0 and 9.0; no GPU has measured their gain. R rows, V vocabulary, K label limit.
"""

import os
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labels.settings import Loss
from train.distributed import merge_exponentials, ranks
from train.losses.head import Head, Positives, float_blocks

DISTRIBUTION = True
_BLOCK = 4096
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = find_spec("triton") is not None


def batch_loss(settings: Loss, head: Head, labels: Positives) -> Tensor:
    return head.mean(partial(softmax_rows, group=head.group), labels)


def softmax_rows(logits: Tensor, labels: Positives, gradient: bool, group: dist.ProcessGroup | None = None) -> Tensor:
    """Losses [R] in float32 or float64; with `gradient`, leaves softmax(x) - t in the logits [R, V].

    Rows without weight have loss 0 and gradient 0, as in the reference (x-cls/superclass, ClsLoss). `group`: ranks that
    hold the other classes of the same rows; the losses are then this rank's parts of a sum.
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
        torch.softmax(block, dim=1, out=block)  # fewer passes and a faster exponential than its steps one by one
        own = block.amax(dim=1, keepdim=True).reciprocal_()  # the largest is exp(0) / total
        total[rows] = own
        factor = merge_exponentials(top[rows], total[rows], group)
        if gradient:
            block.mul_(labels.weighted[rows, None] * own / total[rows] * factor)
    above = picked - top  # [R, K]; never the large common part of all logits
    if gradient:
        labels.put(logits, (labels.weighted[:, None] * above.exp() / total - labels.shares).to(logits.dtype))
    return _losses(above, total, labels, group)


def _losses(above: Tensor, total: Tensor, labels: Positives, group: dist.ProcessGroup | None) -> Tensor:
    """From the labels' logits less the row's largest [R, K], and the rows' sums of exponentials [R, 1]."""
    targets = labels.shares.masked_fill(~labels.valid, 0.0)
    return total.squeeze(1).log() * labels.weighted / ranks(group) - (targets * above).sum(dim=1)


# -- the Triton kernels: one program per row, float32 whatever the logits' type


def serves(logits: Tensor) -> bool:
    """Whether the kernels take these logits: on CUDA (in Triton's interpreter on any device), not in float64."""
    return (logits.is_cuda or _INTERPRETED) and logits.dtype != torch.float64 and _INSTALLED


def statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and sum of exp(x - largest) of every row of contiguous logits [R, V]: float32 [R, 1] each."""
    tops, totals = torch.empty(2, len(logits), 1, device=logits.device)
    _statistics[(len(logits),)](logits, tops, totals, logits.shape[1], block=_block(logits))  # type: ignore[arg-type]
    return tops, totals


def put_gradient(logits: Tensor, tops: Tensor, totals: Tensor, labels: Positives) -> None:
    """Write softmax(x) - t over the logits, 0 in rows without weight; `tops` and `totals` are those of all ranks."""
    limit = labels.ids.shape[1]
    ids, shares, weighted = labels.ids.contiguous(), labels.shares.contiguous(), labels.weighted.float()
    constants: Any = {"block": _block(logits), "slots": triton.next_power_of_2(max(limit, 1))}
    _gradient[(len(logits),)](logits, tops, totals, weighted, ids, shares, logits.shape[1], limit, **constants)


def _block(logits: Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(logits.shape[1]))


if _INSTALLED:
    import triton
    import triton.language as tl

    @triton.jit
    def _statistics(logits, tops, totals, columns, block: tl.constexpr):  # noqa: ANN202  (types are Triton's)
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, block)
        # One maximum and sum per lane, merged at the end. Finite, so that no infinity is subtracted from another.
        top = tl.full((block,), -3.0e38, tl.float32)
        total = tl.zeros((block,), tl.float32)
        for start in range(0, columns, block):
            inside = start + lane < columns
            x = tl.load(logits + row * columns + start + lane, mask=inside, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, x)
            total = total * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        highest = tl.max(top, 0)
        tl.store(tops + row, highest)
        tl.store(totals + row, tl.sum(total * tl.exp(top - highest), 0))

    @triton.jit
    def _gradient(  # noqa: ANN202
        logits, tops, totals, weighted, ids, shares, columns, limit, block: tl.constexpr, slots: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, block)
        start_of_row = logits + row * columns
        top = tl.load(tops + row)
        scale = tl.load(weighted + row) / tl.load(totals + row)
        # The labels' logits are read before any thread writes, and written after all threads have.
        slot = tl.arange(0, slots)
        is_label = slot < limit
        column = tl.load(ids + row * limit + slot, mask=is_label, other=0)
        share = tl.load(shares + row * limit + slot, mask=is_label, other=0.0)
        picked = tl.load(start_of_row + column, mask=is_label, other=0.0).to(tl.float32)
        tl.debug_barrier()
        for start in range(0, columns, block):
            inside = start + lane < columns
            x = tl.load(start_of_row + start + lane, mask=inside, other=-float("inf")).to(tl.float32)
            tl.store(start_of_row + start + lane, (tl.exp(x - top) * scale).to(logits.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        gradient = (tl.exp(picked - top) * scale - share).to(logits.dtype.element_ty)
        tl.store(start_of_row + column, gradient, mask=is_label)
