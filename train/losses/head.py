"""The head's linear layer, a chunk of rows (or of classes) at a time, and the sums of its gradients.

B batch, V vocabulary, W trunk width.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from train.losses.blocks import chunks
from train.losses.distributed import Split
from train.losses.positives import Positives

RowLoss = Callable[[torch.Tensor, Positives, bool], torch.Tensor]
"""Logits [R, V], the rows' labels, whether gradients are wanted -> losses [R]; then the logits hold d loss / d logits."""

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
        self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, needs: tuple[bool, ...], dtype: torch.dtype, memory: int,
        buffer: torch.Tensor | None = None, split: Split | None = None,
    ) -> None:  # fmt: skip
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
        # Ranks that ask each other in every chunk need the same chunks, and room for a chunk in float32 as well (`float_blocks`, whole).
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
            losses[part] = loss(torch.addmm(self.bias[ids[part], None], self.weight[ids[part]], self.features.T, out=logits), part)
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
    """into += scale * left @ right (=, the first time); where `into` is of a finer type, part by part: no second [V, W] is made."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scale, beta=0.0 if first else 1.0)
        return
    for start in range(0, len(left), _PRODUCT_ROWS):
        rows = slice(start, start + _PRODUCT_ROWS)
        product = left[rows] @ right
        torch.mul(product, scale, out=into[rows]) if first else into[rows].add_(product, alpha=scale)
