"""CIDEr-D against pycocoevalcap's own figures and a naive implementation; PTB tokens against Stanford's."""

import numpy as np
import pytest

from train.evals.kinds.caption import cider_d, ptb_tokens

# What pycocoevalcap 1.2 gave: PTBTokenizer (Java) for the tokens, Cider().compute_score for the scores.
TOKENS = {
    "A man's dog isn't running; it can't -- won't -- stop!": "a man 's dog is n't running it ca n't wo n't stop",
    "Two dogs (brown & white) play-fight in the U.S. on Mt. Everest.": (
        "two dogs -lrb- brown & white -rrb- play-fight in the u.s. on mt. everest"
    ),
    "The \"quoted\" words, 'single' words... and: more": "the quoted words single words and more",
    "A 3-year-old girl's teddy bear costs $3.50, 1/2 price @ 10:30 a.m.": (
        "a 3-year-old girl 's teddy bear costs $ 3.50 1/2 price @ 10:30 a.m."
    ),
    "a t-shirt reading I'm here, gonna go wanna cannot": "a t-shirt reading i 'm here gon na go wan na can not",
    "dogs' toys and '90s music, o'clock": "dogs toys and '90s music o'clock",
    "black/white cat and/or dog [sitting] *star* a_b": "black/white cat and/or dog -lsb- sitting -rsb- * star * a_b",
    "It's the cat’s “nice” – hat — really… and éclair": "it 's the cat 's nice hat really and éclair",
    "man on bike,riding fast.A car behind": "man on bike riding fast.a car behind",
    "10,000 people 1990's St. Louis Dr. No. 5 U.S.A etc.": "10,000 people 1990 's st. louis dr. no. 5 u.s.a etc.",
    "cats vs. dogs": "cats vs. dogs",
    'can not 7-eleven 4x4 2nd 5\'10" 6 ft. 12" 3.': "can not 7-eleven 4x4 2nd 5 10 6 ft. 12 3",
    "Someone ..... and !!! ??? ?! .. ....": "someone and !!! ??? ?!",
    "7:30pm 10am 5-6 people 555-1234 A.M.": "7:30 pm 10am 5-6 people 555-1234 a.m.",
    "": "",
}
REFERENCES = [
    ["A man riding a horse on the beach.", "The man rides a brown horse near the sea.", "a person on a horse"],
    ["Two dogs play in the snow.", "two dogs are playing in snow, one is black", "Dogs running through deep snow"],
    ["A red bus on a city street.", "a double-decker bus drives down the street", "The bus is red"],
    ["A cat sleeps on a man's bed.", "the cat isn't awake", "A grey cat on a bed"],
]
CANDIDATES = [
    "a man riding a horse on a beach",
    "two dogs play in the snow the snow the snow",
    "a bus",
    "a dog on a bed",
]
SCORES = [3.22480504, 2.08426561, 1.11283629, 1.14793501]


@pytest.mark.parametrize("caption", TOKENS)
def test_tokens_are_stanfords(caption: str) -> None:
    assert " ".join(ptb_tokens(caption)) == TOKENS[caption]


def test_scores_are_pycocoevalcaps() -> None:
    found = cider_d(
        [ptb_tokens(candidate) for candidate in CANDIDATES],
        [[ptb_tokens(one) for one in three] for three in REFERENCES],
    )
    assert found == pytest.approx(SCORES, abs=5e-9)
    assert np.mean(found) == pytest.approx(1.8924604881759286, abs=1e-12)


def naive(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Dense vectors over all n-grams of each n, term by term as the paper writes it."""

    def grams(tokens: list[str], n: int) -> list[str]:
        return [" ".join(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]

    scores = np.zeros((len(candidates), 4))
    for n in range(1, 5):
        names = sorted(
            {
                gram
                for one in [*candidates, *(reference for group in references for reference in group)]
                for gram in grams(one, n)
            }
        )
        documents = np.array(
            [sum(any(name in grams(one, n) for one in group) for group in references) for name in names]
        )
        idf = np.log(len(references)) - np.log(np.maximum(1, documents))
        for image, (candidate, group) in enumerate(zip(candidates, references, strict=True)):
            for reference in group:
                h, r = (
                    np.array([grams(one, n).count(name) for name in names], dtype=float) * idf
                    for one in (candidate, reference)
                )
                size = np.linalg.norm(h) * np.linalg.norm(r)
                apart = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
                dot = np.minimum(h, r) @ r
                scores[image, n - 1] += 10 * (dot / size if size else dot) * np.exp(-(apart**2) / 72) / len(group)
    return list(scores.mean(1))


def test_scores_are_a_naive_implementations() -> None:
    dice, words = np.random.default_rng(0), list("abcdefg")

    def draw(most: int) -> list[str]:
        return [str(word) for word in dice.choice(words, dice.integers(0, most))]

    references = [[draw(12) for _ in range(dice.integers(1, 5))] for _ in range(12)]
    candidates = [draw(12) if dice.random() < 0.5 else one[0][:6] for one in references]
    found = cider_d(candidates, references)
    assert found == pytest.approx(naive(candidates, references), abs=1e-12) and max(found) > 1


def test_bounds() -> None:
    same = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    assert cider_d(same, [[one] for one in same]) == pytest.approx([10, 10])
    assert cider_d([[], ["x"]], [[one] for one in same]) == [0, 0]
    with pytest.raises(ValueError, match="2 candidates for 1 images"):
        cider_d(same, [same])
