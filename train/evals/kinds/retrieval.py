"""`train retrieval`: captions by images and images by captions, recall among the first k; an image may have several
captions.

    image to text   share of images of which any caption is among the k most similar captions
    text to image   share of captions whose image is among the k most similar images

Of equal cosines the one with the smaller number comes first. Similarities are there a part at a time. N images, M
captions, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from labels.settings import Positive, Section, Seeds
from labels.storage import UserError
from train.encoders.encoder import Encoder
from train.evals.data.captions import CaptionSet
from train.evals.features import Extractor
from train.evals.protocol import Evaluation, Score


class Retrieval(Section):
    k: Annotated[list[Positive], Field(min_length=1)] = [1, 5, 10]
    labels: str | None = None
    seeds: Seeds = [0]


_CHUNK_COSINES = 2**26  # similarities held at once: 256 MiB


def ranks(queries: Tensor, items: Tensor, matches: Tensor) -> Tensor:
    """The place, from 0, of each query's best match among all items.

    Args:
        queries: unit vectors [Q, D]; items: [I, D].
        matches: int64 [P, 2]: a query and an item that is right for it; each query has one at least.

    Returns:
        int64 [Q].
    """
    found = []
    for begin in range(0, len(queries), size := max(1, _CHUNK_COSINES // max(len(items), 1))):
        cosines = queries[begin : begin + size] @ items.T  # [q, I]
        here = matches[(matches[:, 0] >= begin) & (matches[:, 0] < begin + size)]
        rows, right = here[:, 0] - begin, here[:, 1]
        best = torch.full((len(cosines),), -torch.inf, device=cosines.device)
        best.scatter_reduce_(0, rows, cosines[rows, right], "amax")
        first = torch.full((len(cosines),), len(items), device=cosines.device)
        ties = cosines[rows, right] == best[rows]
        first.scatter_reduce_(0, rows[ties], right[ties], "amin")
        before = torch.arange(len(items), device=cosines.device) < first[:, None]
        found.append((cosines > best[:, None]).sum(1) + ((cosines == best[:, None]) & before).sum(1))
    return torch.cat(found)


def recalls(places: Tensor, k: Sequence[int]) -> dict[str, float | None]:
    """Shares of places [Q] below each k, by name."""
    return {f"r@{one}": float((places < one).double().mean()) for one in k}


class Recall(Evaluation):
    name, takes, section = "retrieval", "captions", Retrieval

    def describe(self, settings: Retrieval) -> str:
        return f"recall at {', '.join(map(str, settings.k))} by cosine, of captions by images and of images by captions"

    def check(self, data: CaptionSet, settings: Retrieval) -> None:
        if max(settings.k) > len(data.test):
            raise UserError(
                f"retrieval.k is {max(settings.k)}, {data.name} has {len(data.test)} test images",
                allowed=f"k up to {len(data.test)}",
                fix="--set retrieval.k=[1]",
            )

    def unfit(self, encoder: Encoder) -> str | None:
        if encoder.text is None:
            return "it has no text tower, or was asked for by --layer and --pool; `train lit ENCODER --beton OUT` gives it one"
        return None

    def scores(
        self, encoder: Encoder, data: CaptionSet, settings: Retrieval, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        assert encoder.text is not None
        side, captions = encoder.text(), data.test.captions
        texts = side.texts(
            [text for one in captions for text in one],
            extract.device,
            Path(settings.labels) if settings.labels else None,
        )
        images = side.images(extract(encoder, data.test), extract.device)
        of = np.repeat(np.arange(len(captions)), [len(one) for one in captions])  # [M], the image of each caption
        both = torch.from_numpy(np.stack([of, np.arange(len(of))], axis=1)).to(extract.device)
        return [
            Score(
                f"retrieval, {way}", seeds[0], recalls(ranks(queries, items, matches), settings.k), trials=len(queries)
            )
            for way, queries, items, matches in (
                ("image to text", images, texts, both),
                ("text to image", texts, images, both.flip(1)),
            )
        ]


EVALUATION = Recall()
