"""One process or many ranks: joining torchrun's process group, spreading a model, and exchanging gradients.

    torchrun's variables -> launched -> distributed_world -> World(rank, size, device) -> only_run(run folder, World)
    model -> spread -> DDP (whole weights on every rank), or FSDP2 (split weights); under either, the head may be split
        by class, and each class then belongs to one rank (Split)

The loop and the checkpoints know neither: they call what `spread` returns, and use `local`, `whole` and `split_like`.
"""

import inspect
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from labels.locks import only_writer
from labels.settings import Runtime
from labels.storage import UserError

_NOTE_AFTER_S = 15.0
_START = "start all ranks with torchrun; for one process alone, `unset WORLD_SIZE`"
_NEW_BUFFERS_OPTION = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13


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
        """This rank's part of `size` samples; the ranks' parts are as equal as possible."""
        return slice(self.rank * size // self.size, (self.rank + 1) * size // self.size)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank, so that all act alike; one message for all flags."""
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


def launched() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank within the node, from the variables that torchrun sets; 0, 1, 0 without them.

    Without WORLD_SIZE the others are ignored: shells of schedulers and containers often have some of them. UserError,
    with the variable's name: a value that is no such number, or one that is missing, for which torch would wait.
    """
    size = launch_variable("WORLD_SIZE", 1, least=1)
    if size == 1:
        return 0, 1, 0
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            allowed="the variables that torchrun sets, all or none",
            fix=_START,
        )
    rank = launch_variable("RANK", 0, below=size)
    launch_variable("MASTER_PORT", 0, below=1 << 16)
    return rank, size, launch_variable("LOCAL_RANK", 0, below=size)


def launch_variable(name: str, default: int, least: int = 0, below: int | None = None) -> int:
    """The number in a variable of the environment, from `least` to below `below`; unset or empty: `default`."""
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
        allowed = f"a number of {least} or more" if below is None else f"{least} to {below - 1}"
        raise UserError(f"the variable {name} is {text!r}", allowed=allowed, fix=_START)
    return int(text)


@contextmanager
def only_run(folder: Path, world: World) -> Iterator[None]:
    """Hold the lock of a run folder for the block: the first rank does, for all ranks of the launch.

    UserError, on every rank: another process trains there; or the folder cannot be written.
    """
    with ExitStack() as stack:
        refused = None
        if world.is_first:
            try:
                stack.enter_context(only_writer(folder / ".lock"))
            except UserError as error:
                refused = error
        (none_may_run,) = world.any(refused is not None)
        if none_may_run:
            raise refused or UserError(f"the first rank cannot take the lock of {folder}", fix="see that rank's error")
        yield


@contextmanager
def distributed_world(runtime: Runtime) -> Iterator[World]:
    """Join the process group that torchrun's variables describe; without them, a world of one. Inside another
    `distributed_world`, that one. UserError without the requested CUDA device, or with more ranks than GPUs.
    """
    _, size, local_rank = launched()
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise UserError(
            "train.runtime.device is cuda, but torch sees no CUDA device",
            allowed="auto, cpu",
            fix="--set train.runtime.device=cpu",
        )
    on_gpu = available and runtime.device != "cpu"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"rank {device.index} of this node has no GPU: torch sees {torch.cuda.device_count()}",
                fix=f"start torchrun with --nproc-per-node={torch.cuda.device_count()}",
            )
        torch.cuda.set_device(device)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    with _tf32(on_gpu), _group(device, size) as world:
        yield world


@contextmanager
def _group(device: torch.device, size: int) -> Iterator[World]:
    if size == 1:
        yield World(0, 1, device)
        return
    if dist.is_initialized():  # a group cannot be joined a second time
        yield World(dist.get_rank(), size, device)
        return
    on_gpu = device.type == "cuda"
    ranks = f"all {size} ranks of WORLD_SIZE at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    note = threading.Timer(_NOTE_AFTER_S, print, [f"waiting for {ranks}"], {"file": sys.stderr, "flush": True})
    note.daemon = True
    note.start()
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    except dist.DistError as error:
        raise UserError(f"no meeting of {ranks}: {str(error).splitlines()[0]}", fix=_START) from None
    finally:
        note.cancel()
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _tf32(enabled: bool) -> Iterator[None]:
    """fp32 products in TF32, as in the reference; restored afterwards: features extracted later must not change."""
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# -- one model over many ranks


def spread(model: nn.Module, parallel: str, world: World, split: nn.Linear | None = None) -> nn.Module:
    """What the loop calls in place of `model`; FSDP splits the model's parameters in place.

    `model` has the same weights on the device of every rank, and returns the mean loss of a rank's samples. `parallel`:
    `ddp` or `fsdp`. `split`: a layer of it whose outputs are divided among the ranks: neither its weights nor their
    gradients are exchanged. A world of one changes nothing.
    """
    if world.size == 1:
        return model
    mesh = init_device_mesh(world.device.type, (world.size,)) if split is not None or parallel == "fsdp" else None
    if split is not None:
        _split_outputs(split, mesh)  # type: ignore[arg-type]
    own = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    if parallel == "fsdp":
        for tower in (getattr(model, name, None) for name in ("trunk", "text")):
            for block in repeated_blocks(tower).values() if tower is not None else ():
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set(own.values()))
        for module in model.modules() if world.device.type == "cpu" else ():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # torch 2.8's gloo sums where it should take the mean
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(own))
    # Buffers matter for batch norm: then all ranks take those of the first one, which a checkpoint keeps.
    buffers = any(isinstance(module, _BatchNorm) for module in model.modules())
    devices = [world.device] if world.device.type == "cuda" else None
    option: dict[str, Any] = {"forward_sync_buffers" if _NEW_BUFFERS_OPTION else "broadcast_buffers": buffers}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **option)


def _split_outputs(layer: nn.Linear, mesh: DeviceMesh) -> None:
    for name, parameter in list(layer.named_parameters()):
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        layer.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def repeated_blocks(net: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated blocks by their names in `net`, in order (timm and others keep them in lists)."""
    blocks: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and not name.startswith(inside):
            children = module.named_children()
            blocks |= {
                f"{name}.{key}".lstrip("."): child for key, child in children if any(True for _ in child.parameters())
            }
            inside = (*inside, f"{name}." if name else "")
    return blocks


@contextmanager
def gradients_exchanged(ddp_model: nn.Module, now: bool) -> Iterator[None]:
    """Around a forward and backward pass: whether its gradients are exchanged, or kept for the next pass to add to."""
    if isinstance(ddp_model, DistributedDataParallel) and not now:
        with ddp_model.no_sync():
            yield
        return
    if isinstance(ddp_model, FSDPModule):
        ddp_model.set_requires_gradient_sync(now)
    yield


def loss_and_gradient_norm(loss: Tensor, parameters: Iterable[Tensor], world: World) -> tuple[Tensor, Tensor]:
    """Mean of this rank's scalar `loss` over all ranks, and norm of the whole gradient: float64 scalars on the device,
    the same on every rank. Split parameters are counted once over all ranks.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = _square([gradient for gradient in gradients if isinstance(gradient, DTensor)], loss)
    both = torch.stack([loss.detach().double() / world.size, split])
    if world.size > 1:
        dist.all_reduce(both)
    same = _square([gradient for gradient in gradients if not isinstance(gradient, DTensor)], loss)
    return both[0], (both[1] + same).sqrt()


def _square(tensors: list[Tensor], like: Tensor) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    norms = torch._foreach_norm([local(tensor) for tensor in tensors])  # type: ignore[reportPrivateImportUsage]
    return torch.stack(norms).double().square().sum()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a split tensor, in the same memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a split tensor, gathered (all ranks call it together); any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(value: Tensor, tensor: Tensor) -> Tensor:
    """The whole `value` on the device of `tensor`, and split like it: each rank keeps its part."""
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


# -- inside a loss, and the head split by class (`train.loss.split_vocabulary`)
#
# Split: each rank has V/N classes and computes their logits for the features of all ranks, so the gradients of its
# classes are complete: weight and gradient, V x W, are never sent, only features [B, W], their gradients and label ids,
# which grow with the batch. The head is then a DTensor under DDP and FSDP2, so checkpoints, averages and norms treat it
# like FSDP's. Off by default: DDP hides the head's gradient behind the trunk's backward pass, while nothing hides the
# split's messages. Neither was measured on GPUs. A group of None is a rank alone: nothing is sent.


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
