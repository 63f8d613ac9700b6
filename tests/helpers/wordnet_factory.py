"""A tiny WordNet of nouns in the format of its database files."""

from pathlib import Path

# Lemma: its synsets, the first sense first; synset: offset and words.
SYNSETS = {
    1740: "cat true_cat",
    2000: "dog domestic_dog",
    2100: "jersey T-shirt tee_shirt",
    2200: "jersey",
    2300: "goose",
    2400: "man",
    2500: "work_force men",
    2600: "box",
    2700: "lady",
    2800: "knife",
    2900: "summer",
    3000: "Tee",
    3100: "glass",
    3200: "glasses",
}


SENSES = {
    "cat": [1740],
    "dog": [2000],
    "jersey": [2200, 2100],
    "t-shirt": [2100],
    "goose": [2300],
    "man": [2400],
    "men": [2500],
    "box": [2600],
    "lady": [2700],
    "knife": [2800],
    "summer": [2900],
    "tee": [3000],
    "true_cat": [1740],
    "glass": [3100],
    "glasses": [3200],
    "work_force": [2500],
}


LICENCE = "  1 This software and database is provided under a licence\n"


def write_wordnet(folder: Path, exceptions: str = "geese goose\nmen man\nglasses glass\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = [
        f"{offset:08d} 05 n {len(words):02x} {' '.join(f'{word} 0' for word in words)} 000 | a gloss; n 05"
        for offset, words in ((offset, text.split()) for offset, text in SYNSETS.items())
    ]
    index = [
        f"{lemma} n {len(offsets)} 2 @ ~ {len(offsets)} 1 {' '.join(f'{offset:08d}' for offset in offsets)}  "
        for lemma, offsets in sorted(SENSES.items())
    ]
    (folder / "data.noun").write_text(LICENCE + "\n".join(data) + "\n")
    (folder / "index.noun").write_text(LICENCE + "\n".join(index) + "\n")
    (folder / "noun.exc").write_text(exceptions)
    return folder
