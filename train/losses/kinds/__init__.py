"""One file per loss, named like its value of `train.loss.name`; a new file is a new loss. It defines

    def batch_loss(settings: Loss, head: Head, labels: Positives) -> Tensor

the scalar loss of a batch (of a split head: this rank's part of a sum), whose gradients it adds to the head's:
`head.mean(row_loss, labels)` does both, with a RowLoss or Classwise of train/losses/head.py. Optional constants:
    WHOLE_BATCH = True     compares the samples of a batch: gradient accumulation is refused
    DISTRIBUTION = True    learns the softmax of the logits, for `train predict`; otherwise the sigmoid of each
"""

from importlib import import_module
from types import ModuleType

from labels.settings import LOSSES, Train
from labels.storage import UserError


def kind(name: str) -> ModuleType:
    """The file of the loss `name`, which the configuration has checked."""
    return import_module(f"{LOSSES}.{name}")


def check_accumulation(settings: Train) -> None:
    """Raises UserError if the loss compares all samples of a batch, and gradient accumulation splits the batch."""
    parts, name = settings.runtime.accumulation, settings.loss.name
    if parts > 1 and getattr(kind(name), "WHOLE_BATCH", False):
        raise UserError(
            f"train.loss.name is {name}, which compares all samples of a batch, but train.runtime.accumulation {parts} "
            "splits the batch",
            allowed="1",
            fix="set train.runtime.accumulation=1",
        )
