"""The classification head's matrix product, taken together with its loss.

    label_ids [B, K] -> positives -> ids, shares, valid [B, K]
    features [B, W], weight [V, W], bias [V] -> HeadLoss -> Head: logits of a chunk of rows [R, V]
        -> kinds/NAME.py: losses [R], gradient in place of the logits -> Head: sums of three gradients -> autograd

The gradients are computed in the forward pass (as in Liger Kernel and Cut Cross-Entropy), chunk by chunk: three matrix
products, as in a linear layer, no dense target, and no logits of the whole batch (`train.loss.memory`). Chunks are
rows: softmax over chunks of classes needs a fourth product. B batch, K label limit, W trunk width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labels.manifest import PAD_ID
from labels.settings import Loss
from train.distributed import Split, ranks, split_of, sum_over
from train.losses.kinds import kind

Compute = Callable[[tuple[bool, ...]], tuple[Tensor, list[Tensor | None]]]
"""Which of features, weight and bias need a gradient -> scalar loss, their gradients for the caller to keep."""
Observe = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Features [B, W], weight [V, W] and bias [V] in the type of the products, label ids [B, K]."""
_CPU_BLOCK_BYTES = 1 << 20  # a thread; 4 times less or 2 times more is slower: waiting threads, or a full cache
_GPU_BLOCK_BYTES = 32 << 20
_PRODUCT_ROWS = 4096
_SUMMED_ROWS = 16
_HALVINGS = 6


