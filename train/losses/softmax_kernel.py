"""softmax.py's pass over a chunk's logits as one Triton kernel, for CUDA: logsumexp online, gradient in place, labels included.

R rows, V classes, K label limit. A program takes a row: it reads the logits once for maximum and sum, and once more, while they are still
in the L2 cache, to put the gradient into their place; all in float32, whatever the logits' type. torch's own operations, a block at a time,
read and write them several times. Where Triton is missing softmax.py does without; torch's CUDA builds bring it. Tested in Triton's
interpreter, which runs it on the CPU; no GPU has measured it.
"""

import os
from importlib.util import find_spec

import torch

from train.losses.positives import Positives

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
        # One maximum and sum a lane; together they are one of each in the end. Finite, so that no infinity is taken from another.
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
    def _gradient(logits, tops, totals, weighted, ids, shares, columns, limit, block: tl.constexpr, places: tl.constexpr):  # noqa: ANN202
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
        tl.store(start_of_row + column, (tl.exp(picked - top) * scale - share).to(logits.dtype.element_ty), mask=is_label)


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
        logits, tops, totals, labels.weighted.float(), labels.ids.contiguous(), labels.shares.contiguous(), logits.shape[1], limit,
        block=_block(logits), places=triton.next_power_of_2(max(limit, 1)),  # type: ignore[arg-type]
    )  # fmt: skip


def _block(logits: torch.Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(logits.shape[1]))
