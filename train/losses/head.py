"""The head's linear layer, a chunk of rows (or of classes) at a time, and the sums of its gradients.

B batch, V vocabulary, W trunk width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from labels.manifest import PAD_ID
from train.losses.distributed import Split

# ---- blocks: How many rows are taken at once: chunks by the memory budget, blocks within a chunk by the cache.
#
# The products want large chunks. What is done element by element (maximum, exponential, sum, scaling: five and more
# readings) wants few rows, which stay in the cache from the first reading to the last: 1 MiB for each thread on a CPU
# (a quarter of it makes the threads wait for each other four times as often; twice as much, with what asl keeps beside
# it, is too large for the cache).


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


# ---- positives: A batch's labels as the losses take them. B rows, K label limit, V vocabulary.


@dataclass(frozen=True)
class Positives:
    """The labels of some rows, in places of fixed number so that nothing has to wait for a GPU.

    A place that holds no label (padding, an id said twice) repeats the row's first label: writing into the logits there
    does no harm, since the same value is written as for that label. Sums leave such places out by `valid`.

    Attributes:
        ids: int64 [B, K]; 0 in rows without any label.
        shares: [B, K], share of the row's target, t_c = w_c / sum of w over the row (SuperClass, section 3.2).
        valid: bool [B, K].
        counts: [B, 1], labels of the row.
        weighted: bool [B], whether any label of the row weighs more than 0.
    """

    ids: torch.Tensor
    shares: torch.Tensor
    valid: torch.Tensor
    counts: torch.Tensor
    weighted: torch.Tensor

    def __getitem__(self, rows: slice) -> "Positives":
        return Positives(self.ids[rows], self.shares[rows], self.valid[rows], self.counts[rows], self.weighted[rows])

    def of_classes(self, first: int, count: int) -> "Positives":
        """Only the labels among `count` classes from `first` on, which become 0; shares and counts stay those of all
        labels.
        """
        valid = self.valid & (self.ids >= first) & (self.ids < first + count)
        ids, shares = _fill(self.ids - first, self.shares, valid)
        return Positives(ids, shares, valid, self.counts, self.weighted)

    def put(self, logits: torch.Tensor, values: torch.Tensor) -> None:
        """Write [B, K], of the logits' type, into contiguous logits [B, V] at the labels; `scatter_` would copy all of
        bf16.
        """
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        logits.put_(self.ids + rows * logits.shape[1], values)

    @property
    def labelled(self) -> torch.Tensor:
        """bool [B, 1], whether the row has any label."""
        return self.valid.any(dim=1, keepdim=True)

    @property
    def weights(self) -> torch.Tensor:
        """[B, K], the shares scaled to mean 1 over the row's labels; without IDF every label weighs 1."""
        return self.shares * self.counts


