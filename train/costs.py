"""What training a model costs: parameters, operations and activations of a sample, messages between ranks; for MFU, announcement and plan.

Operations are counted, not guessed: torch's FlopCounterMode over one forward pass of the trunk without data (meta device). The backward
pass is twice that, for the gradients of inputs and weights (the counter's own number is many times too high where convolutions are
grouped). The head is a matrix product like the others, however the loss cuts it into chunks.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from labels.settings import Model, Train
from train.losses.split import can_split, check_split
from train.model import build_head, build_trunk, set_up_trunk
from train.precision import autocast_dtype

# Dense bf16 matrix products, TFLOP/s, by a part of the device's name, the longer names first (vendors' data sheets). TF32 is half of it.
_PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "GH200": 989, "H100": 989, "H200": 989, "H800": 989, "B200": 2250, "A100": 312, "A800": 312,
    "L40S": 362, "L4": 121, "A40": 150, "A10": 125, "RTX A6000": 155, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Of a model: numbers of parameters; `flops` of a sample, forward and backward (multiplication and addition are two); `width` W."""

    trunk: int
    head: int
    flops: int
    width: int

    @property
    def vocabulary(self) -> int:
        """V: the head is LayerNorm(W), weight [V, W] and bias [V]."""
        return (self.head - 2 * self.width) // (self.width + 1)

    @property
    def parameters(self) -> int:
        return self.trunk + self.head


def model_costs(model: Model, vocabulary: int) -> Costs:
    """Costs of a trunk with a head of `vocabulary` classes; no memory is taken for weights."""
    with torch.device("meta"):
        trunk = build_trunk(model).eval()
        head = build_head(int(trunk.num_features), vocabulary)  # type: ignore[arg-type]
        image = torch.empty(1, 3, model.image_size, model.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trunk(image)
    width = int(trunk.num_features)  # type: ignore[arg-type]
    return Costs(_count(trunk), _count(head), 3 * (counter.get_total_flops() + 2 * width * vocabulary), width)


def activation_bytes(settings: Train, device: torch.device) -> int:
    """What the trunk keeps of one sample for its backward pass, counted on the CPU, in the precision that `device` would compute in."""
    trunk, dtype = build_trunk(settings.model).train(), autocast_dtype(settings.runtime.precision, device)
    set_up_trunk(trunk, settings.model.model_copy(update={"compile": False}))
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def of(samples: int) -> int:
        kept.clear()
        images = torch.zeros(samples, 3, settings.model.image_size, settings.model.image_size)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype is not None),
        ):
            features = trunk(images)  # held until all is counted, so that no memory is used twice
        return sum(kept.values()) if features.requires_grad else 0

    return of(3) - of(2)  # weights, and autocast's copies of them, are in both


def messages(costs: Costs, settings: Train, ranks: int, device: torch.device) -> str:
    """What one step sends between ranks, how much of it is the head's, whole or split by class, and which of the two is done."""
    gradients, head, shape = 4 * costs.parameters, 4 * costs.head, (costs.vocabulary, costs.width)
    if settings.runtime.parallel == "fsdp":
        times, how = 3, "weights gathered twice, gradients reduced once"
    else:
        times, how = 2, "gradients reduced and spread"
    whole, split = (bytes_ / 2**20 for bytes_ in head_messages(*shape, settings, ranks, device))
    is_split = splits_vocabulary(*shape, settings, ranks, device)
    sent = times * (ranks - 1) / ranks * (gradients - head * is_split) / 2**20 + split * is_split
    return (
        f"{gradients / 2**20:,.0f} MiB of gradients, {head / 2**20:,.0f} MiB ({head / gradients:.0%}) of them the head's; "
        f"{settings.runtime.parallel} on {ranks} ranks: each sends {sent:,.0f} MiB a step ({how}); "
        f"for the head {whole:,.0f} MiB whole, {split:,.0f} MiB split by class: {'split' if is_split else 'whole'} "
        f"(train.loss.split_vocabulary)"
    )


def head_messages(vocabulary: int, width: int, settings: Train, ranks: int, device: torch.device) -> tuple[float, float]:
    """Bytes that a rank sends a step for the head: when it is whole, and when it is split by class.

    Whole: its gradient reduced and spread (DDP), or its weights gathered and the gradient reduced (FSDP). Split: the features of the batch
    gathered, in the type of the products, and their gradients reduced, in float32. Label ids and the sums of a row are left out.
    """
    element = 4 if autocast_dtype(settings.runtime.precision, device) is None else 2
    others = (ranks - 1) / ranks
    return 2 * others * 4 * (vocabulary * (width + 1) + 2 * width), others * settings.batch_size * width * (element + 4)


def splits_vocabulary(vocabulary: int, width: int, settings: Train, ranks: int, device: torch.device) -> bool:
    """Whether the head is split by class: `loss.split_vocabulary`, where `auto` takes what sends less.

    Raises:
        UserError: it is asked for, and some rank would get no class.
    """
    if ranks == 1 or not settings.loss.split_vocabulary:
        return False
    if settings.loss.split_vocabulary == "auto":
        whole, split = head_messages(vocabulary, width, settings, ranks, device)
        return can_split(vocabulary, ranks) and split < whole
    check_split(vocabulary, ranks)
    return True


def peak_flops(settings: Train, device: torch.device) -> float | None:
    """FLOP/s that one device could do in the precision of the run; None where that is not known."""
    if settings.runtime.peak_tflops is not None:
        return settings.runtime.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    known = peak_tflops(torch.cuda.get_device_name(device))
    share = 0.5 if autocast_dtype(settings.runtime.precision, device) is None else 1.0
    return None if known is None else known * share * 1e12


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device of that name, if it is known."""
    return next((tflops for part, tflops in _PEAK_TFLOPS.items() if part in name), None)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
