"""How well a model predicts each token on images with and without it: the sums behind visual weights.

    features [B, W], weight [V, W], bias [V], label ids [B, K] -> log p(c|x) [B, V], chunk by chunk -> GainSums

p is the softmax of the logits, or the sigmoid of each, as the loss has it. The sums are float64, so that neither the
order of the samples nor the number of ranks matters. Memory: four numbers for each class, and one chunk of logits.
B batch, W trunk width, V vocabulary, K label limit.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from labels.idf import Sums
from train.distributed import everyone, sum_over
from train.losses.head import chunks, positives


class GainSums:
    """Takes batches of the head's operands (`HeadLoss.observed`) and adds up what `labels.idf.calibrate` needs."""

    def __init__(self, vocabulary: int, device: torch.device, *, distribution: bool, memory: int) -> None:
        self._sums = torch.zeros(
            4, vocabulary, dtype=torch.float64, device=device
        )  # everywhere, count, bearing, squares
        self._samples = torch.zeros((), dtype=torch.float64, device=device)
        self._distribution, self._memory = distribution, memory

    def add(self, features: Tensor, weight: Tensor, bias: Tensor, label_ids: Tensor) -> None:
        """Add a batch; rows without labels, such as those of damaged images, do not count."""
        labels = positives(label_ids, torch.ones(len(weight), device=weight.device))
        labelled = labels.labelled.squeeze(1)
        self._samples += labelled.sum()
        for part in chunks(len(features), len(weight), 4, self._memory):
            logits = torch.addmm(bias, features[part], weight.T).float()
            log_p = logits.log_softmax(dim=1) if self._distribution else functional.logsigmoid(logits)
            self._sums[0] += (log_p * labelled[part, None]).sum(dim=0, dtype=torch.float64)
            valid = labels.valid[part]
            ids, own = labels.ids[part][valid], log_p.gather(1, labels.ids[part])[valid].double()
            for row, values in enumerate((torch.ones_like(own), own, own * own), start=1):
                self._sums[row].index_add_(0, ids, values)

    def of_all_ranks(self) -> Sums:
        """The sums over all ranks; all of them call it."""
        numbers = torch.cat([self._samples[None], self._sums.flatten()])
        values = sum_over(numbers, everyone()).cpu().numpy()
        everywhere, count, bearing, squares = values[1:].reshape(4, -1)
        return Sums(round(values[0]), everywhere, np.rint(count).astype(np.int64), bearing, squares)
