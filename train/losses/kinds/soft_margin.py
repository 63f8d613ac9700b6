"""Binary cross-entropy, its mean over the classes (torch.nn.MultiLabelSoftMarginLoss)."""

from torch import Tensor

from labels.settings import Loss
from train.losses.head import Classwise, Head, Positives
from train.losses.kinds.bce import negative, positive


def batch_loss(settings: Loss, head: Head, labels: Positives) -> Tensor:
    return head.mean(Classwise(negative, positive), labels, divided_by=head.vocabulary)
