"""The softmax loss by its kernels against the dense float64 loss; run with TRITON_INTERPRET=1, read at import."""

import torch

from labels.manifest import PAD_ID
from labels.settings import Loss
from loss_cases import assert_near, dense_loss, fused_and_dense, some_case, some_labels
from train.losses.head import positives
from train.losses.kinds import softmax
from train.losses.kinds.softmax import softmax_rows

calls = []


def count(function):  # noqa: ANN201
    def counted(logits, *others):  # noqa: ANN202
        calls.append((function.__name__, logits.dtype))
        return function(logits, *others)

    return counted


softmax.statistics, softmax.put_gradient = count(softmax.statistics), count(softmax.put_gradient)
softmax._BLOCK = 16  # several blocks a row, the last one not full

for idf in (True, False):
    for seed, memory in ((0, 1), (1, 700), (2, 1 << 20)):
        assert_near(*fused_and_dense(Loss(idf=idf, memory=memory), *some_case(seed)))
operands, _, idf = some_case(5, rows=3, classes=10)
for rows in (
    [[PAD_ID] * 3] * 3,
    [[4, 7, PAD_ID], [PAD_ID] * 3, [0, PAD_ID, PAD_ID]],
    [[1, 2, 3], [0, 8, 9], [5, 5, 9]],
):
    assert_near(*fused_and_dense(Loss(), operands, torch.tensor(rows, dtype=torch.int32), idf.clamp(min=0.1)))
assert_near(*fused_and_dense(Loss(), operands, torch.tensor([[1, 2, PAD_ID]] * 3), torch.zeros(10)))
for size in (1e4, -1e4):
    weight = torch.randint(-4, 5, (40, 4), generator=torch.Generator().manual_seed(3)).float()
    weight[[2, 7]], weight[11] = size, -size
    labels = torch.tensor([[2, 4, PAD_ID], [7, PAD_ID, PAD_ID], [11, 12, PAD_ID], [1, 2, 7]])
    assert_near(
        *fused_and_dense(Loss(idf=False), (torch.eye(4), weight, torch.zeros(40)), labels, torch.ones(40)),
        relative=2e-6,
    )
assert {name for name, _ in calls} == {"statistics", "put_gradient"} and {dtype for _, dtype in calls} == {
    torch.float32
}

# 16-bit logits: the loss and, before it is rounded once, the gradient are computed in float32. Triton's interpreter
# cuts off where a GPU rounds, so that a value may be a whole unit in the last place away, and not half of one.
for dtype, unit in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
    logits = (torch.randn(12, 300, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    labels = some_labels(torch.Generator().manual_seed(2), 12, 300, 8)
    idf = torch.rand(300, generator=torch.Generator().manual_seed(3))
    exact = logits.double().requires_grad_()
    dense = dense_loss(Loss(), exact, labels, idf.double()) * 12
    loss = softmax_rows(logits, positives(labels, idf), True).sum()
    assert calls[-2:] == [("statistics", dtype), ("put_gradient", dtype)]
    assert abs(loss - dense) <= 1e-6 * dense
    (gradient,) = torch.autograd.grad(dense, exact)
    assert ((logits - gradient).abs() <= 1.01 * unit * gradient.abs() + 2**-24).all()

# float64, which the kernels do not take, goes the other way.
before = len(calls)
operands, labels, idf = some_case(0)
assert_near(*fused_and_dense(Loss(), tuple(operand.double() for operand in operands), labels, idf))  # type: ignore[arg-type]
assert len(calls) == before
print("the kernels' loss is the dense loss")
