"""One file a loss, by the name that `train.loss.name` has for it; a new file is a new loss. What it holds:

    def batch_loss(settings: Loss, head: Head, labels: Positives) -> torch.Tensor

The loss of a batch, scalar, computed with its gradients, which it adds to the head's: `head.mean(rows, labels)` does
both for a loss of rows (head.RowLoss; classwise.Classwise where every class is taken by itself). Of a split head it is
this rank's part of a sum; `head.group` are then the ranks that hold the other classes of the same samples. `settings`
is `train.loss`. And, each only where it is so:

    WHOLE_BATCH = True     it compares the samples of a batch: gradient accumulation, which never has them together, is refused
    DISTRIBUTION = True    the softmax of the logits is what is learnt, for `train predict`; else it is the sigmoid of each
"""

from importlib import import_module
from types import ModuleType

from labels.settings import LOSSES, Train
from labels.storage import UserError


def kind(name: str) -> ModuleType:
    """The loss of that name, which the configuration has found to be there."""
    return import_module(f"{LOSSES}.{name}")


def check_accumulation(settings: Train) -> None:
    """Raises:
    UserError: the loss compares all samples of a batch, of which gradient accumulation sees only a part at a time.
    """
    if settings.runtime.accumulation > 1 and getattr(kind(settings.loss.name), "WHOLE_BATCH", False):
        raise UserError(
            f"train.loss.name is {settings.loss.name}, which compares all samples of a batch, and train.runtime.accumulation "
            f"{settings.runtime.accumulation} never has them together",
            allowed="1",
            fix="set train.runtime.accumulation=1",
        )
