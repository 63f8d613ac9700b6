"""Captions as a text tower takes them: start, tokens in their order, end, zeros; whatever tokenizer the labels were made with.

B batch, K label limit, L context.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from labels.manifest import TokenizerPart
from train.batch import Batch
from train.data.inputs import ImageInput

CLIP = "clip"
_PAD = 0


class Specials(NamedTuple):
    """Ids of `start` and `end`, and the `vocabulary` with both. `end` is the largest: open_clip's towers pool there (`argmax`)."""

    start: int
    end: int
    vocabulary: int


def specials_of(tokenizer: TokenizerPart) -> Specials:
    """CLIP's own two ids for its tokenizer, so that a tower knows open_clip's tokens; two new ones behind all others'."""
    if tokenizer.name == CLIP:
        start, end = tokenizer.excluded
        return Specials(start, end, end + 1)
    return Specials(tokenizer.vocabulary, tokenizer.vocabulary + 1, tokenizer.vocabulary + 2)


def framed(token_ids: Tensor, specials: Specials, context: int) -> Tensor:
    """Start, the first L - 2 tokens, end, zeros.

    Args:
        token_ids: int [B, K], in the caption's order, padded with PAD_ID at the end.
        specials: ids of start and end.
        context: L.

    Returns:
        int64 [B, L].
    """
    kept = token_ids[:, : context - 2].long()
    count = (kept >= 0).sum(1, keepdim=True)
    rows = torch.full((len(kept), context), _PAD, device=kept.device)
    rows[:, 0] = specials.start
    rows[:, 1 : 1 + kept.shape[1]] = kept.clamp(min=_PAD)
    return rows.scatter(1, 1 + count, specials.end)


class TextInput:
    """Called with a batch whose rows are captions: images float32 [B, 3, S, S], and texts int64 [B, L].

    A sample without tokens (an empty caption, an image that does not decode) is no pair: its row is zeros alone.
    """

    def __init__(self, images: ImageInput, specials: Specials, context: int) -> None:
        self._images, self._specials, self._context = images, specials, context

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, token_ids = self._images(batch)
        texts = framed(token_ids, self._specials, self._context)
        return images, texts * (token_ids[:, :1] >= 0)


def is_pair(texts: Tensor, specials: Specials) -> Any:
    """bool [B]: which rows of texts [B, L] are not zeros alone."""
    return (texts == specials.end).any(1)
