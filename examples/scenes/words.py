"""Captions of scenes, and the noise that web captions have.

    Scene -> caption_of -> "two red cars left of a tree"
    caption + share of noise -> with_noise -> "FREE SHIPPING two red cras 2019 IMG_2041.jpg left tree wed"

`noise` is the share of a caption's words that say nothing of the picture. Besides, a tenth of `noise` of the captions
belong to another picture of the shard, and as many have a typing error.
"""

from pathlib import Path

import numpy as np

from scene import Group, Scene

SWAPPED = 0.1  # for each unit of noise
MISTYPED = 0.1
_NUMBERS = ("", "a", "two", "three")
_PLURALS = {"cherry": "cherries", "strawberry": "strawberries", "butterfly": "butterflies", "box": "boxes"}
_PLURALS |= {"bus": "buses", "scissors": "scissors"}
_SYNONYMS = {
    "car": ("automobile", "vehicle"),
    "plane": ("airplane", "aircraft"),
    "phone": ("telephone",),
    "bicycle": ("bike",),
    "dog": ("puppy",),
    "cat": ("kitten",),
    "boat": ("ship",),
    "gift": ("present",),
    "bear": ("teddy bear",),
    "house": ("home",),
    "flower": ("blossom",),
}
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
_OPENINGS = ("", "", "", "", "a picture of", "drawing of", "clip art:", "an image with", "cartoon", "illustration of")
_COMMON = (Path(__file__).parent / "noise_words.txt").read_text("utf8").split()
# As words are on the web, a few are frequent and most are rare: Zipf-Mandelbrot, with an offset of 4.
_SHARES = np.cumsum(1 / np.arange(5, len(_COMMON) + 5))
_SHARES /= _SHARES[-1]
_BY_FREQUENCY = np.random.default_rng(1).permutation(_COMMON).tolist()


def caption_of(scene: Scene, random: np.random.Generator) -> str:
    """A caption that names what the scene shows, or a part of it, in varied words."""
    said = [_phrase(group, random) for group in scene.groups]
    if len(said) == 2:
        if random.random() < 0.15:
            said = said[:1]
        elif random.random() < 0.6:
            relations = _RELATIONS[scene.relation]
            said = [f" {relations[int(random.integers(len(relations)))]} ".join(said)]
        else:
            said = [(" and " if random.random() < 0.7 else ", ").join(said)]
    return f"{_OPENINGS[int(random.integers(len(_OPENINGS)))]} {said[0]}".strip()


def _phrase(group: Group, random: np.random.Generator) -> str:
    names = (group.category, *_SYNONYMS.get(group.category, ()))
    name = names[0] if random.random() < 0.7 else names[int(random.integers(len(names)))]
    if group.count > 1:
        name = _PLURALS.get(name, f"{name}s")
    number = _NUMBERS[group.count] if random.random() < 0.8 else ""
    colour = group.colour if random.random() < 0.8 else ""
    return " ".join(word for word in (number, colour, name) if word)


def with_noise(caption: str, noise: float, random: np.random.Generator) -> str:
    """The caption with words of shops, dates, places, file names and other languages between its own.

    On average `noise` of all words are such words: 0 <= noise < 1.
    """
    words = caption.split(" ")
    if random.random() < MISTYPED * noise:
        words = _mistyped(words, random)
    added = random.poisson(len(words) * noise / (1 - noise))
    for number in np.searchsorted(_SHARES, random.random(added)):
        word = _BY_FREQUENCY[number]
        if random.random() < 0.05:
            word = f"{'IMG_' if random.random() < 0.5 else 'dsc'}{random.integers(10_000):04d}.jpg"
        words.insert(int(random.integers(len(words) + 1)), word.upper() if random.random() < 0.1 else word)
    return " ".join(words)


def _mistyped(words: list[str], random: np.random.Generator) -> list[str]:
    """Two neighbouring letters of one word change places."""
    chosen = int(random.integers(len(words)))
    word = words[chosen]
    if len(word) > 2:
        at = int(random.integers(len(word) - 1))
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return [*words[:chosen], word, *words[chosen + 1 :]]
