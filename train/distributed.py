"""One process or many: what torchrun says, and the few calls that differ."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from labels.settings import Runtime
from labels.storage import UserError


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
    """Join the process group that torchrun's variables describe; without them, a world of one. Inside another `world`,
    that one.

    Raises:
        UserError: CUDA is asked for and not there, or there are more ranks than GPUs.
    """
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise UserError(
            "train.runtime.device is cuda, but torch sees no CUDA device",
            allowed="auto, cpu",
            fix="--set train.runtime.device=cpu",
        )
    on_gpu = available and runtime.device != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"rank {device.index} of this node has no GPU of its own: torch sees {torch.cuda.device_count()}",
                fix=f"--nproc-per-node={torch.cuda.device_count()}",
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
    """fp32 products in TF32, as in the reference, for a while: features that are extracted afterwards must not change
    by it.
    """
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- parallel: One model over many ranks: DDP (weights whole everywhere) or FSDP2 (weights split), and what differs
# between them; under either, a layer split by its outputs, each of which belongs to one rank alone.
#
# The loop and the checkpoints see neither: they call what `spread` returns, and take tensors apart and together with
# the functions here.


def spread(model: nn.Module, parallel: str, world: World, split: nn.Linear | None = None) -> nn.Module:
    """What the loop calls in place of `model`, whose parameters FSDP splits in place.

    Args:
        model: on the device of `world`, with the same weights on every rank; its forward gives the mean loss of a
            rank's samples.
        parallel: `ddp` or `fsdp`. A world of one is left as it is.
        split: a layer of `model` whose outputs are divided among the ranks: neither its weights nor their gradients are
            exchanged, and its caller works with this rank's part (train/losses/distributed.py). None: there is none.
    """
    if world.size == 1:
        return model
    mesh = init_device_mesh(world.device.type, (world.size,)) if split is not None or parallel == "fsdp" else None
    if split is not None:
        _split_outputs(split, mesh)  # type: ignore[arg-type]
    own = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    if parallel == "fsdp":
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set(own.values()))
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(own))
    # Buffers matter where batch norm is: then all ranks take the first one's, which a checkpoint keeps.
    buffers = any(isinstance(module, _BatchNorm) for module in model.modules())
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, forward_sync_buffers=buffers, gradient_as_bucket_view=True
    )


def _split_outputs(layer: nn.Linear, mesh: DeviceMesh) -> None:
    for name, parameter in list(layer.named_parameters()):
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        layer.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What FSDP gathers together: the blocks of the trunk, and of the text tower where there is one."""
    towers = [getattr(model, name, None) for name in ("trunk", "text")]
    return [block for tower in towers if tower is not None for block in repeated_blocks(tower).values()]


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
def gradients_exchanged(spread_model: nn.Module, now: bool) -> Iterator[None]:
    """Around one forward and backward pass: whether its gradients are exchanged at once, or kept to be added to."""
    if isinstance(spread_model, DistributedDataParallel) and not now:
        with spread_model.no_sync():
            yield
        return
    if isinstance(spread_model, FSDPModule):
        spread_model.set_requires_gradient_sync(now)
    yield


def loss_and_gradient_norm(
    loss: torch.Tensor, parameters: Iterable[torch.Tensor], world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of `loss` over all ranks and norm of the whole gradient, the same on every rank and left on the device.

    Args:
        loss: scalar, this rank's.
        parameters: after the backward pass; split ones are counted once over all ranks.
        world: this process among all.

    Returns:
        float64 scalars.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = _square([gradient for gradient in gradients if isinstance(gradient, DTensor)], loss)
    both = torch.stack([loss.detach().double() / world.size, split])
    if world.size > 1:
        dist.all_reduce(both)
    same = _square([gradient for gradient in gradients if not isinstance(gradient, DTensor)], loss)
    return both[0], (both[1] + same).sqrt()


def _square(tensors: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors])).double().square().sum()  # type: ignore[reportPrivateImportUsage]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a split tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a split tensor, gathered (all ranks call it together); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The whole `value` on the device of `tensor`, and split as `tensor` is: each rank keeps its part."""
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
