"""What several tests share: loss cases."""

from typing import Any

import torch
from torch import nn

from dense_losses import dense_loss
from labels.manifest import PAD_ID
from labels.settings import Loss
from train.losses.head import HeadLoss

B, W, V, K = 9, 5, 40, 6


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def some_labels(generator: torch.Generator, rows: int = B, classes: int = V, limit: int = K) -> torch.Tensor:
    """Ascending sets of 0 to `limit` labels."""
    label_ids = torch.full((rows, limit), PAD_ID, dtype=torch.int32)
    for row in label_ids:
        count = int(torch.randint(0, min(limit, classes) + 1, (1,), generator=generator))
        row[:count] = torch.randperm(classes, generator=generator)[:count].sort().values
    return label_ids


def some_case(
    seed: int, rows: int = B, classes: int = V, limit: int = K, width: int = W
) -> tuple[Operands, torch.Tensor, torch.Tensor]:
    """Float32 operands, labels and IDF weights, a fifth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    features, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((rows, width), (classes, width), (classes,))
    )
    idf = torch.rand(classes, generator=generator) * 9 * (torch.rand(classes, generator=generator) > 0.2)
    return (features, weight, bias), some_labels(generator, rows, classes, limit), idf


def gradients(loss: torch.Tensor, operands: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, operands))


def fused_and_dense(
    settings: Loss, operands: Operands, label_ids: torch.Tensor, idf: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss and three gradients, of the module in the operands' type and of the dense formula in float64."""
    mine = [operand.clone().requires_grad_() for operand in operands]
    theirs = [operand.double().requires_grad_() for operand in operands]
    loss = HeadLoss(settings, idf)(mine[0], mine[1], mine[2], label_ids)
    dense = dense_loss(settings, nn.functional.linear(*theirs), label_ids, idf.double())
    return [loss, *gradients(loss, mine)], [dense, *gradients(dense, theirs)]


def assert_near(
    found: list[torch.Tensor], expected: list[torch.Tensor], relative: float = 1e-6, cancelled: float = 1e-12
) -> None:
    """Each tensor within `relative` of its largest value; `cancelled` where the parts of a sum may cancel to nothing."""
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        assert (one.double() - other.double()).abs().max() <= relative * other.abs().max() + cancelled
