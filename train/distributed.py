"""One process or many: what torchrun says, and the few calls that differ."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from labels.errors import UserError
from labels.settings import Runtime


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, size: int) -> slice:
        """This rank's part of `size` samples; the ranks' parts are as equal as they can be, and together all."""
        return slice(self.rank * size // self.size, (self.rank + 1) * size // self.size)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank has it, so that all act alike; one message for all flags."""
        if self.size == 1:
            return flags
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return tuple(value > 0 for value in values.tolist())

    def total(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over all ranks; one message for all."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return tuple(sums.tolist())


@contextmanager
def distributed_world(runtime: Runtime) -> Iterator[World]:
    """Join the process group that torchrun's variables describe; without them, a world of one. Inside another `world`, that one.

    Raises:
        UserError: CUDA is asked for and not there, or there are more ranks than GPUs.
    """
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise UserError(
            "train.runtime.device is cuda, but torch sees no CUDA device", allowed="auto, cpu", mend="--set train.runtime.device=cpu"
        )
    on_gpu = available and runtime.device != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"rank {device.index} of this node has no GPU of its own: torch sees {torch.cuda.device_count()}",
                mend=f"--nproc-per-node={torch.cuda.device_count()}",
            )
        torch.cuda.set_device(device)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    with _tf32(on_gpu), _group(device) as world:
        yield world


@contextmanager
def _group(device: torch.device) -> Iterator[World]:
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, device)
        return
    if dist.is_initialized():  # a group cannot be joined a second time
        yield World(dist.get_rank(), size, device)
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """fp32 products in TF32, as in the reference, for a while: features that are extracted afterwards must not change by it."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
