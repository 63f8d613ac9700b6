"""Nearest neighbours of frozen features: DINO's weighted vote, and the majority.

By cosine, after DINO's eval_knn.py (arXiv 2104.14294).

weighted: each of the k neighbours votes for its class with exp(cosine / temperature).
majority: with 1; of classes with equal counts the one with the smaller number.
N training samples, M test samples, W feature width, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from labels.config import own_section
from labels.settings import Pipeline, Positive, Section, Seeds
from labels.storage import UserError
from train.encoders.encoder import Encoder
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.protocol import Score, accuracies


class Knn(Section):
    k: Annotated[list[Positive], Field(min_length=1)] = [10, 20]
    temperature: Annotated[float, Field(gt=0)] = 0.07
    seeds: Seeds = [0, 1, 2]


_CHUNK_COSINES = 2**26  # similarities held at once: 256 MiB


def nearest(train_x: Tensor, test_x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar training samples of every test sample.

    Args:
        train_x: [N, W]; test_x: [M, W].

    Returns:
        Cosines float32 [M, k], greatest first, and rows of train_x, int64 [M, k].
    """
    train_x = functional.normalize(train_x, dim=1).T.contiguous()
    found = [(functional.normalize(part, dim=1) @ train_x).topk(k, dim=1) for part in _parts(test_x, train_x.shape[1])]
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def weighted_votes(cosines: Tensor, classes_of: Tensor, classes: int, temperature: float) -> Tensor:
    """Cosines [M, k] and the neighbours' classes [M, k] -> votes float64 [M, C]."""
    votes = torch.zeros(len(cosines), classes, dtype=torch.float64, device=cosines.device)
    return votes.scatter_add_(1, classes_of, (cosines.double() / temperature).exp())


def majority_votes(classes_of: Tensor, classes: int) -> Tensor:
    """The neighbours' classes [M, k] -> scores int64 [M, C] without ties: counts, and of equals the smaller class
    first.
    """
    counts = torch.zeros(len(classes_of), classes, dtype=torch.int64, device=classes_of.device)
    counts.scatter_add_(1, classes_of, torch.ones_like(classes_of))
    return counts * classes + torch.arange(classes - 1, -1, -1, device=classes_of.device)


def _parts(test_x: Tensor, columns: int) -> Iterator[Tensor]:
    return iter(test_x.split(max(1, _CHUNK_COSINES // columns)))


class NearestNeighbours:
    """See `Evaluation`."""

    name, takes = "knn", "classes"

    def settings(self, pipeline: Pipeline) -> Knn:
        return own_section(pipeline, self.name, Knn)

    def describe(self, settings: Knn) -> str:
        return f"k nearest neighbours by cosine, weighted by exp(cosine / {settings.temperature:g}) (DINO's), and by majority"

    def check(self, data: DataSet, settings: Knn) -> None:
        if max(settings.k) > len(data.train):
            raise UserError(
                f"knn.k is {max(settings.k)}, the training part has {len(data.train)} images",
                allowed=f"k up to {len(data.train)}",
                fix=f"--set knn.k=[{min(10, len(data.train))}]",
            )

    def unfit(self, encoder: Encoder) -> str | None:
        return None

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Knn, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        train_x, test_x = (
            torch.from_numpy(extract(encoder, part)).to(extract.device) for part in (data.train, data.test)
        )
        train_y, test_y = (torch.from_numpy(part.targets).to(extract.device) for part in (data.train, data.test))
        cosines, rows = nearest(train_x, test_x, max(settings.k))
        found = []
        for k in settings.k:
            classes_of = train_y[rows[:, :k]]
            votes = weighted_votes(cosines[:, :k], classes_of, len(data.classes), settings.temperature)
            plain = majority_votes(classes_of, len(data.classes))
            # Neither looks at a seed: only an encoder that is drawn from one has a spread.
            found += [Score(f"{k}-nn", seed, accuracies(votes, test_y)) for seed in seeds[:1]]
            top1 = float((plain.argmax(1) == test_y).double().mean())
            found += [Score(f"{k}-nn majority", seed, {"top1": top1, "top5": None}) for seed in seeds[:1]]
        return found


EVALUATION = NearestNeighbours()
