"""Encoders of one table compared image by image: the difference to the first, its 95% interval and p.

    Score.correct [M] -> `pack` -> result JSON (base64 of bits, for each seed) -> `compare` -> `versus` of each row

All encoders are tested on the same images, so that easy and hard images fall out of a difference: it is often known
several times as well as each accuracy. The p of the paired bootstrap covers the choice of the M test images alone: how
often would other images from the same source turn the sign? It does not cover what other seeds of the pre-training, of
the fit or of its training images would give: pre-train again with other seeds for that. Where the correctness of
several seeds of an evaluation is known, its mean for each image is what is resampled. Each interval and p is that of
one difference: with k encoders, multiply p by k - 1 (Bonferroni) before the best of them is praised.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

_RESAMPLES, _SEED = 10_000, 0
HEADER = ["difference", "95% interval", "p"]


class PerImage(NamedTuple):
    """What one row says about each image: rows with the same `data`, `variant` and `images` can be compared."""

    data: str
    variant: str
    encoder: str
    images: str  # fingerprint of the test images, in order
    count: int  # M
    correct: Sequence[str]  # for each seed


@dataclass(frozen=True)
class Versus:
    """The difference of an accuracy to that of the `encoder` first in the table, in shares of 1."""

    encoder: str
    difference: float
    low: float  # 95% interval
    high: float
    p: float  # two-sided, of the paired bootstrap, at least 2 / 10001
    mcnemar_p: float | None  # exact; None where seeds differ in an image
    images: int

    def cells(self) -> list[str]:
        """For the columns of HEADER: percentage points, and p."""
        smallest = 1e-3
        p = f"< {smallest:g}" if self.p < smallest else f"{self.p:.3f}"
        return [f"{100 * self.difference:+.1f}", f"{100 * self.low:+.1f} to {100 * self.high:+.1f}", p]


def pack(correct: np.ndarray) -> str:
    """Bool [M] -> base64 of its bits, the first image in the highest bit of the first byte."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack(packed: str, count: int) -> np.ndarray:
    """The inverse of `pack`: bool [count]."""
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=count).astype(bool)


def add_versus(rows: Sequence[dict[str, Any]]) -> None:
    """Set `versus` in the rows of a table: see `compare`."""
    for row, versus in zip(rows, compare(map(tested_of, rows)), strict=True):
        if versus:
            row["versus"] = asdict(versus)


def tested_of(row: dict[str, Any]) -> PerImage | None:
    """What a result's row says about each image; None if it says nothing. A row may name no `data`."""
    correct = [seed["correct"] for seed in row.get("seeds", ()) if "correct" in seed]
    if not correct or "tested" not in row:
        return None
    images = row["tested"]
    return PerImage(
        row.get("data", ""), row["variant"], row["encoder"], images["fingerprint"], images["count"], correct
    )


def versus_of(row: dict[str, Any]) -> Versus | None:
    """What `add_versus` has set."""
    return Versus(**row["versus"]) if "versus" in row else None


def compare(tested: Iterable[PerImage | None]) -> list[Versus | None]:
    """For each row its difference to the first of the same data, variant and images; None for these, and for None."""
    firsts: dict[tuple[str, str, str], tuple[str, np.ndarray]] = {}
    differences: list[Versus | None] = []
    for row in tested:
        differences.append(None)
        if row is None:
            continue
        correct = np.stack([unpack(packed, row.count) for packed in row.correct])
        name, first = firsts.setdefault((row.data, row.variant, row.images), (row.encoder, correct))
        if first is not correct:
            differences[-1] = paired_difference(name, first, correct)
    return differences


def paired_difference(name: str, first: np.ndarray, other: np.ndarray) -> Versus:
    """`other` less `first`, bool [S, M] each: S seeds (not the same number), M images; `name`: of the first."""
    per_image = other.sum(0) * len(first) - first.sum(0) * len(other)  # int64 [M], whole numbers: few different ones
    scale, images = len(first) * len(other), len(per_image)
    values, counts = np.unique(per_image, return_counts=True)
    # M images drawn with replacement have multinomial numbers of each value: as the bootstrap, without its M draws.
    drawn = np.random.default_rng(_SEED).multinomial(images, counts / images, _RESAMPLES)  # [resamples, values]
    sums = drawn @ values
    low, high = (float(bound) / scale / images for bound in np.quantile(sums, [0.025, 0.975]))
    tail = min(int((sums <= 0).sum()), int((sums >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (_RESAMPLES + 1))
    seeds_agree = all((side == side[0]).all() for side in (first, other))
    exact = mcnemar(int((other[0] & ~first[0]).sum()), int((first[0] & ~other[0]).sum())) if seeds_agree else None
    return Versus(name, float(per_image.sum()) / scale / images, low, high, p, exact, images)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: images that one encoder alone has right, and the other alone."""
    discordant, term, total = gained + lost, 1, 0
    for hits in range(min(gained, lost) + 1):
        total += term  # the binomial coefficient of `discordant` over `hits`
        term = term * (discordant - hits) // (hits + 1)
    return min(1.0, 2 * total / 2**discordant)
