"""What is fine-tuned: an encoder's own net with a linear head; its rates layer by layer, and its drop path.

B batch, S image side, W feature width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay  # type: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from labels.settings import Optimizer
from train.optim import adamw
from train.parallel import repeated_blocks
from train.trainer import MakeOptimizer

_HEAD_STD = 2e-5
_NOT_DECAYED = ("*pos_embed*", "*positional_embedding*", "*position_embedding*", "*cls_token*", "*class_embedding*", "*reg_token*")
_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")
_AFTER_ALL = "a name that no matcher knows"


class FineTuned(nn.Module):
    """Trunk and head: normalised images [B, 3, S, S] and targets [B, C] that sum to 1 -> the batch's mean cross entropy.

    The head's weight is drawn from N(0, 2e-5), truncated, its bias 0 (MAE's main_finetune.py).

    Args:
        trunk: normalised images -> features [B, W].
    """

    def __init__(self, trunk: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.loss = SoftTargetCrossEntropy()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.head(self.trunk(images)), targets)

    def group_matcher(self, coarse: bool = False) -> Any:
        """timm's interface: the name of a trained parameter -> the number of its layer, from 0."""
        numbers = {f"trunk.{name}": number for name, number in layers(self.trunk).items()}
        last = max(numbers.values())
        return lambda name: numbers.get(name, last)


def layers(trunk: nn.Module) -> dict[str, int]:
    """The layer of every trained parameter of a trunk; the highest number is the head's, whether or not the trunk has something there.

    timm's nets group themselves. Of others: what comes before the blocks is layer 0, then block after block, then the rest (BEiT's, MAE's).
    Blocks that nothing reads (beyond `--layer`) do not count: the last one that is read is next to the head.
    """
    held = getattr(trunk, "net", trunk)  # a readout holds the model as `net`
    before = "net." if held is not trunk else ""
    trained = [name for name, parameter in held.named_parameters() if parameter.requires_grad]
    if hasattr(held, "group_matcher"):
        names = [(name, None) for name in (*trained, _AFTER_ALL)]
        numbers: Any = group_with_matcher(names, held.group_matcher(coarse=False), reverse=True)  # type: ignore[operator, arg-type]
    else:
        numbers = _by_blocks(held, trained)
    return {f"{before}{name}": number for name, number in numbers.items()}


def _by_blocks(net: nn.Module, trained: Sequence[str]) -> dict[str, int]:
    blocks = [block for name in repeated_blocks(net) if any(one.startswith(block := f"{name}.") for one in trained)]
    numbers, begun, last = {_AFTER_ALL: len(blocks) + 1}, 0, len(blocks) + 1
    for name in trained:
        within = next((number for number, block in enumerate(blocks, start=1) if name.startswith(block)), None)
        begun = within or begun
        # open_clip's projection is a parameter of the tower, so listed first
        after = begun == len(blocks) or name.rpartition(".")[2] == "proj"
        numbers[name] = within or (last if after else begun)
    return numbers


def set_drop_path(trunk: nn.Module, rate: float) -> float:
    """Drop residual branches while training: never in the first block, `rate` in the last, linearly between, as timm's `drop_path_rate`.

    Args:
        trunk: unfrozen; blocks without a trained parameter do not count.

    Returns:
        `rate`, or 0.0 where the architecture has no place for it.
    """
    read = [module for module in trunk.modules() if any(parameter.requires_grad for parameter in module.parameters())]
    blocks = [(module, names) for module in read if (names := _drop_paths(module))]
    for number, (block, names) in enumerate(blocks):
        share = rate * number / max(len(blocks) - 1, 1)
        for name in names:
            setattr(block, name, DropPath(share) if share else nn.Identity())
    return rate if blocks else 0.0


def _drop_paths(module: nn.Module) -> list[str]:
    return [name for name in _DROP_PATHS if hasattr(module, name) and isinstance(getattr(module, name), nn.Module | None)]


def train_what_is_read(model: FineTuned, side: int) -> None:
    """Unfreeze all parameters that the loss depends on: not a pooler, nor blocks beyond `--layer`, that nothing reads.

    Args:
        model: frozen or not, on the CPU or the device. side: S.
    """
    model.requires_grad_(True).eval()
    device = model.head.weight.device
    images = torch.zeros(2, 3, side, side, device=device)
    model(images, torch.full((2, model.head.out_features), 1 / model.head.out_features, device=device)).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def make_layer_decayed(layer_decay: float) -> MakeOptimizer:
    """A maker of AdamW whose rate falls by the factor `layer_decay` with every layer below the head."""

    def make(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
        groups = param_groups_layer_decay(model, settings.weight_decay, no_weight_decay_list=_NOT_DECAYED, layer_decay=layer_decay)
        return adamw(groups, settings)

    return make
