"""A batch's labels as the losses take them. B rows, K label limit, V vocabulary."""

from dataclasses import dataclass

import torch

from labels.schema import PAD_ID


@dataclass(frozen=True)
class Positives:
    """The labels of some rows, in places of fixed number so that nothing has to wait for a GPU.

    A place that holds no label (padding, an id said twice) repeats the row's first label: writing into
    the logits there does no harm, since the same value is written as for that label. Sums leave such places out by `valid`.

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
        """Only the labels among `count` classes from `first` on, which become 0; shares and counts stay those of all labels."""
        valid = self.valid & (self.ids >= first) & (self.ids < first + count)
        ids, shares = _fill(self.ids - first, self.shares, valid)
        return Positives(ids, shares, valid, self.counts, self.weighted)

    def put(self, logits: torch.Tensor, values: torch.Tensor) -> None:
        """Write [B, K], of the logits' type, into contiguous logits [B, V] at the labels; `scatter_` would copy all of bf16."""
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
