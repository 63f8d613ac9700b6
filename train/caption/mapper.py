"""ClipCap's mappers (Mokady et al., arXiv 2111.09734; train.py of rmokady/CLIP_prefix_caption): features -> a prefix of embeddings.

B batch, W feature width, P prefix, D width of the decoder's embeddings.
"""

import torch
from torch import Tensor, nn

_HEADS = 8


class MlpMapper(nn.Sequential):
    """[B, W] -> [B, P, D]: one hidden layer of P D / 2 with tanh. ClipCap takes it with a decoder that is trained too."""

    def __init__(self, width: int, prefix: int, out_width: int) -> None:
        hidden = max(prefix * out_width // 2, 1)
        super().__init__(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, prefix * out_width), nn.Unflatten(1, (prefix, out_width))
        )  # fmt: skip


class TransformerMapper(nn.Module):
    """[B, W] -> [B, P, D]: P embeddings made of the features and P learnt ones through `layers` blocks; the learnt ones' places are read.

    ClipCap takes it with a frozen decoder. Blocks: pre-norm, 8 heads where they divide D, MLP of 2 D with ReLU, no dropout.
    """

    def __init__(self, width: int, prefix: int, out_width: int, layers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, prefix * out_width)
        self.constant = nn.Parameter(torch.randn(prefix, out_width))
        heads = next(heads for heads in range(min(_HEADS, out_width), 0, -1) if out_width % heads == 0)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(out_width, heads, 2 * out_width, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        asked = self.linear(features).unflatten(1, self.constant.shape)
        learnt = self.constant.to(asked.dtype).expand(len(features), -1, -1)
        return self.blocks(torch.cat([asked, learnt], dim=1))[:, len(self.constant) :]
