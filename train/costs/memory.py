"""Memory of a training step on each device: for `train plan`, and for the error of a run whose device has too little.

    settings, costs -> step_memory: a forward and backward pass on fake tensors, all live bytes counted -> Memory
    Memory, a limit -> fitting: accumulation, gradient checkpointing, FSDP, or a smaller batch -> overrides for --set

Fake tensors have shapes and types, but no values: a pass over any batch takes a second. What is counted is what torch
allocates without `train.model.compile`, which needs less. Not counted: the workspaces of CUDA's libraries, what its
allocator cannot use, and NCCL's buffers, for which `usable` leaves a tenth.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labels.settings import Model, TextTower, Train
from labels.storage import UserError
from train.costs.flops import Costs, splits_vocabulary
from train.distributed import repeated_blocks
from train.losses.kinds import kind
from train.metrics import peak_memory_gib
from train.model import build_trunk, set_up_trunk
from train.optim import autocast_dtype
from train.text_tower import build_text_tower

_FEW_TOKENS = 2  # an embedding keeps no more activations for a larger vocabulary
_USABLE = 0.9
_GPU_BLOCK_BYTES = 32 << 20  # of the loss, in float32
_PAIR_BYTES = 17  # of an image and a text of CLIP's loss: four numbers in float32, masks
_ENOUGH_SAMPLES = 64  # at a time, to use a GPU well
_GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a step; `samples` are computed at a time."""

    samples: int
    states: int  # weights, gradients, moments, average
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """Of a step."""
        return self.states + self.activations + self.loss


@dataclass(frozen=True)
class Planned:
    """What is trained, on how many `ranks`; a `tower` is that of `train clip` or `lit`, whose trunk is `locked`."""

    costs: Costs
    ranks: int
    device: torch.device  # whose types are computed in
    tower: TextTower | None = None
    locked: bool = False


def usable(device_bytes: float) -> float:
    """Bytes of a device's memory that a step can take."""
    return _USABLE * device_bytes