def positives(label_ids: torch.Tensor, idf: torch.Tensor) -> Positives:
    """Labels of padded rows.

    Args:
        label_ids: int [B, K], padded with PAD_ID; order and repetition are of no meaning.
        idf: float [V], its type is the shares'.
    """
    ids = label_ids.long().sort(dim=1).values
    valid = ids != PAD_ID
    valid[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    weights = idf[ids.clamp(min=0)] * valid
    total = weights.sum(dim=1, keepdim=True)
    shares = weights / torch.where(total > 0, total, 1.0)
    ids, shares = _fill(ids, shares, valid)
    return Positives(ids, shares, valid, valid.sum(dim=1, keepdim=True).to(idf.dtype), total.squeeze(1) > 0)


def _fill(ids: torch.Tensor, shares: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places that are not valid take the row's first valid one, or class 0 and share 0."""
    first = valid.int().argmax(dim=1, keepdim=True)
    some = valid.any(dim=1, keepdim=True)
    return tuple(torch.where(valid, values, values.gather(1, first) * some) for values in (ids, shares))  # type: ignore[return-value]


RowLoss = Callable[[torch.Tensor, Positives, bool], torch.Tensor]
"""Logits [R, V], the rows' labels, whether gradients are wanted -> losses [R]; then the logits hold d loss / d logits.
"""

_PRODUCT_ROWS = 4096
_SUMMED_ROWS = 16


class Head:
    """Operands in the products' type, gradients summed in float32 (float64 if that is the type).

    Args:
        features: [B, W].
        weight: [V, W].
        bias: [V].
        needs: which of the three want a gradient.
        dtype: what the products are computed in.
        memory: bytes for the logits of a chunk.
        buffer: kept from an earlier call, for the logits; used if large enough.
        split: where weight and bias are a part of the classes; features are then those of all ranks.
    """

    def __init__(
        self,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        needs: tuple[bool, ...],
        dtype: torch.dtype,
        memory: int,
        buffer: torch.Tensor | None = None,
        split: Split | None = None,
    ) -> None:
        self.features, self.weight, self.bias = features.to(dtype), weight.to(dtype), bias.to(dtype)
        self.memory, self.split = memory, split
        self.sums = torch.float64 if dtype == torch.float64 else torch.float32
        self.gradients = [
            torch.empty_like(operand, dtype=self.sums) if needed else None  # the first chunk fills them
            for operand, needed in zip((features, weight, bias), needs, strict=True)
        ]
        if buffer is None or buffer.dtype != dtype or buffer.device != features.device:
            buffer = torch.empty(0, dtype=dtype, device=features.device)
        self.buffer: torch.Tensor = buffer

    @property
    def vocabulary(self) -> int:
        """Classes of all ranks."""
        return len(self.weight) if self.split is None else self.split.vocabulary

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the other classes; None where this one has them all."""
        return None if self.split is None else self.split.group

    @property
    def training(self) -> bool:
        """Whether any gradient is wanted."""
        return any(sum_ is not None for sum_ in self.gradients)

    def mean(self, loss: RowLoss, labels: Positives, divided_by: int = 1) -> torch.Tensor:
        """The mean loss of all rows, scalar; adds its gradients.

        Args:
            loss: of some rows.
            labels: of all rows.
            divided_by: by this, too.
        """
        scale = 1 / (len(self.features) * divided_by)
        return self.rows(loss, labels, scale).sum() * scale

    def rows(self, loss: RowLoss, labels: Positives, scale: float, beside: int = 0) -> torch.Tensor:
        """Losses [B] of all rows; adds `scale` times their gradients.

        Args:
            loss: of some rows.
            labels: of all rows.
            scale: what the caller multiplies the losses with.
            beside: bytes a logit that the loss needs for itself where it takes a chunk as a whole.
        """
        losses = self.features.new_empty(len(self.features), dtype=self.sums)
        # Ranks that ask each other in every chunk need the same chunks, and room for a chunk in float32 as well
        # (`float_blocks`, whole).
        size, columns = self.features.element_size(), len(self.weight)
        if self.split is not None:
            size, columns = size + 4 * (size < 4) + beside, self.split.widest
        for part in chunks(len(self.features), columns, size, self.memory):
            x = self.features[part]
            logits = torch.addmm(self.bias, x, self.weight.T, out=self._chunk(len(x), len(self.weight)))
            losses[part] = loss(logits, labels[part], self.training)
            into_features, into_weight, into_bias = self.gradients
            first = part.start == 0
            if into_features is not None:
                add_product(into_features[part], logits, self.weight, scale, first=True)
            if into_weight is not None:
                add_product(into_weight, logits.T, x, scale, first)
            if into_bias is not None:
                column_sums = _column_sums(logits, self.sums)
                torch.mul(column_sums, scale, out=into_bias) if first else into_bias.add_(column_sums, alpha=scale)
        return losses

    def classes(self, loss: Callable[[torch.Tensor, slice], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """Losses [C] of the classes `ids` [C], the batch being the axis they are taken along; no gradients.

        Args:
            loss: logits [R, B] of a part of `ids`, and which part -> losses [R].
            ids: int64 [C].
        """
        losses = self.features.new_empty(len(ids), dtype=self.sums)
        for part in chunks(len(ids), len(self.features), self.features.element_size(), self.memory):
            logits = self._chunk(len(ids[part]), len(self.features))
            losses[part] = loss(
                torch.addmm(self.bias[ids[part], None], self.weight[ids[part]], self.features.T, out=logits), part
            )
        return losses

    def _chunk(self, rows: int, columns: int) -> torch.Tensor:
        """Memory for logits, the same for all chunks."""
        if self.buffer.numel() < rows * columns:
            self.buffer = self.buffer.new_empty(rows * columns)
        return self.buffer[: rows * columns].view(rows, columns)


def _column_sums(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[R, V] to [V]. On CPUs torch sums half precision in a finer type four times as fast a few rows at a time."""
    if values.dtype == dtype or values.device.type != "cpu":
        return values.sum(dim=0, dtype=dtype)
    sums = values.new_zeros(values.shape[1], dtype=dtype)
    for some in values.split(_SUMMED_ROWS):
        sums += some.sum(dim=0, dtype=dtype)
    return sums


def add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, first: bool) -> None:
    """into += scale * left @ right (=, the first time); where `into` is of a finer type, part by part: no second [V, W]
    is made.
    """
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scale, beta=0.0 if first else 1.0)
        return
    for start in range(0, len(left), _PRODUCT_ROWS):
        rows = slice(start, start + _PRODUCT_ROWS)
        product = left[rows] @ right
        torch.mul(product, scale, out=into[rows]) if first else into[rows].add_(product, alpha=scale)


