"""Losses from padded label ids and the IDF table, taken together with the head's matrix product.

```
label ids [B, K] --positives.py--> ids, shares, valid
features [B, W], weight [V, W], bias [V] --head.py--> logits of some rows --kinds/*.py--> losses of the rows,
    and the logits overwritten by their gradient --head.py--> sums of the three gradients --fused.py--> autograd
```

Neither a dense target nor the logits of a whole batch are ever made: a chunk of rows lives from its product to its
    gradients'
products, within `train.loss.memory`. The gradients are computed in the forward pass (as Liger Kernel and Cut
Cross-Entropy do), so that no logits have to be kept or computed twice: three products in all, as many as a linear layer
alone takes. Chunks are of rows, not of classes: softmax needs all logits of a row before the gradient of any, so chunks
of classes would take a fourth product.
"""
