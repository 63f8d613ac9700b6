"""Nearest neighbours of frozen features: DINO's weighted vote, and the majority.

Neighbours are the k training samples with the largest cosine, after DINO's eval_knn.py (arXiv 2104.14294).

weighted   each neighbour votes for its class with exp(cosine / temperature)
majority   each neighbour votes with 1; a tie goes to the class with the smaller number

N training samples, M test samples, W feature width, C classes.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from labels.settings import PositiveOnce, Section, Seeds
from labels.storage import UserError
from train.encoders.encoder import Encoder
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.protocol import Evaluation, Score, accuracies, hits


class Knn(Section):
    k: PositiveOnce = [10, 20]
    temperature: Annotated[float, Field(gt=0)] = 0.07
    seeds: Seeds = [0, 1, 2]


class NearestNeighbours(Evaluation):
    name, takes, section = "knn", "classes", Knn

    def describe(self, settings: Knn) -> str:
        weights = f"exp(cosine / {settings.temperature:g})"
        return f"k nearest neighbours by cosine, weighted by {weights} (DINO's), and by majority"

    def check(self, data: DataSet, settings: Knn) -> None:
        images, largest = len(data.train), max(settings.k)
        if largest > images:
            problem = f"knn.k is {largest}, the training part has {images} images"
            raise UserError(problem, allowed=f"k up to {images}", fix=f"--set knn.k=[{min(10, images)}]")

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Knn, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        parts, classes = (data.train, data.test), len(data.classes)
        train_x, test_x = (torch.from_numpy(extract(encoder, part)).to(extract.device) for part in parts)
        train_y, test_y = (torch.from_numpy(part.targets).to(extract.device) for part in parts)
        cosines, rows = nearest(train_x, test_x, max(settings.k))
        scores = []
        for k in settings.k:
            neighbours = train_y[rows[:, :k]]
            votes = weighted_votes(cosines[:, :k], neighbours, classes, settings.temperature)
            majority = majority_votes(neighbours, classes)
            # Nothing is drawn: only an encoder that is itself drawn from a seed varies with it.
            scores.append(Score(f"{k}-nn", seeds[0], accuracies(votes, test_y), correct=hits(votes, test_y)))
            correct = hits(majority, test_y)
            top1 = float(correct.mean())
            scores.append(Score(f"{k}-nn majority", seeds[0], {"top1": top1, "top5": None}, correct=correct))
        return scores


EVALUATION = NearestNeighbours()
_CHUNK_COSINES = 2**26  # similarities in memory at a time: 256 MiB


def nearest(train_x: Tensor, test_x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines float32 [M, k], greatest first, and rows int64 [M, k] of the k training samples [N, W] that are most
    similar to each test sample [M, W].
    """
    train_x = functional.normalize(train_x, dim=1).T.contiguous()
    parts = test_x.split(max(1, _CHUNK_COSINES // train_x.shape[1]))
    nearest_of_parts = [(functional.normalize(part, dim=1) @ train_x).topk(k, dim=1) for part in parts]
    return torch.cat([cosines for cosines, _ in nearest_of_parts]), torch.cat([rows for _, rows in nearest_of_parts])


def weighted_votes(cosines: Tensor, neighbours: Tensor, classes: int, temperature: float) -> Tensor:
    """Cosines [M, k], greatest first, and the neighbours' classes [M, k] -> votes float64 [M, C], at most k."""
    votes = torch.zeros(len(cosines), classes, dtype=torch.float64, device=cosines.device)
    above = cosines[:, :1].double()  # the largest: a common factor, without which a low temperature gives infinities
    return votes.scatter_add_(1, neighbours, ((cosines.double() - above) / temperature).exp())


def majority_votes(neighbours: Tensor, classes: int) -> Tensor:
    """The neighbours' classes [M, k] -> scores int64 [M, C]: counts, with ties broken towards the smaller class."""
    counts = torch.zeros(len(neighbours), classes, dtype=torch.int64, device=neighbours.device)
    counts.scatter_add_(1, neighbours, torch.ones_like(neighbours))
    return counts * classes + torch.arange(classes - 1, -1, -1, device=neighbours.device)
