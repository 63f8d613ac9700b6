"""Losses from padded label ids and the IDF table; no dense target is ever made.

B batch, V vocabulary, K label limit.
"""

import torch

from labels.schema import PAD_ID


def target_weights(label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """Each label's share of its row's target: t_c = w_c / sum of w over the row (SuperClass, section 3.2).

    Args:
        label_ids: int [B, K], padded with PAD_ID.
        idf: float32 [V].

    Returns:
        float32 [B, K]; rows sum to 1, or to 0 where no label has weight.
    """
    weights = idf[label_ids.clamp(min=0)] * (label_ids != PAD_ID)
    total = weights.sum(dim=1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def softmax_loss(logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of -sum_c t_c log softmax(x)_c, as logsumexp(x) - sum_c t_c x_c.

    Rows without weight have loss 0 and still count in the mean, as in the reference (x-cls/superclass, ClsLoss).

    Args:
        logits: [B, V].
        label_ids: int [B, K], padded with PAD_ID.
        idf: float32 [V].

    Returns:
        float32 scalar.
    """
    logits = logits.float()
    targets = target_weights(label_ids, idf)  # [B, K]
    picked = logits.gather(1, label_ids.clamp(min=0).long())  # [B, K]
    rows = torch.logsumexp(logits, dim=1) * (targets.sum(dim=1) > 0) - (targets * picked).sum(dim=1)  # [B]
    return rows.mean()
