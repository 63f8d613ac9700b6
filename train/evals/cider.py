"""CIDEr-D (Vedantam et al., CVPR 2015, arXiv 1411.5726), equal to pycocoevalcap's `CiderScorer` on the same tokens.

For n = 1..4, with h the count of an n-gram in the candidate, r in a reference, and N images:

    idf = log N - log max(1, df)      df: images with a reference that holds it
    sim_n = sum min(h idf, r idf) r idf / (|h idf| |r idf|) * exp(-(l_h - l_r)^2 / (2 * 6^2))      l: length, told by the bigrams
    score of an image = 10 * mean over references of the mean over n of sim_n

The score of a set is the mean over its images; papers give it times 100.
"""

import math
import re
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
        raise ValueError(
            f"{len(candidates)} candidates for {len(references)} images; each needs one, and a reference or more"
        )
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
    for mine, theirs, *norms in zip(
        candidate.vectors, reference.vectors, candidate.norms, reference.norms, strict=True
    ):
        dot = math.fsum(min(value, theirs[ngram]) * theirs[ngram] for ngram, value in mine.items() if ngram in theirs)
        total += dot / (norms[0] * norms[1]) if all(norms) else dot
    apart = candidate.length - reference.length
    return total / _LONGEST * math.exp(-(apart**2) / (2 * _SIGMA**2))


# ---- ptb: Captions as COCO's evaluation splits them: PTB tokens in lower case, punctuation removed.
#
# Source: pycocoevalcap's tokenizer, which calls Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`)
# and drops a list of tokens. Its quirks are kept where they decide a score: a bracket becomes the word `-lrb-`, since
# the list names brackets in capitals, and `!!!` stays, since the list has the single mark alone. What captions hold is
# covered, not the whole grammar of newswire.


_REMOVED = {
    '"',
    "''",
    "'",
    "``",
    "`",
    "-LRB-",
    "-RRB-",
    "-LCB-",
    "-RCB-",
    ".",
    "?",
    "!",
    ",",
    ":",
    "-",
    "--",
    "...",
    ";",
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPELT = {
    "\u2018": "`",
    "\u2019": "'",
    "\u201c": "``",
    "\u201d": "''",
    "\u2013": "--",
    "\u2014": "--",
    "\u2026": "...",
    "\u00bd": "1/2",
    "\u00bc": "1/4",
    "\u00be": "3/4",
    "\u00a2": "cents",
    "\u00a3": "#",
    "\u20ac": "$",
    "\u00ad": "",
    "\u200b": "",
    "&amp;": "&",
    "&quot;": '"',
    "&apos;": "'",
    "&nbsp;": " ",
}
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|mr|mrs|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|adm|rev|"
    "maj|sgt|cpl|pvt|capt|ste?|ave|pres|hon|brig|mt|inc|cos?|corp|ltd|assn|univ|sq|jr|sr|bros|blvd|rd|esq|vs|etc|al|ca|cf|ct|ft|nos?|oz|pp|figs?|"
    "prop|bldg|tel|tenn|wash|tex|calif|mass|conn|fla|ala|minn"
)
_LETTER = r"[^\W\d_]"
_WORD = rf"{_LETTER}[^\W_]*(?:[.!?]{_LETTER}[^\W_]*)*"
_TOKEN = re.compile(
    "|".join(
        (
            r"</?[a-z][^<>]*>",  # SGML
            r"https?://[^\s<>\"|()]*[^\s<>\"|.!?(){},;:'`]",  # addresses
            r"[\w.%+-]+@[\w-]+(?:\.[\w-]+)+|(?:[\w-]+\.)+(?:com|net|org|edu)\b(?:/[^\s<>\"|()]*[^\s<>\"|.!?(){},;:'`])?",
            r"[@#][a-z_]\w*|&#\d+;",
            # written as one word, split
            r"'t(?=is\b|was\b)|can(?=not\b)|(?:gim|lem)(?=me\b)|(?:gon|got|wan)(?=(?:na|ta)\b)",
            r"'n'|'em\b|(?<!\d)'\d\d(?:s\b|(?!\w))|o'clock\b|ma'am\b|[dlo]'(?!s\b)[^\W\d_]+",
            rf"{_LETTER}+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b",  # contractions
            rf"(?:{_ABBREVIATIONS})\.(?!\w)|{_LETTER}(?:\.{_LETTER})*\.(?!{_LETTER})",
            rf"{_LETTER}&{_LETTER}(?!\w)|(?:at&t|c\+\+|c#)(?!\w)",
            r"[:;=][-o*]?[()dp](?!\w)",  # faces
            r"[-+]?\d+:\d\d(?=[ap]m\b)|\d+(?:[-/]\d+)+(?![\w-])",  # times, spans, fractions
            r"[^\W_]+(?:[.,]\d+)?(?:[-_/][^\W_]+)*(?:[-_][^\W_]+)+",  # joined
            rf"{_WORD}(?:[/_][^\W_]+)*",
            r"\d+[^\W\d_][^\W_]*(?:/[^\W_]+)*|[-+]?(?:\d*(?:[.:,]\d+)+)|\d+(?:/[^\W_]+)*|\d",  # numbers
            r"\.\.+|!(?:[!?])+|\?(?:[!?])+|--+|\*+|``|''|[^\w\s]|\w",
        )
    )
)


def ptb_tokens(caption: str) -> list[str]:
    """The tokens of a caption that scores are counted over.

    Args:
        caption: one sentence or several; line breaks count as spaces.
    """
    text = caption.lower()
    for mark, spelt in _SPELT.items():
        text = text.replace(mark, spelt)
    # A tag may hold spaces; the scorer splits at them once more.
    found = (part for match in _TOKEN.finditer(text) for part in _told(match.group()).split())
    return [token for token in found if token not in _REMOVED]


def _told(token: str) -> str:
    if len(token) > 1 and set(token) == {"."}:
        return "..."
    if len(token) > 1 and set(token) == {"-"}:
        return "--"
    if len(token) <= 3 and token[0] in _BRACKETS | {":": "", ";": "", "=": ""}:
        return "".join(_BRACKETS.get(mark, mark) for mark in token)
    return token
