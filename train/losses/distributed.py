"""What ranks exchange inside a loss, and the head split by class (`train.loss.split_vocabulary`).

Split: each rank has V/N classes and computes their logits for the features of all ranks, so the gradients of its
classes are complete: weight and gradient, V x W, are never sent, only features [B, W], their gradients and label ids,
which grow with the batch. The head is then a DTensor under DDP and FSDP2, so checkpoints, averages and norms treat it
like FSDP's. Off by default: DDP sends the head's gradient hidden behind the trunk's backward pass, while nothing hides
the split's messages. Neither was measured on GPUs. A group of None is a rank alone: nothing is sent.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from labels.storage import UserError


@dataclass(frozen=True)
class Split:
    """This rank has classes from `first` on, of `vocabulary`; no rank of `group` has more than `widest`."""

    group: dist.ProcessGroup
    vocabulary: int
    first: int
    widest: int

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, equally many of each, in the order of the ranks."""
        gathered = rows.new_empty(self.group.size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=self.group)
        return gathered

    def sum_own(self, rows: Tensor) -> Tensor:
        """The reverse of `gather`: this rank's rows, summed over the values that all ranks have for them."""
        own = rows.new_empty(len(rows) // self.group.size(), *rows.shape[1:])
        dist.reduce_scatter_tensor(own, rows, group=self.group)
        return own


def split_of(weight: Tensor) -> Split | None:
    """How a head's weight [V, W] is split by class; None for a whole one."""
    if not isinstance(weight, DTensor):
        return None
    group = weight.device_mesh.get_group()
    widest = _widest(len(weight), group.size())
    return Split(group, len(weight), group.rank() * widest, widest)


def can_split(vocabulary: int, ranks: int) -> bool:
    """Whether every rank gets a class: all parts are equal except the last, which is smaller."""
    return ranks > 1 and (ranks - 1) * _widest(vocabulary, ranks) < vocabulary


def check_split(vocabulary: int, ranks: int) -> None:
    """Raises UserError if a rank would have no class."""
    if not can_split(vocabulary, ranks):
        raise UserError(
            f"train.loss.split_vocabulary is true, but {vocabulary:,} classes in parts of "
            f"{_widest(vocabulary, ranks):,} leave some of the {ranks} ranks without classes",
            allowed="a number of ranks with which each gets a class",
            fix="--set train.loss.split_vocabulary=false, or another number of ranks",
        )


def _widest(vocabulary: int, ranks: int) -> int:
    """Classes of every rank but the last ones, as DTensor's Shard(0) splits them."""
    return -(-vocabulary // ranks)


def ranks(group: dist.ProcessGroup | None) -> int:
    """The number of ranks in the group."""
    return 1 if group is None else group.size()


def everyone() -> dist.ProcessGroup | None:
    """The group of all ranks, None for one process alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def merge_exponentials(top: Tensor, total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Merge the ranks' maxima `top` (-inf: no value) and sums `total` of exp(x - top), in place, to those of all ranks.

    Returns the factor that makes this rank's exponentials relative to the new top.
    """
    if group is None:
        return torch.ones((), dtype=top.dtype, device=top.device)
    before = top.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    factor = torch.where(top == before, 1.0, (before - top).exp())  # -inf - -inf is not a number
    total.mul_(factor)
    dist.all_reduce(total, group=group)
    return factor