def step_memory(settings: Train, planned: Planned, samples: int | None = None) -> Memory:
    """Memory of a step that computes `samples` at a time (default: as `settings` say).

    All gradients are counted from the first to the last moment, as accumulation and DDP keep them; a single device
    without accumulation frees them between steps, and needs up to that much less.
    """
    costs, ranks = planned.costs, planned.ranks
    samples = samples or settings.batch_size // ranks // settings.runtime.accumulation
    sharded = ranks if settings.runtime.parallel == "fsdp" else 1
    average = 4 if settings.optimizer.ema_decay is not None else 0
    split = costs.width is not None and splits_vocabulary(_classes(costs), costs.width, settings, ranks, planned.device)
    head = costs.head // (ranks if split else sharded)
    trained = head + (0 if costs.frozen else costs.trunk // sharded)
    states = trained * (16 + average) + (4 * costs.trunk if costs.frozen else 0)
    activations = activation_bytes(settings, planned.device, samples, planned.tower, frozen=planned.locked)
    if sharded > 1 and not costs.frozen:
        activations += _gathered_bytes(settings.model, 0 if split else costs.head)
    loss = _loss_bytes(settings, planned, samples, split)
    # At the end of a step the average takes the difference to all weights, when there are no activations.
    return Memory(samples, states, max(activations, average * trained - loss), loss)


def _classes(costs: Costs) -> int:
    width = costs.width or 0
    return (costs.head - 2 * width) // (width + 1)  # LayerNorm(W), weight [V, W] and bias [V]


def _loss_bytes(settings: Train, planned: Planned, samples: int, split: bool) -> int:
    """See train/losses: the logits of a chunk, the weight in the type of the products, and the gradients."""
    costs, ranks = planned.costs, planned.ranks
    if costs.width is None:
        return _PAIR_BYTES * samples * samples * ranks
    element = 4 if autocast_dtype(settings.runtime.precision, planned.device) is None else 2
    classes, rows = _classes(costs), samples
    if split:
        classes, rows = -(-classes // ranks), samples * ranks
    weight = classes * (costs.width + 1)
    copies = element * weight + _GPU_BLOCK_BYTES if element == 2 else 0
    added = 4 * weight if settings.runtime.accumulation > 1 or ranks > 1 else 0  # to gradients that are there
    logits = min(max(settings.loss.memory, classes * element), rows * classes * element)
    return logits + copies + added + rows * costs.width * (4 + 4 + element)


def _gathered_bytes(model: Model, head: int) -> int:
    """FSDP: weights outside of the blocks, and weights and gradients of the block in use and the next one."""
    with torch.device("meta"):
        trunk = build_trunk(model)
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in repeated_blocks(trunk).values()]
    outside = sum(weight.numel() for weight in trunk.parameters()) - sum(sizes) + head
    return 4 * outside + 2 * (4 + 4) * max(sizes, default=0)


# -- a pass on fake tensors


def activation_bytes(
    settings: Train, device: torch.device, samples: int, text: TextTower | None = None, *, frozen: bool = False
) -> int:
    """Most bytes that a forward and backward pass on `samples` images holds next to weights and gradients, images
    included, in the types that `device` computes in. A `frozen` trunk keeps nothing; `text` is trained with it.
    """
    dtype, size = autocast_dtype(settings.runtime.precision, device), settings.model.image_size
    with torch.device("meta"):
        trunk = build_trunk(settings.model)
        towers = [trunk, *([build_text_tower(text, _FEW_TOKENS)] if text else [])]
    trunk.train(not frozen).requires_grad_(not frozen)
    set_up_trunk(trunk, settings.model.model_copy(update={"compile": False}))
    if text:
        towers[1].train().set_grad_checkpointing(settings.model.grad_checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for tower in towers:
            _make_fake(tower)
        with LiveBytes(towers) as live, _types_of(device, dtype):
            outputs = [trunk(torch.zeros(samples, 3, size, size))]
            if text:
                outputs.append(towers[1](torch.zeros(samples, text.context, dtype=torch.int64)))
            loss: Any = sum(output.float().sum() for output in outputs if output.requires_grad)
            del outputs
        with live:
            loss.backward()
        return live.peak


def _make_fake(net: nn.Module) -> None:
    """Fake tensors of the same shapes as weights, buffers and gradients; the CPU's, as autocast has no meta device."""
    for module in net.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(fake, weight.requires_grad)
                if weight.requires_grad:
                    module._parameters[name].grad = torch.empty(weight.shape, dtype=weight.dtype)  # type: ignore[union-attr]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors that operations return, except that of the weights and gradients of `nets`."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.peak, self._bytes = 0, 0
        weights = [weight for net in nets for weight in (*net.parameters(), *net.buffers())]
        known = [*weights, *(weight.grad for weight in weights if weight.grad is not None)]
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._known:
            self._known[address] = storage.nbytes()
            self._bytes += self._known[address]
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self._bytes -= self._known.pop(address)


@contextmanager
def _types_of(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast on the CPU's tensors, with the float32 operations that it has on a GPU alone."""
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        if dtype is None or device.type == "cpu":
            yield
            return
        with _Float32OnGpu():
            yield


class _Float32OnGpu(TorchFunctionMode):
    _FUNCTIONS = {functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax, torch.Tensor.softmax}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FUNCTIONS and args and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


# -- what fits


def verdict(settings: Train, planned: Planned, device_bytes: float) -> str:
    """Whether a step fits in the memory of a device, and what would."""
    limit, memory = usable(device_bytes), step_memory(settings, planned)
    of = f"{memory.total / _GIB:.1f} of {device_bytes / _GIB:.1f} GiB, {limit / _GIB:.1f} of which are for the step"
    if memory.total <= limit:
        return f"yes: {of}; at most about {most_samples(settings, planned, limit):,} samples at a time"
    found = fitting(settings, planned, limit)
    if found is None:
        return (
            f"no: {of}; not even few samples at a time, with gradient checkpointing{' and FSDP' * (planned.ranks > 1)}"
        )
    changes, smaller = found
    return f"no: {of}; {smaller.total / _GIB:.1f} with {smaller.samples:,} samples at a time: {as_options(changes)}"


def most_samples(settings: Train, planned: Planned, limit: float) -> int:
    """About how many samples at a time take `limit` bytes, from the memory of two numbers of samples."""
    one = step_memory(settings, planned)
    more = step_memory(settings, planned, 4 * one.samples)
    return int(one.samples + (limit - one.total) * 3 * one.samples / (more.total - one.total))


def fitting(settings: Train, planned: Planned, limit: float) -> tuple[list[str], Memory] | None:
    """Overrides of a configuration with which a step takes at most `limit` bytes, and its memory; None if none is
    known. Only where the loss compares all samples of a batch is another `train.batch_size` among them.
    """
    best: tuple[list[str], Memory] | None = None
    for changes in _variants(settings, planned.ranks):
        try:
            variant = _changed(settings, changes)
            found = _split_to_fit(variant, planned, limit)
        except UserError:  # a trunk without gradient checkpointing
            continue
        if found is None:
            continue
        memory, parts, batch = found
        more = [f"train.runtime.accumulation={parts}"] if parts != settings.runtime.accumulation else []
        more += [f"train.batch_size={batch}"] if batch != settings.batch_size else []
        if best is None or memory.samples > best[1].samples:
            best = [*changes, *more], memory
        enough = min(_ENOUGH_SAMPLES, settings.batch_size // planned.ranks)
        if memory.samples >= enough and batch == settings.batch_size:
            break
    return best


def _variants(settings: Train, ranks: int) -> Iterator[list[str]]:
    sharded = ranks > 1 and settings.runtime.parallel != "fsdp"
    for parallel in ([], ["train.runtime.parallel=fsdp"]) if sharded else ([],):
        yield parallel
        if not settings.model.grad_checkpointing:
            yield [*parallel, "train.model.grad_checkpointing=true"]


def _changed(settings: Train, changes: list[str]) -> Train:
    model, runtime = {}, {}
    if "train.model.grad_checkpointing=true" in changes:
        model["grad_checkpointing"] = True
    if "train.runtime.parallel=fsdp" in changes:
        runtime["parallel"] = "fsdp"
    parts = {"model": settings.model.model_copy(update=model), "runtime": settings.runtime.model_copy(update=runtime)}
    return settings.model_copy(update=parts)


def _split_to_fit(settings: Train, planned: Planned, limit: float) -> tuple[Memory, int, int] | None:
    """Memory, number of parts and batch size: the fewest parts that fit; where parts are refused, a smaller batch.

    Memory is the greatest of several straight lines over the samples, so a line between two of them is never below it.
    """
    own = settings.batch_size // planned.ranks
    whole_batch = planned.tower is not None or getattr(kind(settings.loss.name), "WHOLE_BATCH", False)
    few, many = (step_memory(settings, planned, samples) for samples in (min(2, own), own))
    slope = (many.total - few.total) / max(many.samples - few.samples, 1)
    most = few.samples + (limit - few.total) / slope if slope else float(own)
    if few.total > limit:
        return None
    if whole_batch:
        samples = own if many.total <= limit else int(most)
        parts, batch = 1, samples * planned.ranks
    else:
        parts = next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= most)
        samples, batch = own // parts, settings.batch_size
    if samples < few.samples:
        return None
    runtime = settings.runtime.model_copy(update={"accumulation": parts})
    settings = settings.model_copy(update={"runtime": runtime, "batch_size": batch})
    return step_memory(settings, planned), parts, batch


def as_options(overrides: list[str]) -> str:
    """`--set KEY=VALUE ...`, to be pasted."""
    return " ".join(f"--set {override}" for override in overrides)


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def out_of_memory(settings: Train, costs: Costs | None, ranks: int, device: torch.device) -> UserError:
    """The error of a run whose device has too little memory; `costs` of a classifier give a suggestion."""
    parts, size = settings.runtime.accumulation, device_bytes(device)
    peak = f"peak {peak_memory_gib(device):.1f}" + (f" of {size / _GIB:.1f}" if size else "")
    fix = "--set train.model.grad_checkpointing=true, or a smaller batch"
    if costs is not None and costs.width is not None:
        planned = Planned(costs, ranks, device)
        limit = 0.9 * step_memory(settings, planned).total  # other programs may hold some of the device's memory
        if found := fitting(settings, planned, limit if size is None else min(limit, usable(size))):
            changes, memory = found
            fix = f"{as_options(changes)} ({memory.samples} samples at a time, about {memory.total / _GIB:.1f} GiB)"
    return UserError(
        f"{device} is out of memory with {settings.batch_size // ranks // parts} samples at a time, {peak} GiB "
        f"(train.batch_size {settings.batch_size}, {ranks} ranks, train.runtime.accumulation {parts})",
        fix=fix,
    )
