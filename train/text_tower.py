"""Two towers and CLIP's loss: what the loop trains in `train clip`, and behind a frozen trunk in `train lit`.

    Batch with rows of token_ids [B, K] -> TextInput -> images [B, 3, S, S], texts [B, L]: start, tokens, end, zeros
    images -> trunk -> [B, W] -> Joint.projection -> [B, D] -+
    texts -> open_clip's text transformer ---------> [B, D] -+-> cosines, scale -> contrastive_loss -> scalar

Captions are label rows too: `token_ids` become arrays next to the label files and replace the labels in the loader, so
order, crops, resume and checks are those of `train run`. A sample without tokens (empty caption, damaged image) is no
pair: its texts are zeros, it has no loss and is no negative. B batch, K label limit, L context, W trunk width, D width
of the common space.
"""

import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from labels.manifest import TokenizerPart
from labels.settings import TextTower
from labels.storage import UserError
from train.data.inputs import ImageInput
from train.data.loader import Batch
from train.distributed import everyone, local
from train.losses.contrastive import contrastive_loss

CLIP = "clip"
_PAD = 0
_FIRST_LOG_SCALE, _MAX_LOG_SCALE = math.log(1 / 0.07), math.log(100)


class Specials(NamedTuple):
    """Ids of `start` and `end`, and the `vocabulary` with both. `end` is the largest id: open_clip's text towers pool
    there (`argmax`).
    """

    start: int
    end: int
    vocabulary: int


def specials_of(tokenizer: TokenizerPart) -> Specials:
    """CLIP's own two ids for its tokenizer, as in open_clip's towers; otherwise two ids after the vocabulary."""
    if tokenizer.name == CLIP:
        start, end = tokenizer.excluded
        return Specials(start, end, end + 1)
    return Specials(tokenizer.vocabulary, tokenizer.vocabulary + 1, tokenizer.vocabulary + 2)


def framed(token_ids: Tensor, specials: Specials, context: int) -> Tensor:
    """int64 [B, L]: start, the first L - 2 tokens, end, zeros; from int [B, K], padded with PAD_ID at the end."""
    kept = token_ids[:, : context - 2].long()
    count = (kept >= 0).sum(1, keepdim=True)
    rows = torch.full((len(kept), context), _PAD, device=kept.device)
    rows[:, 0] = specials.start
    rows[:, 1 : 1 + kept.shape[1]] = kept.clamp(min=_PAD)
    return rows.scatter(1, 1 + count, specials.end)


def is_pair(texts: Tensor, specials: Specials) -> Any:
    """bool [B]: which rows of texts [B, L] are not only zeros."""
    return (texts == specials.end).any(1)


class TextInput:
    """Batch with token ids -> images float32 [B, 3, S, S], texts int64 [B, L]."""

    def __init__(self, images: ImageInput, specials: Specials, context: int) -> None:
        self._images, self._specials, self._context = images, specials, context

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, token_ids = self._images(batch)
        texts = framed(token_ids, self._specials, self._context)
        return images, texts * (token_ids[:, :1] >= 0)


class Contrastive(nn.Module):
    """Images [B, 3, S, S] and texts [B, L] -> the mean loss of this rank's part of the batch, a scalar.

    `trunk` makes features [B, W] (`width`), `text` embeddings [B, D]. A `locked` trunk is not trained, and stays in
    evaluation mode.
    """

    def __init__(self, trunk: nn.Module, width: int, text: nn.Module, specials: Specials, *, locked: bool) -> None:
        super().__init__()
        self.trunk, self.text = trunk.requires_grad_(not locked), text
        self.joint = Joint(width, int(text.output_dim))  # type: ignore[arg-type]
        self._specials, self._locked = specials, locked

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self._locked:
            self.trunk.eval()
        return self

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._locked):
            features = self.trunk(images)
        return self.joint(features, self.text(texts), is_pair(texts, self._specials))


class Joint(nn.Module):
    """The images' projection [D, W], without bias, and the logarithm of the cosines' scale, [1].

    Initial values are open_clip's for a ViT: N(0, W^-1/2), and ln(1 / 0.07) (arXiv 2103.00020).
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor([_FIRST_LOG_SCALE]))

    def forward(self, features: Tensor, texts: Tensor, valid: Tensor) -> Tensor:
        """The loss of pooled features [B, W] and text embeddings [B, D]; `valid`, bool [B]: the pairs."""
        images = functional.normalize(self.projection(features).float(), dim=1)
        texts = functional.normalize(texts.float(), dim=1)
        with torch.autocast(images.device.type, enabled=False):
            return contrastive_loss(images, texts, valid, self.log_scale[0].exp(), everyone())

    def clamp(self) -> None:
        """Limit the scale to 100 after each step, as open_clip does; clamped in the loss it would have no gradient."""
        with torch.no_grad():
            local(self.log_scale).clamp_(max=_MAX_LOG_SCALE)


def build_text_tower(settings: TextTower, vocabulary: int) -> Any:
    """open_clip's text transformer: int64 [B, L] -> [B, D], causal, pooled at the end token."""
    try:
        from open_clip.transformer import TextTransformer
    except ImportError:
        raise UserError(
            "the text tower needs open_clip, which is not installed", fix="pip install 'superclass-lean[evals]'"
        ) from None
    return TextTransformer(
        context_length=settings.context,
        vocab_size=vocabulary,
        width=settings.width,
        heads=settings.heads,
        layers=settings.layers,
        output_dim=settings.embed_dim,
    )
