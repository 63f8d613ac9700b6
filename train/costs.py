"""What training a model costs: parameters, operations and activations of a sample, messages between ranks; for MFU,
announcement and plan.

Operations are counted, not guessed: torch's FlopCounterMode over one forward pass of the trunk without data (meta
    device). The backward
pass is twice that, for the gradients of inputs and weights (the counter's own number is many times too high where
convolutions are grouped). The head is a matrix product like the others, however the loss cuts it into chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from labels.settings import Model, TextTower, Train
from train.losses.distributed import can_split, check_split
from train.model import build_head, build_trunk, set_up_trunk
from train.optim import autocast_dtype
from train.text_tower import build_text_tower

# Dense bf16 matrix products, TFLOP/s, by a part of the device's name, the longer names first (vendors' data sheets).
# TF32 is half of it.
_PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "GH200": 989,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A40": 150,
    "A10": 125,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}

_FEW_TOKENS = 2  # the vocabulary does not count: an embedding keeps no more for more of it


@dataclass(frozen=True)
class Costs:
    """Of a model: numbers of parameters, and `flops` of a sample, forward and backward (a multiplication and an
    addition are two).

    Attributes:
        head: all beside the trunk; `head_name`: what that is.
        width: W of the features that a classifying head takes; None where there is no such head.
        frozen: the trunk is not trained.
    """

    trunk: int
    head: int
    flops: int
    width: int | None = None
    head_name: str = "head"
    frozen: bool = False

    @property
    def parameters(self) -> int:
        """Those that are trained."""
        return self.head if self.frozen else self.trunk + self.head


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


class Trunk(NamedTuple):
    """Of a trunk: its parameters, the operations of one image forward, and the width of its features."""

    parameters: int
    flops: int
    width: int


def trunk_costs(trunk: nn.Module, side: int) -> Trunk:
    """Count a trunk, which may lie on the meta device, on one image of `side` pixels; it is left in evaluation mode."""
    images = torch.zeros(1, 3, side, side, device=_device(trunk))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        width = trunk.eval()(images).shape[1]
    return Trunk(_count(trunk), counter.get_total_flops(), width)


def tower_costs(trunk: Trunk, text: nn.Module, tower: TextTower, *, locked: bool = False) -> Costs:
    """Costs of two towers, without the products of all images with all captions, which depend on the batch.

    Args:
        trunk: of the image tower.
        text: the other, on any device.
        tower: its settings.
        locked: the trunk is not trained: no backward pass through it.
    """
    texts = torch.zeros(1, tower.context, dtype=torch.int64, device=_device(text))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        text.train()(texts)  # as it is trained: in evaluation attention takes a path that is not counted
    projection = trunk.width * tower.embed_dim
    flops = 3 * (counter.get_total_flops() + 2 * projection) + (1 if locked else 3) * trunk.flops
    return Costs(trunk.parameters, _count(text) + projection + 1, flops, head_name="text tower", frozen=locked)


def _device(net: nn.Module) -> torch.device:
    return next((parameter.device for parameter in net.parameters()), torch.device("cpu"))


def activation_bytes(
    settings: Train, device: torch.device, text: TextTower | None = None, *, frozen: bool = False
) -> int:
    """What is kept of one sample for its backward pass, counted on the CPU, in the precision that `device` would
    compute in.

    Args:
        settings: `train`.
        device: see above.
        text: a text tower's settings, where it is trained beside the trunk.
        frozen: the trunk is not trained: nothing of it is kept.
    """
    size, found = settings.model.image_size, 0
    if not frozen:
        trunk = build_trunk(settings.model).train()
        set_up_trunk(trunk, settings.model.model_copy(update={"compile": False}))
        found += _kept_bytes(lambda samples: trunk(torch.zeros(samples, 3, size, size)), settings, device)
    if text:
        tower = build_text_tower(text, _FEW_TOKENS).train()
        tower.set_grad_checkpointing(settings.model.grad_checkpointing)
        found += _kept_bytes(
            lambda samples: tower(torch.zeros(samples, text.context, dtype=torch.int64)), settings, device
        )
    return found


def _kept_bytes(forward: Callable[[int], torch.Tensor], settings: Train, device: torch.device) -> int:
    """Of one sample more in a batch."""
    dtype = autocast_dtype(settings.runtime.precision, device)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def of(samples: int) -> int:
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype is not None),
        ):
            features = forward(samples)  # held until all is counted, so that no memory is used twice
        return sum(kept.values()) if features.requires_grad else 0

    return of(3) - of(2)  # weights, and autocast's copies of them, are in both


def messages(costs: Costs, settings: Train, ranks: int, device: torch.device) -> str:
    """What one step sends between ranks, how much of it is the head's, whole or split by class, and which of the two is
    done.
    """
    gradients, head = 4 * costs.parameters, 4 * costs.head
    if settings.runtime.parallel == "fsdp":
        times, how = 3, "weights gathered twice, gradients reduced once"
    else:
        times, how = 2, "gradients reduced and spread"
    sent, choice = times * (ranks - 1) / ranks * gradients / 2**20, ""
    if costs.width is not None:
        shape = (
            (costs.head - 2 * costs.width) // (costs.width + 1),
            costs.width,
        )  # the head is LayerNorm(W), weight [V, W] and bias [V]
        whole, split = (bytes_ / 2**20 for bytes_ in head_messages(*shape, settings, ranks, device))
        is_split = splits_vocabulary(*shape, settings, ranks, device)
        if is_split:
            sent = times * (ranks - 1) / ranks * (gradients - head) / 2**20 + split
        choice = (
            f"; for the head {whole:,.0f} MiB whole, {split:,.0f} MiB split by class: {'split' if is_split else 'whole'} "
            f"(train.loss.split_vocabulary)"
        )
    return (
        f"{gradients / 2**20:,.0f} MiB of gradients, {head / 2**20:,.0f} MiB ({head / gradients:.0%}) of them the {costs.head_name}'s; "
        f"{settings.runtime.parallel} on {ranks} ranks: each sends {sent:,.0f} MiB a step ({how}){choice}"
    )


def head_messages(
    vocabulary: int, width: int, settings: Train, ranks: int, device: torch.device
) -> tuple[float, float]:
    """Bytes that a rank sends a step for the head: when it is whole, and when it is split by class.

    Whole: its gradient reduced and spread (DDP), or its weights gathered and the gradient reduced (FSDP). Split: the
        features of the batch
    gathered, in the type of the products, and their gradients reduced, in float32. Label ids and the sums of a row are
    left out.
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
