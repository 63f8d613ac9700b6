"""The fused losses against dense float64 formulas: values, gradients, edge cases, autocast, accumulation."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from labels.manifest import PAD_ID
from labels.settings import LOSSES, Loss, names_in
from loss_cases import B, V, assert_near, dense_loss, fused_and_dense, gradients, some_case
from train.losses import head as head_module
from train.losses.head import HeadLoss, chunks

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["softmax", "bce", "asl", "soft_margin", "two_way"]
KINDS = [
    Loss(name=name, idf=idf, memory=memory) for name in NAMES for idf in (True, False) for memory in (1, 700, 1 << 20)
]


def name_of(settings: Loss) -> str:
    return f"{settings.name}-idf={settings.idf}-{settings.memory}"


every_kind = pytest.mark.parametrize("settings", KINDS, ids=name_of)
every_name = pytest.mark.parametrize("name", NAMES)


def test_every_loss_has_a_dense_reference() -> None:
    assert sorted(NAMES) == names_in(LOSSES)


@every_kind
def test_equals_the_dense_form(settings: Loss) -> None:
    for seed in range(4):
        assert_near(*fused_and_dense(settings, *some_case(seed)))


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.data())
def test_equals_the_dense_form_at_any_shape(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    rows, classes, limit, width = (data.draw(st.integers(1, top)) for top in (12, 30, 9, 7))
    settings = Loss(name=name, idf=data.draw(st.booleans()), memory=data.draw(st.sampled_from([1, 250, 1 << 20])))
    case = some_case(data.draw(st.integers(0, 10**6)), rows, classes, limit, width)
    assert_near(*fused_and_dense(settings, *case), relative=3e-6, cancelled=1e-6)


@every_name
def test_equals_the_dense_form_with_a_large_head(name: str) -> None:
    (features, weight, bias), label_ids, idf = some_case(1, rows=70, classes=9_000, limit=20, width=96)
    operands = (features, weight / 96**0.5, bias)  # drawn as train.model.build_head draws it
    assert_near(*fused_and_dense(Loss(name=name, memory=1 << 20), operands, label_ids, idf))


@every_kind
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[PAD_ID, PAD_ID, PAD_ID]] * 3, id="no labels at all"),
        pytest.param([[4, 7, PAD_ID], [PAD_ID, PAD_ID, PAD_ID], [0, PAD_ID, PAD_ID]], id="an empty row"),
        pytest.param([[3, PAD_ID, PAD_ID], [0, PAD_ID, PAD_ID], [9, PAD_ID, PAD_ID]], id="one label"),
        pytest.param([[1, 2, 3], [0, 8, 9], [2, 4, 6]], id="K labels"),
        pytest.param([[5, 5, 9], [9, 2, 9], [0, 0, 0]], id="repeated labels"),
        pytest.param([[PAD_ID, 6, 2], [9, PAD_ID, 0], [8, 1, PAD_ID]], id="out of order"),
    ],
)
def test_edge_rows(settings: Loss, rows: list[list[int]]) -> None:
    operands, _, idf = some_case(5, rows=3, classes=10)
    assert_near(*fused_and_dense(settings, operands, torch.tensor(rows, dtype=torch.int32), idf.clamp(min=0.1)))


@every_name
def test_labels_without_any_weight(name: str) -> None:
    operands, label_ids, _ = some_case(2)
    assert_near(*fused_and_dense(Loss(name=name), operands, label_ids, torch.zeros(V)))


def test_softmax_rows_without_weight_have_no_loss_but_count_in_the_mean() -> None:
    (features, weight, bias), _, _ = some_case(2, rows=2)
    labels = torch.tensor([[3, PAD_ID], [5, PAD_ID]])
    loss, without_5 = HeadLoss(Loss(), torch.ones(V)), torch.ones(V).index_fill(0, torch.tensor(5), 0.0)
    alone = loss(features[:1], weight, bias, labels[:1])
    torch.testing.assert_close(HeadLoss(Loss(), without_5)(features, weight, bias, labels), alone / 2)
    torch.testing.assert_close(loss(features, weight, bias, torch.tensor([[3, -1], [-1, -1]])), alone / 2)
    assert HeadLoss(Loss(), torch.zeros(V))(features, weight, bias, labels).item() == 0.0


@every_name
@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("positive", [True, False])
def test_extreme_logits(name: str, size: float, positive: bool) -> None:
    """Features are unit vectors, so that the logits are the weights themselves and rounding is not the subject."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-4, 5, (V, 4), generator=generator).float()
    weight[[2, 7]] = size if positive else -size
    weight[11] = -size if positive else size
    labels = torch.tensor([[2, 4, PAD_ID], [7, PAD_ID, PAD_ID], [11, 12, PAD_ID], [1, 2, 7]])
    settings = Loss(name=name, idf=False)
    assert_near(
        *fused_and_dense(settings, (torch.eye(4), weight, torch.zeros(V)), labels, torch.ones(V)), relative=2e-6
    )


