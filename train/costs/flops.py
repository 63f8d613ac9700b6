"""What training a model costs: parameters, operations of a sample, and messages between ranks; for MFU, the first log
lines and `train plan`.

Operations are counted by torch's FlopCounterMode over one forward pass on the meta device, times three for the backward
pass (the counter's own backward is many times too high for grouped convolutions). A trained trunk is counted in
training mode, where timm's `patch_drop_rate` leaves out tokens. The head counts as a matrix product, whatever chunks
the loss computes it in.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from labels.settings import Model, TextTower, Train
from train.distributed import can_split, check_split
from train.model import build_head, build_trunk
from train.optim import autocast_dtype

# Dense bf16 matrix products, TFLOP/s, by a part of the device's name, longer names first (vendors' data sheets). TF32
# is half of it.
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
_IMAGES = 2  # BatchNorm cannot be trained on one


@dataclass(frozen=True)
class Costs:
    """Costs of a model; `flops`: of a sample, forward and backward (a multiplication and an addition are two)."""

    trunk: int  # parameters
    head: int  # parameters of all but the trunk, which are a `head_name`
    flops: int
    width: int | None = None  # W, the features of a classification head; None without such a head
    head_name: str = "head"
    frozen: bool = False  # the trunk is not trained

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return self.head if self.frozen else self.trunk + self.head


def model_costs(model: Model, vocabulary: int) -> Costs:
    """Costs of a trunk with a head of `vocabulary` classes; no memory is taken for weights."""
    with torch.device("meta"):
        trunk = trunk_costs(build_trunk(model), model.image_size, trained=True)
        head = _count(build_head(trunk.width, vocabulary))
    return Costs(trunk.parameters, head, 3 * (trunk.flops + 2 * trunk.width * vocabulary), trunk.width)


class Trunk(NamedTuple):
    parameters: int
    flops: int  # of one image, forward
    width: int  # of its features


def trunk_costs(trunk: nn.Module, side: int, *, trained: bool) -> Trunk:
    """Count a trunk on images of `side` pixels, in training mode if it is `trained` (then on the meta device: norms of
    a batch note its mean); leaves it without gradients, in evaluation mode.
    """
    images = torch.zeros(_IMAGES, 3, side, side, device=_device(trunk))
    trunk.train(trained).requires_grad_(False)  # the counter fails at a weight without gradient
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        width = trunk(images).shape[1]
    trunk.eval()
    return Trunk(_count(trunk), counter.get_total_flops() // _IMAGES, width)


def tower_costs(trunk: Trunk, text: nn.Module, tower: TextTower, *, locked: bool = False) -> Costs:
    """Costs of an image tower and a text tower, without the products of all images with all captions, which depend on
    the batch. `locked`: the trunk is not trained, so it has no backward pass.
    """
    texts = torch.zeros(1, tower.context, dtype=torch.int64, device=_device(text))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        text.train()(texts)  # as it is trained: in evaluation attention takes a path that is not counted
    projection = trunk.width * tower.embed_dim
    flops = 3 * (counter.get_total_flops() + 2 * projection) + (1 if locked else 3) * trunk.flops
    return Costs(trunk.parameters, _count(text) + projection + 1, flops, head_name="text tower", frozen=locked)


def _device(net: nn.Module) -> torch.device:
    return next((parameter.device for parameter in net.parameters()), torch.device("cpu"))


def messages(costs: Costs, settings: Train, ranks: int, device: torch.device) -> str:
    """The log line about what one step sends between ranks, and whether the head is sent whole or split by class."""
    gradients, head = 4 * costs.parameters / 2**20, 4 * costs.head / 2**20  # MiB
    if settings.runtime.parallel == "fsdp":
        times, how = 3, "weights gathered twice, gradients reduced once"
    else:
        times, how = 2, "gradients reduced and spread"
    others = (ranks - 1) / ranks
    sent, choice = times * others * gradients, ""
    if costs.width is not None:
        vocabulary = (costs.head - 2 * costs.width) // (costs.width + 1)  # LayerNorm(W), weight [V, W] and bias [V]
        head_sizes = vocabulary, costs.width, settings, ranks, device
        whole, split = (size / 2**20 for size in head_messages(*head_sizes))
        is_split = splits_vocabulary(*head_sizes)
        if is_split:
            sent = times * others * (gradients - head) + split
        choice = (
            f"; for the head {whole:,.0f} MiB whole, {split:,.0f} MiB split by class: "
            f"{'split' if is_split else 'whole'} (train.loss.split_vocabulary)"
        )
    return (
        f"{gradients:,.0f} MiB of gradients, {head:,.0f} MiB ({head / gradients:.0%}) of them the {costs.head_name}'s; "
        f"{settings.runtime.parallel} on {ranks} ranks: each sends {sent:,.0f} MiB a step ({how}){choice}"
    )


def head_messages(
    vocabulary: int, width: int, settings: Train, ranks: int, device: torch.device
) -> tuple[float, float]:
    """Bytes that a rank sends per step for the head: if it is whole, and if it is split by class.

    Whole: its gradient reduced and spread (DDP), or its weights gathered and the gradient reduced (FSDP). Split: the
    features of the batch gathered, in the type of the products, and their gradients reduced in float32. Label ids and
    the sums of a row are not counted.
    """
    element = 4 if autocast_dtype(settings.runtime.precision, device) is None else 2
    others = (ranks - 1) / ranks
    return 2 * others * 4 * (vocabulary * (width + 1) + 2 * width), others * settings.batch_size * width * (element + 4)


def splits_vocabulary(vocabulary: int, width: int, settings: Train, ranks: int, device: torch.device) -> bool:
    """`loss.split_vocabulary`, where `auto` takes what sends less; UserError if it is true and a rank gets no class."""
    if ranks == 1 or not settings.loss.split_vocabulary:
        return False
    if settings.loss.split_vocabulary == "auto":
        whole, split = head_messages(vocabulary, width, settings, ranks, device)
        return can_split(vocabulary, ranks) and split < whole
    check_split(vocabulary, ranks)
    return True


def peak_flops(settings: Train, device: torch.device) -> float | None:
    """Peak FLOP/s of one device in the precision of the run; None if it is not known."""
    if settings.runtime.peak_tflops is not None:
        return settings.runtime.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    known = peak_tflops(torch.cuda.get_device_name(device))
    share = 0.5 if autocast_dtype(settings.runtime.precision, device) is None else 1.0
    return None if known is None else known * share * 1e12


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name; None if it is not known."""
    return next((tflops for part, tflops in _PEAK_TFLOPS.items() if part in name), None)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