# ---- classwise: Losses that take every class by itself, such as binary cross-entropy and the asymmetric loss. R rows,
# V vocabulary, K label limit.
#
# Each is the loss of a row without labels, one dense reduction, and a correction at the labels. The dense part sees
# -inf at the labels, where a loss of negatives is 0: nothing large is added and taken away again. IDF weighs the
# positives (Positives.weights, mean 1 over a row's labels, so that positives and negatives keep their balance); the
# paper compares these losses without IDF and says nothing of it. A row without labels is all negatives.


_HALVINGS = 6


def softplus_sum(x: torch.Tensor) -> torch.Tensor:
    """sum_c log(1 + e^x_c) of every row of [R, V], as max(x, 0) + log1p(e^-|x|): one logarithm for 64 classes.

    (1 + a)(1 + b) = 1 + (a + b + ab): the product's excess over 1 is kept, not the product, so that no small e^x is
    lost beside the 1. torch's log1p takes 5 ns a value, more than all else together.
    """
    losses = x.relu().sum(dim=1)
    excess = x.abs().neg_().exp_()
    columns = excess.shape[1]
    for _ in range(_HALVINGS):
        half, odd = columns // 2, columns % 2
        if not half:
            break
        if odd:
            _join(excess[:, :1], excess[:, columns - 1 : columns])
        _join(excess[:, :half], excess[:, half : 2 * half])
        columns = half
    return losses.add_(excess[:, :columns].log1p().sum(dim=1))


def _join(left: torch.Tensor, right: torch.Tensor) -> None:
    left.addcmul_(left, right).add_(right)


@dataclass(frozen=True)
class Classwise:
    """A row loss (see head.RowLoss): the sum over all classes.

    Attributes:
        negative: logits [R, V] -> losses [R]; with True, leaves the slope in the logits.
        positive: logits [R, K] -> losses [R, K], slopes [R, K].
    """

    negative: Callable[[torch.Tensor, bool], torch.Tensor]
    positive: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, logits: torch.Tensor, labels: Positives, gradient: bool) -> torch.Tensor:
        picked = logits.gather(1, labels.ids)
        labels.put(logits, picked.masked_fill(labels.labelled, -torch.inf))
        losses = labels.shares.new_empty(len(logits))
        for rows, block in float_blocks(logits, keep=gradient):
            losses[rows] = self.negative(block, gradient)
        loss, slope = self.positive(picked.to(losses.dtype))
        if gradient:
            slope = (labels.weights * slope).to(logits.dtype)
            labels.put(logits, torch.where(labels.labelled, slope, logits.gather(1, labels.ids)))
        return losses + (labels.weights * loss * labels.valid).sum(dim=1)
