"""How many rows are taken at once: chunks by the memory budget, blocks within a chunk by the cache.

The products want large chunks. What is done element by element (maximum, exponential, sum, scaling: five and more readings) wants
few rows, which stay in the cache from the first reading to the last: 1 MiB for each thread on a CPU (a quarter of it makes the threads wait
for each other four times as often; twice as much, with what asl keeps beside it, is too large for the cache).
"""

from collections.abc import Iterator

import torch

_CPU_BLOCK_BYTES = 1 << 20
_GPU_BLOCK_BYTES = 32 << 20


def chunks(rows: int, columns: int, bytes_each: int, memory: int) -> Iterator[slice]:
    """Rows in chunks of nearly equal size, `columns` values a row, at most `memory` bytes each (but at least one row).

    The first is the largest: memory made for it serves all.
    """
    limit = max(1, memory // (columns * bytes_each))
    count = -(-rows // limit)
    for number in range(count):
        yield slice(-(-rows * number // count), -(-rows * (number + 1) // count))


def float_blocks(logits: torch.Tensor, keep: bool, whole: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows as float32 (float64 where the logits are), to be changed in place.

    Args:
        logits: [R, N], of any floating type.
        keep: what the caller leaves in a block goes back into the logits.
        whole: all rows in one block, for a caller who has to ask other ranks in between.
    """
    precise = logits.dtype in (torch.float32, torch.float64)
    block_bytes = _CPU_BLOCK_BYTES * torch.get_num_threads() if logits.device.type == "cpu" else _GPU_BLOCK_BYTES
    rows = len(logits) if whole else min(len(logits), max(1, block_bytes // (4 * logits.shape[1])))
    buffer = None if precise else torch.empty(rows, logits.shape[1], device=logits.device)
    for start in range(0, len(logits), max(rows, 1)):
        part = logits[start : start + rows]
        block = part if buffer is None else buffer[: len(part)].copy_(part)
        yield slice(start, start + len(part)), block
        if buffer is not None and keep:
            part.copy_(block)
