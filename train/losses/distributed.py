"""The head's classes divided among the ranks: who has which, and what is gathered and summed for that.

Every rank takes the features of all ranks and makes its own classes' logits. So the gradients of its classes are
complete where they are made, and neither the head's weight nor its gradient, V x W numbers, is ever sent: only
features, their gradients, label ids and, for losses that compare classes, a few numbers a sample.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from labels.storage import UserError


@dataclass(frozen=True)
class Split:
    """Of `vocabulary` classes those from `first` on are this rank's; no rank of `group` has more than `widest`."""

    group: dist.ProcessGroup
    vocabulary: int
    first: int
    widest: int

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, equally many of each, in the order of the ranks."""
        gathered = rows.new_empty(self.group.size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=self.group)
        return gathered

    def sum_own(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows of all ranks, as `gather` puts them, this rank's, summed over what every rank has for them."""
        own = rows.new_empty(len(rows) // self.group.size(), *rows.shape[1:])
        dist.reduce_scatter_tensor(own, rows, group=self.group)
        return own


def split_of(weight: torch.Tensor) -> Split | None:
    """How a head's weight [V, W] is split by class; None for one that is whole."""
    if not isinstance(weight, DTensor):
        return None
    group = weight.device_mesh.get_group()
    widest = _widest(len(weight), group.size())
    return Split(group, len(weight), group.rank() * widest, widest)


def can_split(vocabulary: int, ranks: int) -> bool:
    """Whether every rank gets a class: classes are dealt out in equal parts, and what is left over to the last rank is
    less.
    """
    return ranks > 1 and (ranks - 1) * _widest(vocabulary, ranks) < vocabulary


def check_split(vocabulary: int, ranks: int) -> None:
    """Refuse a split in which a rank would have no class.

    Raises:
        UserError: with the numbers.
    """
    if not can_split(vocabulary, ranks):
        raise UserError(
            f"train.loss.split_vocabulary is true, but of {vocabulary:,} classes in parts of {_widest(vocabulary, ranks):,} some of the "
            f"{ranks} ranks get none",
            allowed="ranks of which each gets a class",
            fix="--set train.loss.split_vocabulary=false, or another number of ranks",
        )


def _widest(vocabulary: int, ranks: int) -> int:
    """Classes of every rank but the last ones, as DTensor's Shard(0) deals them out."""
    return -(-vocabulary // ranks)


# ---- ranks: What ranks tell each other inside a loss. A group of None is a rank alone: nothing is sent.


def ranks(group: dist.ProcessGroup | None) -> int:
    """How many ranks are in the group."""
    return 1 if group is None else group.size()


def everyone() -> dist.ProcessGroup | None:
    """The group of all ranks, None for one process alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def sum_over(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over the ranks, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def merge_exponentials(top: torch.Tensor, total: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sums of exponentials exp(x - top) of all ranks as one, in place.

    Args:
        top: the largest x, of any shape; becomes the largest of all ranks (-inf: none anywhere).
        total: sum of exp(x - top), of the same shape; becomes the sum over all ranks, relative to the new top.
        group: the ranks.

    Returns:
        What this rank's exponentials have to be multiplied with to be relative to the new top.
    """
    if group is None:
        return torch.ones((), dtype=top.dtype, device=top.device)
    before = top.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    factor = torch.where(top == before, 1.0, (before - top).exp())  # -inf - -inf is no number
    total.mul_(factor)
    dist.all_reduce(total, group=group)
    return factor