@every_name
@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_gradcheck(name: str, memory: int) -> None:
    operands, label_ids, idf = some_case(7, rows=4, classes=8, limit=3, width=3)
    loss = HeadLoss(Loss(name=name, memory=memory), idf)
    inputs = tuple(operand.double().requires_grad_() for operand in operands)
    assert torch.autograd.gradcheck(lambda *inputs: loss(*inputs, label_ids), inputs)


@pytest.mark.parametrize(
    ("negative", "positive", "clip"), [(0, 0, 0.0), (0, 2, 0.1), (1, 0.5, 0.05), (2.5, 1, 0.0), (4, 0, 0.2)]
)
def test_asl_keys(negative: float, positive: float, clip: float) -> None:
    settings = Loss(name="asl", gamma_negative=negative, gamma_positive=positive, clip=clip)
    assert_near(*fused_and_dense(settings, *some_case(4)), relative=2e-6)
    if (negative, positive, clip) == (0, 0, 0.0):
        bce, _ = fused_and_dense(Loss(name="bce"), *some_case(4))
        assert_near(fused_and_dense(settings, *some_case(4))[0], bce)


def test_soft_margin_is_torchs() -> None:
    (features, weight, bias), label_ids, idf = some_case(6)
    y = torch.zeros(B, V + 1).scatter_(1, label_ids.long() % (V + 1), 1.0)[:, :V]
    expected = nn.MultiLabelSoftMarginLoss()(nn.functional.linear(features, weight, bias), y)
    torch.testing.assert_close(
        HeadLoss(Loss(name="soft_margin", idf=False), idf)(features, weight, bias, label_ids), expected
    )


@every_name
def test_bf16_autocast_is_as_near_as_the_dense_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "fast_on_cpu", lambda dtype: True)
    operands, label_ids, idf = some_case(8, rows=24, classes=2_000, limit=8, width=32)
    operands = (operands[0], operands[1] / 8, operands[2])
    settings = Loss(name=name, memory=40_000)
    with torch.autocast("cpu", torch.bfloat16):
        found, exact = fused_and_dense(settings, operands, label_ids, idf)
    inputs = [operand.clone().requires_grad_() for operand in operands]
    with torch.autocast("cpu", torch.bfloat16):
        logits = nn.functional.linear(*inputs)
    dense = dense_loss(settings, logits.float(), label_ids, idf)
    for mine, theirs, true in zip(found, [dense, *gradients(dense, inputs)], exact, strict=True):
        assert mine.dtype == torch.float32
        # The weight's gradient is rounded once a chunk, three times here.
        assert (mine - true).norm() <= 1.5 * (theirs - true).norm() + 1e-5 * true.norm()


def test_bf16_on_a_cpu_without_it_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "fast_on_cpu", lambda dtype: False)
    with torch.autocast("cpu", torch.bfloat16):
        found, exact = fused_and_dense(Loss(), *some_case(0))
    assert_near(found, exact)


@every_name
def test_parameters_in_bf16_get_gradients_in_bf16(name: str) -> None:
    operands, label_ids, idf = some_case(8)
    low = tuple(operand.bfloat16() for operand in operands)
    found, exact = fused_and_dense(Loss(name=name), low, label_ids, idf)
    assert [tensor.dtype for tensor in found] == [torch.float32] + [torch.bfloat16] * 3
    assert_near(found, exact, relative=0.02)


@every_name
def test_micro_batches_add_up(name: str) -> None:
    """The mean over two halves of the batch, for every loss but the one that looks along the batch."""
    (features, weight, bias), label_ids, idf = some_case(9, rows=8)
    loss = HeadLoss(Loss(name=name), idf)
    whole, parts = (weight.clone().requires_grad_() for _ in range(2))
    loss(features, whole, bias, label_ids).backward()
    for half in (slice(0, 4), slice(4, 8)):
        (loss(features[half], parts, bias, label_ids[half]) / 2).backward()
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-5, atol=1e-7) == (name != "two_way")  # type: ignore[arg-type]


def test_a_frozen_head_or_trunk_gets_no_gradient() -> None:
    (features, weight, bias), label_ids, idf = some_case(1)
    loss, features = HeadLoss(Loss(), idf), features.requires_grad_()
    loss(features, weight, bias, label_ids).backward()
    assert features.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        quiet = loss(features, weight.requires_grad_(), bias, label_ids)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, loss(features, weight, bias, label_ids).detach())


def test_a_second_backward_gives_the_same_and_a_second_derivative_is_refused() -> None:
    (features, weight, bias), label_ids, idf = some_case(1)
    loss = HeadLoss(Loss(), idf)(features, weight.requires_grad_(), bias, label_ids)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, weight, create_graph=True)


@given(st.integers(0, 5000), st.integers(1, 900))
def test_chunks_cover_all_rows_and_the_first_is_the_largest(rows: int, limit: int) -> None:
    """Else a later chunk takes new memory while the old is still held."""
    parts = list(chunks(rows, columns=10, bytes_each=4, memory=40 * limit))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert not sizes or (max(sizes) == sizes[0] <= limit and sizes[0] - min(sizes) <= 1)
