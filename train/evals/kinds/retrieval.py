"""`train retrieval`: captions by images and images by captions, recall among the first k; an image may have several
captions.

    image to text   share of images of which any caption is among the k most similar captions
    text to image   share of captions whose image is among the k most similar images

Ties go to the item with the smaller number. N images, M captions, D width of the common space.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from labels.settings import PositiveOnce, Section, Seeds
from labels.storage import UserError, local_path
from train.encoders.encoder import Encoder
from train.evals.data.captions import CaptionSet
from train.evals.features import Extractor
from train.evals.protocol import Evaluation, Score


class Retrieval(Section):
    k: PositiveOnce = [1, 5, 10]
    labels: str | None = None
    seeds: Seeds = [0]


class Recall(Evaluation):
    name, takes, section = "retrieval", "captions", Retrieval

    def describe(self, settings: Retrieval) -> str:
        return f"recall at {', '.join(map(str, settings.k))} by cosine, of captions by images and of images by captions"

    def check(self, data: CaptionSet, settings: Retrieval) -> None:
        images, largest = len(data.test), max(settings.k)
        if largest > images:
            problem = f"retrieval.k is {largest}, {data.name} has {images} test images"
            raise UserError(problem, allowed=f"k up to {images}", fix="--set retrieval.k=[1]")

    def unfit(self, encoder: Encoder) -> str | None:
        if encoder.text is None:
            return "it has no text tower, or has --layer or --pool; `train lit ENCODER --beton OUT` adds a text tower"
        return None

    def scores(
        self, encoder: Encoder, data: CaptionSet, settings: Retrieval, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        assert encoder.text is not None
        side, device, captions_of = encoder.text(), extract.device, data.test.captions
        flat = [caption for captions in captions_of for caption in captions]
        texts = side.texts(flat, device, local_path(settings.labels) if settings.labels else None)  # [M, D]
        images = side.images(extract(encoder, data.test), device)  # [N, D]
        image_of = np.repeat(np.arange(len(captions_of)), list(map(len, captions_of)))  # [M]
        pairs = torch.from_numpy(np.stack([image_of, np.arange(len(texts))], axis=1)).to(device)
        by_image, by_text = ranks(images, texts, pairs), ranks(texts, images, pairs.flip(1))
        return [
            Score(f"retrieval, {direction}", seeds[0], recalls(ranks_of_best, settings.k), trials=len(ranks_of_best))
            for direction, ranks_of_best in (("image to text", by_image), ("text to image", by_text))
        ]


EVALUATION = Recall()
_CHUNK_COSINES = 2**26  # similarities in memory at a time: 256 MiB


def ranks(queries: Tensor, items: Tensor, matches: Tensor) -> Tensor:
    """The rank, from 0, of each query's best match among all items: int64 [Q].

    `queries` [Q, D] and `items` [I, D] are unit vectors; `matches` int64 [P, 2] are pairs of a query and a right item,
    at least one per query.
    """
    ranks_of_chunks = []
    for begin in range(0, len(queries), size := max(1, _CHUNK_COSINES // max(len(items), 1))):
        cosines = queries[begin : begin + size] @ items.T  # [q, I]
        of_chunk = matches[(matches[:, 0] >= begin) & (matches[:, 0] < begin + size)]
        rows, right = of_chunk[:, 0] - begin, of_chunk[:, 1]
        best = torch.full((len(cosines),), -torch.inf, device=cosines.device)
        best.scatter_reduce_(0, rows, cosines[rows, right], "amax")
        first = torch.full((len(cosines),), len(items), device=cosines.device)  # of the best matches the first item
        ties = cosines[rows, right] == best[rows]
        first.scatter_reduce_(0, rows[ties], right[ties], "amin")
        before = torch.arange(len(items), device=cosines.device) < first[:, None]
        ranks_of_chunks.append((cosines > best[:, None]).sum(1) + ((cosines == best[:, None]) & before).sum(1))
    return torch.cat(ranks_of_chunks)


def recalls(ranks: Tensor, k: Sequence[int]) -> dict[str, float | None]:
    """Shares of ranks [Q] below each k, by name."""
    return {f"r@{limit}": float((ranks < limit).double().mean()) for limit in k}
