"""The sparse loss against the dense formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labels.schema import PAD_ID
from train.losses.softmax import softmax_loss, target_weights

V, K = 30, 6


def dense_loss(logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """METHOD, section 1, with the dense target written out."""
    losses = []
    for row, ids in zip(logits.double(), label_ids, strict=True):
        target = torch.zeros(len(row), dtype=torch.float64)
        for label in ids[ids != PAD_ID]:
            target[label] = idf[label].double()
        if target.sum() > 0:
            target = target / target.sum()
        losses.append(-(target * torch.log_softmax(row, 0)).sum())
    return torch.stack(losses).mean()


def some_rows(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, V, generator=generator) * 5
    label_ids = torch.full((rows, K), PAD_ID, dtype=torch.int32)
    for row in range(rows):
        count = int(torch.randint(0, K + 1, (1,), generator=generator))
        label_ids[row, :count] = torch.randperm(V, generator=generator)[:count].sort().values.int()
    idf = torch.rand(V, generator=generator) * (torch.rand(V, generator=generator) > 0.2)
    return logits, label_ids, idf


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_loss_and_gradient_equal_the_dense_form(seed: int, rows: int) -> None:
    logits, label_ids, idf = some_rows(seed, rows)
    sparse_in, dense_in = logits.clone().requires_grad_(), logits.double().requires_grad_()
    sparse, dense = softmax_loss(sparse_in, label_ids, idf), dense_loss(dense_in, label_ids, idf)
    sparse.backward()
    dense.backward()
    assert torch.allclose(sparse.double(), dense, rtol=1e-5, atol=1e-6)
    assert torch.allclose(sparse_in.grad.double(), dense_in.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_rows_without_weight_have_no_loss_but_count_in_the_mean() -> None:
    logits = torch.randn(2, V)
    labelled = torch.tensor([[3, PAD_ID], [5, PAD_ID]], dtype=torch.int32)
    half = torch.tensor([[3, PAD_ID], [PAD_ID, PAD_ID]], dtype=torch.int32)
    idf = torch.ones(V)
    first = softmax_loss(logits[:1], labelled[:1], idf)
    assert torch.allclose(softmax_loss(logits, half, idf), first / 2)
    idf[5] = 0.0  # only a ubiquitous token: the same
    assert torch.allclose(softmax_loss(logits, labelled, idf), first / 2)
    assert softmax_loss(logits, labelled, torch.zeros(V)).item() == 0.0


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits_stay_finite(value: float) -> None:
    logits = torch.zeros(1, V)
    logits[0, 2] = value
    logits.requires_grad_()
    loss = softmax_loss(logits, torch.tensor([[2, 4]]), torch.ones(V))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_weights_are_idf_shares() -> None:
    weights = target_weights(torch.tensor([[1, 3, PAD_ID]]), torch.tensor([9.0, 1.0, 9.0, 3.0]))
    assert torch.allclose(weights, torch.tensor([[0.25, 0.75, 0.0]]))
