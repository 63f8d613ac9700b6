"""What ranks tell each other inside a loss. A group of None is a rank alone: nothing is sent."""

import torch
import torch.distributed as dist


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
