"""CIDEr-D (Vedantam et al., CVPR 2015, arXiv 1411.5726), equal to pycocoevalcap's `CiderScorer` on the same tokens.

For n = 1..4, with h the count of an n-gram in the candidate, r in a reference, and N images:

    idf = log N - log max(1, df)      df: images with a reference that holds it
    sim_n = sum min(h idf, r idf) r idf / (|h idf| |r idf|) * exp(-(l_h - l_r)^2 / (2 * 6^2))      l: length, told by the bigrams
    score of an image = 10 * mean over references of the mean over n of sim_n

The score of a set is the mean over its images; papers give it times 100.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_LONGEST, _SIGMA, _SCALE = 4, 6.0, 10.0
Ngram = tuple[str, ...]


class _Weighed(NamedTuple):
    """A caption as TF-IDF vectors, one for each n, with their norms, and its length."""

    vectors: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """The score of each image's candidate.

    Args:
        candidates: tokens of one caption an image.
        references: tokens of each image's references, one or more; document frequencies are counted over all of them.

    Returns:
        One score an image, 0 to 10. With one image alone every idf is log 1 = 0, and so is the score.
    """
    if len(candidates) != len(references) or not all(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} images; each needs one, and a reference or more")
    counted = [[_ngrams(tokens) for tokens in one] for one in references]
    frequencies = Counter(ngram for one in counted for ngram in set().union(*one))
    images = math.log(max(len(references), 1))
    scores = []
    for tokens, one in zip(candidates, counted, strict=True):
        candidate = _weigh(_ngrams(tokens), frequencies, images)
        similar = [_similarity(candidate, _weigh(reference, frequencies, images)) for reference in one]
        scores.append(_SCALE * math.fsum(similar) / len(similar))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[at : at + n]) for n in range(1, _LONGEST + 1) for at in range(len(tokens) - n + 1))


def _weigh(counts: Counter[Ngram], frequencies: Counter[Ngram], log_images: float) -> _Weighed:
    vectors: list[dict[Ngram, float]] = [{} for _ in range(_LONGEST)]
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, frequencies[ngram])))
    norms = [math.sqrt(math.fsum(value * value for value in vector.values())) for vector in vectors]
    return _Weighed(vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(candidate: _Weighed, reference: _Weighed) -> float:
    total = 0.0
    for mine, theirs, *norms in zip(candidate.vectors, reference.vectors, candidate.norms, reference.norms, strict=True):
        dot = math.fsum(min(value, theirs[ngram]) * theirs[ngram] for ngram, value in mine.items() if ngram in theirs)
        total += dot / (norms[0] * norms[1]) if all(norms) else dot
    apart = candidate.length - reference.length
    return total / _LONGEST * math.exp(-(apart**2) / (2 * _SIGMA**2))