class HeadLoss(nn.Module):
    """The loss `settings.name` of a linear head, with the label weights `idf`, float32 [V]; it has no parameters."""

    idf: Tensor

    def __init__(self, settings: Loss, idf: Tensor) -> None:
        super().__init__()
        self.settings = settings
        self._batch_loss = kind(settings.name).batch_loss
        self._buffer: Tensor | None = None  # for logits, kept between steps: the first touch of memory costs time
        self._observe: Observe | None = None
        # Not in a checkpoint, which names the label dataset by its fingerprint.
        self.register_buffer("idf", idf.clone() if settings.idf else torch.ones_like(idf), persistent=False)

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor, label_ids: Tensor) -> Tensor:
        """Mean loss of normed features [B, W] and label ids [B, K] padded with PAD_ID; float32 or float64.

        If the head is split by class (train/distributed.py), all ranks call this together, and each gets the loss of
        all ranks' samples. The gradients are exact under autocast as under float32; there is no second derivative.
        """
        split = split_of(weight)
        if split is not None:
            weight, bias = weight.to_local(), bias.to_local()  # type: ignore[operator]  # they are DTensors
        dtype = product_type(features, weight)
        if self._observe is not None:
            with torch.autocast(weight.device.type, enabled=False):
                self._observe(features.to(dtype), weight.to(dtype), bias.to(dtype), label_ids)
            return features.new_zeros(())

        def compute(needs: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
            with torch.autocast(weight.device.type, enabled=False):
                rows, ids = features, label_ids
                if split is not None:
                    rows, ids = split.gather(features.to(dtype)), split.gather(label_ids)
                head = Head(rows, weight, bias, needs, dtype, self.settings.memory, self._buffer, split)
                labels = positives(ids, self.idf.to(head.sums))
                if split is not None:
                    labels = labels.of_classes(split.first, len(weight))
                loss = self._batch_loss(self.settings, head, labels)
                self._buffer = head.buffer
                if split is not None:
                    sum_over(loss, split.group)
                    if head.gradients[0] is not None:  # the mean over ranks is taken of the trunk's gradients alone
                        head.gradients[0] = split.sum_own(head.gradients[0]).mul_(ranks(split.group))
                return loss, head.gradients

        return fused(features, weight, bias, compute)  # type: ignore[call-arg]  # the decorator hides the parameters

    @contextmanager
    def observed(self, observe: "Observe") -> Iterator[None]:
        """In the block, batches go to `observe` instead, and the loss is 0; the head is whole on this rank."""
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None


# -- autograd


class _Fused(torch.autograd.Function):
    """Gradients are computed with the loss; backward multiplies them in place by the incoming gradient.

    They are as large as the head, so a copy would double their memory: a second backward pass computes them again.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, compute: Compute) -> Tensor:
        ctx.compute, ctx.dtypes = compute, (features.dtype, weight.dtype, bias.dtype)
        loss, ctx.gradients = compute(ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss has no second derivative: backward(create_graph=True) is not supported")
        gradients, ctx.gradients = ctx.gradients or ctx.compute(ctx.needs_input_grad[:3])[1], None
        # On a CPU reading the value is free, and without accumulation it is 1.
        if incoming.device.type != "cpu" or incoming.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(incoming)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (*(None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs), None)


@torch.compiler.disable
def fused(features: Tensor, weight: Tensor, bias: Tensor, compute: Compute) -> Tensor:
    """The scalar loss of `compute`, whose gradients for the three operands are known with it."""
    if torch.is_grad_enabled():
        return _Fused.apply(features, weight, bias, compute)  # type: ignore[return-value]
    return compute((False, False, False))[0]


def product_type(features: Tensor, weight: Tensor) -> torch.dtype:
    """Type of the head's products: autocast's, else the operands'; on a CPU without 16-bit instructions float32, which
    is many times faster than torch's fallback.
    """
    device = weight.device.type
    if weight.dtype == torch.float64:
        return torch.float64
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(features.dtype, weight.dtype)
    return torch.float32 if device == "cpu" and dtype != torch.float32 and not fast_on_cpu(dtype) else dtype


def fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a 16-bit type."""
    mkldnn = torch.ops.mkldnn
    return mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()


# -- labels


@dataclass(frozen=True)
class Positives:
    """The labels of B rows in K slots: a fixed shape, so that nothing waits for a GPU.

    A slot without a label (padding, a repeated id) repeats the row's first label: a write into the logits there writes
    the same value twice. Sums skip such slots by `valid`.
    """

    ids: Tensor  # int64 [B, K]; 0 in rows without labels
    shares: Tensor  # [B, K], t_c = w_c / sum of w over the row (SuperClass, section 3.2)
    valid: Tensor  # bool [B, K]
    counts: Tensor  # [B, 1], labels of the row
    weighted: Tensor  # bool [B], whether any label of the row has a weight above 0

    def __getitem__(self, rows: slice) -> "Positives":
        return Positives(self.ids[rows], self.shares[rows], self.valid[rows], self.counts[rows], self.weighted[rows])

    def of_classes(self, first: int, count: int) -> "Positives":
        """The labels among `count` classes from `first`, renumbered from 0; shares and counts remain those of all."""
        valid = self.valid & (self.ids >= first) & (self.ids < first + count)
        ids, shares = _fill(self.ids - first, self.shares, valid)
        return Positives(ids, shares, valid, self.counts, self.weighted)

    def put(self, logits: Tensor, values: Tensor) -> None:
        """Write [B, K] into contiguous logits [B, V] of the same type; `scatter_` would copy all bf16 logits."""
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        logits.put_(self.ids + rows * logits.shape[1], values)

    @property
    def labelled(self) -> Tensor:
        """bool [B, 1], whether the row has any label."""
        return self.valid.any(dim=1, keepdim=True)

    @property
    def weights(self) -> Tensor:
        """[B, K], the shares scaled to mean 1 over the row's labels; all 1 without IDF."""
        return self.shares * self.counts


def positives(label_ids: Tensor, idf: Tensor) -> Positives:
    """The labels of int rows [B, K] padded with PAD_ID, in any order; `shares` has the type of `idf` [V]."""
    ids = label_ids.long().sort(dim=1).values
    valid = ids != PAD_ID
    valid[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    weights = idf[ids.clamp(min=0)] * valid
    total = weights.sum(dim=1, keepdim=True)
    shares = weights / torch.where(total > 0, total, 1.0)
    ids, shares = _fill(ids, shares, valid)
    return Positives(ids, shares, valid, valid.sum(dim=1, keepdim=True).to(idf.dtype), total.squeeze(1) > 0)


def _fill(ids: Tensor, shares: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Slots that are not valid take the row's first valid one, or class 0 and share 0."""
    first = valid.int().argmax(dim=1, keepdim=True)
    labelled = valid.any(dim=1, keepdim=True)
    return tuple(torch.where(valid, values, values.gather(1, first) * labelled) for values in (ids, shares))  # type: ignore[return-value]


# -- the product, chunk by chunk

RowLoss = Callable[[Tensor, Positives, bool], Tensor]
"""Logits [R, V], the rows' labels, whether to compute gradients -> losses [R]; then the logits hold their gradient."""


class Head:
    """The operands in the type of the products, and the sums of their gradients in float32 (or float64).

    `needs`: which of features, weight, bias need a gradient. `memory`: bytes for the logits of a chunk. `buffer`: that
    memory from the last step. `split`: weight and bias hold a part of the classes, features the rows of all ranks.
    """

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        needs: tuple[bool, ...],
        dtype: torch.dtype,
        memory: int,
        buffer: Tensor | None = None,
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
        self.buffer: Tensor = buffer

    @property
    def vocabulary(self) -> int:
        """Classes of all ranks."""
        return len(self.weight) if self.split is None else self.split.vocabulary

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the other classes; None if this rank has all."""
        return None if self.split is None else self.split.group

    @property
    def training(self) -> bool:
        return any(gradient is not None for gradient in self.gradients)

    def mean(self, loss: RowLoss, labels: Positives, divided_by: int = 1) -> Tensor:
        """The mean loss of all rows, also divided by `divided_by`; adds its gradients."""
        scale = 1 / (len(self.features) * divided_by)
        return self.rows(loss, labels, scale).sum() * scale

    def rows(self, loss: RowLoss, labels: Positives, scale: float, extra_bytes: int = 0) -> Tensor:
        """Losses [B] of all rows, which the caller multiplies by `scale`; adds `scale` times their gradients.

        `extra_bytes` per logit is what the loss allocates when it takes a chunk as a whole (a split head).
        """
        losses = self.features.new_empty(len(self.features), dtype=self.sums)
        size, columns = self.features.element_size(), len(self.weight)
        if self.split is not None:  # all ranks need the same chunks, with room for a chunk in float32 (`float_blocks`)
            size, columns = size + 4 * (size < 4) + extra_bytes, self.split.widest
        features_gradient, weight_gradient, bias_gradient = self.gradients
        for part in chunks(len(self.features), columns, size, self.memory):
            x, first = self.features[part], part.start == 0
            logits = torch.addmm(self.bias, x, self.weight.T, out=self._chunk(len(x), len(self.weight)))
            losses[part] = loss(logits, labels[part], self.training)
            if features_gradient is not None:
                add_product(features_gradient[part], logits, self.weight, scale, first=True)
            if weight_gradient is not None:
                add_product(weight_gradient, logits.T, x, scale, first)
            if bias_gradient is not None:
                sums = _column_sums(logits, self.sums)
                torch.mul(sums, scale, out=bias_gradient) if first else bias_gradient.add_(sums, alpha=scale)
        return losses

    def classes(self, loss: Callable[[Tensor, slice], Tensor], ids: Tensor) -> Tensor:
        """Losses [C] of the classes `ids`, int64 [C], along the batch, without gradients; `loss` takes the logits
        [R, B] of a part of `ids`, and that part.
        """
        losses = self.features.new_empty(len(ids), dtype=self.sums)
        for part in chunks(len(ids), len(self.features), self.features.element_size(), self.memory):
            weight, bias = self.weight[ids[part]], self.bias[ids[part], None]
            logits = self._chunk(len(weight), len(self.features))
            losses[part] = loss(torch.addmm(bias, weight, self.features.T, out=logits), part)
        return losses

    def _chunk(self, rows: int, columns: int) -> Tensor:
        """Memory for logits, the same for all chunks."""
        if self.buffer.numel() < rows * columns:
            self.buffer = self.buffer.new_empty(rows * columns)
        return self.buffer[: rows * columns].view(rows, columns)


def chunks(rows: int, columns: int, bytes_each: int, memory: int) -> Iterator[slice]:
    """Slices of `rows`, nearly equal, the largest first: at most `memory` bytes each, but at least one row."""
    limit = max(1, memory // (columns * bytes_each))
    count = -(-rows // limit)
    for number in range(count):
        yield slice(-(-rows * number // count), -(-rows * (number + 1) // count))


def add_product(into: Tensor, left: Tensor, right: Tensor, scale: float, first: bool) -> None:
    """into += scale * left @ right (=, if `first`); in parts where `into` has a finer type: no second [V, W]."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scale, beta=0.0 if first else 1.0)
        return
    for start in range(0, len(left), _PRODUCT_ROWS):
        rows = slice(start, start + _PRODUCT_ROWS)
        product = left[rows] @ right
        torch.mul(product, scale, out=into[rows]) if first else into[rows].add_(product, alpha=scale)


def _column_sums(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, V] to [V]. On a CPU, 16-bit values summed a few rows at a time are four times as fast as by torch's sum."""
    if values.dtype == dtype or values.device.type != "cpu":
        return values.sum(dim=0, dtype=dtype)
    sums = values.new_zeros(values.shape[1], dtype=dtype)
    for rows in values.split(_SUMMED_ROWS):
        sums += rows.sum(dim=0, dtype=dtype)
    return sums


# -- for the losses in kinds/


def float_blocks(logits: Tensor, keep: bool, whole: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of logits [R, N] as float32 (or float64), small enough for the cache, to be changed in place.

    Element-wise work reads a block five times and more; the products want large chunks. With `keep` the changes go back
    into the logits. `whole` gives one block, for a loss that exchanges values with other ranks in between.
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


@dataclass(frozen=True)
class Classwise:
    """A RowLoss that is a sum over independent classes: the loss of a row without labels, corrected at the labels.

    The dense part sees -inf at the labels, where a loss of negatives is 0: no large number is added and subtracted. IDF
    weighs the positives with mean 1 over a row's labels, so that the balance with the negatives stays; the paper
    compares these losses without IDF. A row without labels is all negatives.
    """

    negative: Callable[[Tensor, bool], Tensor]  # logits [R, V] -> losses [R]; with True, leaves the slope in the logits
    positive: Callable[[Tensor], tuple[Tensor, Tensor]]  # logits [R, K] -> losses [R, K], slopes [R, K]

    def __call__(self, logits: Tensor, labels: Positives, gradient: bool) -> Tensor:
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


def softplus_sum(x: Tensor) -> Tensor:
    """sum_c log(1 + e^x_c) of every row of [R, V], as max(x, 0) + log1p(e^-|x|): one logarithm for 64 classes.

    (1 + a)(1 + b) = 1 + (a + b + ab): the product's excess over 1 is kept, so that no small e^x is rounded away.
    torch's log1p takes 5 ns a value, more than all the rest together.
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


def _join(left: Tensor, right: Tensor) -> None:
    left.addcmul_(left, right).add_(right)
