"""What several tests share: coloured sets."""

from pathlib import Path

import numpy as np

from image_folders import encoded, write_folders


def colours(folder: Path, labels: tuple[str, ...]) -> None:
    """A data set of plain images whose colour is near their class' name: 5 of each to train on, 3 to test."""
    random = np.random.default_rng(len(labels))
    for part, count in (("train", 5), ("test", 3)):
        write_folders(folder / part, dict.fromkeys(labels, count))
        for file in sorted((folder / part).rglob("*.png")):
            shade = random.integers(0, 120, 3) + 120 * np.array(
                [file.parent.name == colour for colour in ("red", "green", "blue")]
            )
            file.write_bytes(encoded(tuple(int(value) for value in shade)))
